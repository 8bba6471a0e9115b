"""A federation of three clients on the sine task, each with a number of examples of its own, in one process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.client.examples import Client
from fipa_jax.config import recipes
from fipa_jax.config.methods import method
from fipa_jax.data import partition
from fipa_jax.deployment.agreement import agree
from fipa_jax.deployment.server import Server
from fipa_jax.deployment.site import Site
from fipa_jax.federation import parts
from fipa_jax.federation.round import whole_round
from fipa_jax.run import experiment as experiments
from fipa_jax.run import loop
from fipa_jax.saving.journal import Rows
from fipa_jax.tasks import task
from helpers.runs import tiny

COUNTS = (8, 5, 3)  # examples


def ragged(config):
    """The config's problem, of which the clients own differently many examples."""
    problem = task.build(config)
    clients = [own[:count] for own, count in zip(problem.clients, COUNTS, strict=False)]
    return problem._replace(clients=[*clients, *problem.clients[len(COUNTS) :]])


def config_of(precision="float64", clients=3, lev_marquardt=False, **fields):
    """A config for two rounds."""
    config = tiny(precision=precision, **fields)
    config.task.num_clients = clients
    if lev_marquardt:
        recipes.levenberg_marquardt(config)
        config.fipa.rounds, config.fipa.sketch.rank = 2, 3
    config.fipa.sketch.solver = "rows"  # which compiles in least time
    return config


class Deployed:
    """An agreement on a config's method, and its clients."""

    def __init__(self, config, spec="fipa", **options):
        self.config, self.spec, self.problem = config, spec, ragged(config)
        problem, clients = self.problem, self.problem.clients
        self.agreement = agree(config, problem.task, len(clients), problem.test, spec=spec, **options)
        self.width = max(map(len, clients))
        self.sites = [Site(self.agreement, one, self.data(one), self.width) for one in range(len(clients))]

    def data(self, client):
        """{field: [N, ...]}, a client's examples."""
        own = np.asarray(self.problem.clients[client])
        return {name: field[own] for name, field in self.problem.train.items()}

    def server(self, journal=None):
        """A new server."""
        return Server(self.agreement, journal)

    def answers(self, server, clients=None):
        """{client: its upload} to what a server sends it."""
        blobs = server.broadcasts(server.draw() if clients is None else clients)
        return {one: self.sites[one].work(blob) for one, blob in blobs.items()}

    def run(self):
        """(the parameters, the rows) after all rounds."""
        rows = Rows()
        server = self.server(rows)
        while not server.done:
            server.round(self.answers(server))
            assert not server.wrong
        return server.result, rows

    def whole_rounds(self):
        """The state after the same rounds, each in one program, as a loop of one's own would have them."""
        agreement, problem = self.agreement, self.problem
        with agreement.precision():
            clients = Client(*map(jnp.asarray, partition.pad(problem.clients)))
            data = jax.tree.map(jnp.asarray, problem.train)
            one = jax.jit(functools.partial(whole_round, agreement.parts))
            state = parts.init(agreement.parts, agreement.params)
            for _ in range(agreement.rounds):
                state, _ = one(state, agreement.rates, data, clients, agreement.root)
        return state

    def simulate(self):
        """(the parameters, the rows) of the same rounds as a simulation."""
        rows = Rows()
        with self.agreement.precision():
            experiment = experiments.build(self.config, self.problem)
            settings = method(self.config, self.spec)
            return loop.run_phase(experiment, settings, self.spec, experiment.params, 0, rows), rows


def gap(tree, other):
    """The largest difference of two trees, relative to the largest entry of a leaf."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    pairs = [(np.asarray(one, float), np.asarray(two, float)) for one, two in leaves]
    return max(float(np.max(np.abs(one - two)) / (np.max(np.abs(two)) or 1)) for one, two in pairs)


def bits(tree):
    """The bytes of all leaves."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
