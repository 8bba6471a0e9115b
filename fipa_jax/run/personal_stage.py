"""What does every client get for itself once a method is trained? Models of its own, in several ways side by side.

The ways are those of `personal_ways`. The strength of each is chosen by cross-validation within the clients' own
training examples, one for all clients: no test example has a say, and a client of two examples needs no third.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.client import personal
from fipa_jax.client.examples import Client, gather, masked_mean, own_indices, present, subsample
from fipa_jax.client.local_solver import Hyper, LocalSolver
from fipa_jax.data import partition
from fipa_jax.federation.parallel import map_clients
from fipa_jax.federation.parts import Parts, model_of
from fipa_jax.federation.population import Resident
from fipa_jax.lookup import lookup
from fipa_jax.reporting import metrics
from fipa_jax.run.personal_ways import BY_CURVATURE, WAYS, Trained, Way
from fipa_jax.run.phase_parts import eigenpairs_of
from fipa_jax.tasks.task import Problem


class People(NamedTuple):
    """The M clients that get models of their own."""

    owned: Sequence[np.ndarray]  # of each the indices of its training examples
    tests: Sequence[np.ndarray]  # and of its test examples, at least one


class Folds(NamedTuple):
    """Of each client its examples but those of a fold, fold after fold, and at last all: [M (K + 1), N]."""

    fit: Client
    held: Client  # the fold's


def set_apart(problem: Problem, settings: ConfigDict, seed: int) -> tuple[Problem, People | None]:
    """(the problem of the clients that are trained on, who gets models of its own; None for nobody).

    Args:
      settings: `config.personal`.
      seed: by which newcomers are drawn.

    Raises:
      ValueError: the clients have no test examples of their own, or none are left to train on.
    """
    if not settings.compare:
        if settings.newcomers:
            raise ValueError(
                "config.personal.newcomers: keeps clients out of the rounds to give them models in the ways that "
                "config.personal.compare names; name some, or set it to 0"
            )
        return problem, None
    if problem.test_clients is None:
        raise ValueError(
            "config.personal.compare: needs clients with test examples of their own, which this task has not; own_data "
            "has them with config.task.split = 'given' and a file that says whose each test example is (client_test)"
        )
    number, tested = len(problem.clients), [i for i, rows in enumerate(problem.test_clients) if len(rows)]
    apart = round(settings.newcomers * number)
    if settings.newcomers and not 0 < apart < number:
        raise ValueError(f"config.personal.newcomers: {apart} of {number} clients, but some need to be on either side")
    new = np.sort(np.random.default_rng([seed, number]).permutation(number)[:apart])
    ids = [i for i in tested if i in new] if apart else tested
    if not ids:
        who = f"the {apart} clients that are kept apart" if apart else "the clients"
        raise ValueError(
            f"config.personal.{'newcomers' if apart else 'compare'}: none of {who} has test examples of its own"
        )
    owned, tests = ([of[i] for i in ids] for of in (problem.clients, problem.test_clients))
    if not apart:
        return problem, People(owned, tests)
    old = np.setdiff1d(np.arange(number), new)
    clients, old_tests = ([of[i] for i in old] for of in (problem.clients, problem.test_clients))
    names = [problem.names[i] for i in old] if problem.names else ()
    return problem._replace(clients=clients, test_clients=old_tests, names=names), People(owned, tests)


def check(experiment, settings: ConfigDict, parts: Parts) -> None:
    """Refuses what `figures` could not do, before anything is trained.

    Args:
      experiment: `experiment.Experiment`.
      settings, parts: of the phase.

    Raises:
      ValueError: names the field of `config.personal`.
    """
    wanted = experiment.config.personal
    for name in wanted.compare:
        lookup(WAYS, name, "config.personal.compare")
    if experiment.people is None:
        return
    if not isinstance(experiment.population, Resident):
        raise ValueError("config.personal.compare: needs config.examples_on = 'device'")
    try:
        personal.proximity(trees.select(experiment.params, settings.trainable), wanted.own)
    except ValueError as error:
        raise ValueError(f"config.personal.own: {error}") from None
    if _by_curvature(wanted):
        sizes = [len(rows) for rows in experiment.problem.clients]
        shapes = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ([len(sizes), max(sizes)], [len(sizes)]))
        given = experiment.params, experiment.population.data, Client(*shapes), experiment.root
        try:
            jax.eval_shape(_tell(settings, parts), *given)
        except ValueError as error:
            asking = f"config.personal.compare: {_by_curvature(wanted)[0]!r} takes the clients' sketches"
            raise ValueError(f"{error} ({asking})") from error


def figures(experiment, settings: ConfigDict, parts: Parts, params: Any) -> dict:
    """The figures of the clients' own models on their own test examples, `personal_WAY[_EXAMPLES]_METRIC_...`.

    That is the mean over clients, their standard deviation and worst decile, see `metrics.over_clients`. Besides, the
    strength or the steps, `chosen_WAY[_EXAMPLES]`, and the held-out loss by which these were chosen, with `_loss` at
    the end. {} where nobody gets a model of its own.

    Args:
      experiment: `experiment.Experiment`.
      settings, parts: of the phase.
      params: the whole model's, as trained.
    """
    people, wanted, result = experiment.people, experiment.config.personal, {}
    if people is None:
        return result
    trained = _trained(experiment, settings, parts, params)
    tests = Client(*map(jnp.asarray, partition.pad(people.tests)))
    key = _measure, settings.trainable, parts.chunk
    measure = experiment.compiled.setdefault(key, jax.jit(_measure(parts)))
    ways = {name: WAYS[name](trained) for name in wanted.compare}
    for number in wanted.examples:
        folds = folds_of(people.owned, number, max(wanted.examples), wanted.folds, experiment.config.seed)
        for name, way in ways.items():
            thetas, chosen, loss = best_of(way, _attempt(experiment, settings, parts, params, way, folds))
            means = measure(params, thetas, experiment.held["test"], tests)
            end = f"{name}_{number}" if number else name
            result |= metrics.over_clients(means, tests.num_examples, f"personal_{end}")
            result |= {f"chosen_{end}": chosen, f"chosen_{end}_loss": loss}
    return dict(zip(result, jax.device_get([*result.values()]), strict=True))  # in the order of the ways


def best_of(way: Way, attempt: Callable[[float], tuple]) -> tuple[Any, float, float]:
    """(the clients' parameters [M, ...], the number with which the held-out loss is lowest, that loss).

    Args:
      way: whose numbers are tried.
      attempt: number -> (parameters [M, ...], that loss []).
    """
    best = None
    for number in way.tried:
        thetas, loss = attempt(number)
        loss = np.nan_to_num(loss, nan=np.inf)
        if best is None or loss < best[2]:
            best = thetas, number, loss
    return best


def folds_of(owned: Sequence[np.ndarray], number: int, most: int, folds: int, seed: int) -> Folds:
    """What clients fit on, and what they are held to, for cross-validation.

    Args:
      owned: of each of M clients the indices of its examples.
      number: of them that count, the first of a random order; 0 for all.
      most: the largest such number: all have arrays of one size.
      folds: K.
      seed: of the orders, for each client the same whatever the others.
    """
    widest = max(map(len, owned))
    width = min(most, widest) if number else widest
    fit, held = [], []
    for client, rows in enumerate(owned):
        order = np.random.default_rng([seed, client]).permutation(rows)[: number or None]
        fold = np.arange(len(order)) % folds
        for apart in range(folds + 1):
            fit.append((order[fold != apart], order[fold == apart]))
            held.append(fit[-1][::-1])
    return Folds(_stacked(fit, width), _stacked(held, width))


def _stacked(parts: list[tuple[np.ndarray, np.ndarray]], width: int) -> Client:
    """Clients of the first indices of each pair; what fills them up is their own too."""
    indices = np.empty([len(parts), width], np.int32)
    for row, (own, others) in zip(indices, parts, strict=True):
        row[:] = np.resize(np.concatenate([own, others]), width)
    return Client(jnp.asarray(indices), jnp.asarray([len(own) for own, _ in parts], jnp.int32))


def _trained(experiment, settings: ConfigDict, parts: Parts, params: Any) -> Trained:
    """What the ways start from; with the sketches of the clients in training, at the trained model."""
    clients = Client(*map(jnp.asarray, partition.pad(experiment.problem.clients)))
    data, told = experiment.population.data, None
    if _by_curvature(experiment.config.personal):
        told = jax.jit(_tell(settings, parts))(params, data, clients, experiment.root)
    first, last = (trees.select(of, settings.trainable) for of in (experiment.params, params))

    def moves_of(way: Way) -> jax.Array:
        fit = jax.jit(_fit(way.local, parts))
        thetas, _ = fit(params, way.start, way.prior, _hyper(way, way.tried[0]), data, clients, clients)
        return trees.ravel_stacked(thetas) - trees.ravel(last)[None]

    return Trained(experiment.config.personal, parts.task, first, last, told, clients.num_examples, moves_of)


def _by_curvature(wanted: ConfigDict) -> list[str]:
    """Those of the ways asked for that the clients' sketches have a say in."""
    return [name for name in wanted.compare if name in BY_CURVATURE]


def _tell(settings: ConfigDict, parts: Parts) -> Callable:
    """Builds `tell(params, data, clients, root)`: the sketches of clients, [C, ...]."""
    sketcher = eigenpairs_of(settings.sketch, parts.task)

    def one(params, data, client, key):
        chosen, outputs = model_of(parts, params)
        draw_key, solve_key = jax.random.split(key)
        client = subsample(draw_key, client, settings.sketch.examples)
        return sketcher.of_client(outputs, chosen, solve_key, gather(data, own_indices(client)), present(client))

    def tell(params, data, clients, root):
        keys = jax.random.split(jax.random.fold_in(root, 2**31 + 2), clients.num_examples.shape[0])
        return sketcher.of_cohort(map_clients(one, (params, data), clients, keys, chunk=parts.chunk), jnp.int32(0))

    return tell


def _hyper(way: Way, number: float) -> Hyper:
    """The way's hyper-parameters with this strength, or so many steps."""
    blank = jnp.ones([], way.prior.anchor.dtype)
    hyper = Hyper(lr=blank * way.lr, damping=blank, mu=blank)
    return hyper._replace(**{way.field: jnp.asarray(number, jnp.int32 if way.field == "steps" else blank.dtype)})


def _attempt(experiment, settings: ConfigDict, parts: Parts, params: Any, way: Way, folds: Folds):
    """Builds `attempt(number)`, see `best_of`."""
    people, data = experiment.people, experiment.population.data
    key = way.local, settings.trainable, parts.chunk
    run = experiment.compiled.setdefault(key, jax.jit(_fit(way.local, parts)))
    count = len(folds.fit.num_examples) // len(people.owned)

    def attempt(number: float) -> tuple[Any, float]:
        thetas, losses = run(params, way.start, way.prior, _hyper(way, number), data, *folds)
        by_client = [np.asarray(x).reshape(-1, count).sum(1) for x in (losses, folds.held.num_examples)]
        last = jax.tree.map(lambda leaf: leaf[count - 1 :: count], thetas)
        return last, float(np.mean(by_client[0] / np.maximum(by_client[1], 1)))

    return attempt


def _fit(local: LocalSolver, parts: Parts) -> Callable:
    """Builds `fit(...) -> (parameters, sum of the losses on what is held out)`, of clients and folds."""

    def one(params, start, prior, hyper, data, fit, held):
        _, outputs = model_of(parts, params)
        result = local(outputs, start, data, fit, jax.random.key(0), hyper, (), prior)
        theta = jax.tree.map(lambda old, move: (old + move).astype(old.dtype), start, result.delta)
        examples = gather(data, own_indices(held))
        loss = parts.task.loss(outputs(theta, examples)[0], examples)
        return theta, jnp.sum(jnp.where(present(held), loss, 0))

    def fit(params, start, prior, hyper, data, fit, held):
        common = params, start, prior, hyper, data
        return map_clients(one, common, fit, held, chunk=parts.chunk)

    return fit


def _measure(parts: Parts) -> Callable:
    """Builds `measure(params, thetas, data, clients) -> {metric: [M]}`, each client's mean with its own parameters."""

    def one(params, data, theta, client):
        examples = gather(data, own_indices(client))
        values = parts.task.metrics(model_of(parts, params)[1](theta, examples)[0], examples)
        values = metrics.of_clients(values, parts.task.figures)
        return {name: masked_mean(value, present(client)) for name, value in values.items()}

    return lambda params, thetas, data, clients: map_clients(one, (params, data), thetas, clients, chunk=parts.chunk)
