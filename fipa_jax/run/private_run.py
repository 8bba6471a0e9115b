"""How is a phase private? Its channel, the noise that its budget affords, and what it spends.

What may be shown of such a run is made of the noisy sums alone: the model, the figures of the test set, epsilon. What
must stay with the server is what the run needs to go on: checkpoints, `origin.json`, and the secret of its noise.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.client.local_solver import LocalSolver
from fipa_jax.curvature.products import make_ggn
from fipa_jax.curvature.sketch import make_sketch
from fipa_jax.federation.channel import Channel
from fipa_jax.federation.parallel import make_mesh, replicate
from fipa_jax.federation.parts import Rates
from fipa_jax.federation.state import State
from fipa_jax.privacy import accounting, mechanism, noisy_sum
from fipa_jax.privacy.accounting import Plan
from fipa_jax.privacy.mechanism import Frame, frame_of_rows, whitened
from fipa_jax.privacy.noisy_sum import PrivacyRates, Spent
from fipa_jax.reporting import console
from fipa_jax.run.private_checks import is_private
from fipa_jax.tasks.task import Problem, Task

RELEASE = 0x4E1E  # a stream of the secret key
MOST_ENTRIES = 2**26  # of the public examples' Jacobian, up to which it is computed as a whole


def cohort_of(config: ConfigDict, settings: ConfigDict, num_clients: int) -> int:
    """C, the clients for which a phase's round has room."""
    if not (is_private(settings) and settings.privacy.sampling == "poisson" and config.cohort < num_clients):
        return config.cohort or num_clients
    rounds, privacy = max(settings.rounds, 1), settings.privacy
    rate = config.cohort / num_clients
    return accounting.room_for(num_clients, rate, rounds, privacy.epsilon, privacy.delta)


def channel_of(config: ConfigDict, settings: ConfigDict, task: Task, num_clients: int) -> Channel:
    """The channel of a private phase."""
    frame_of, released = noisy_sum.no_frame, None
    if settings.privacy.whitening == "public":
        frame_of = functools.partial(public_frame, task, settings.privacy.eigenpairs)
    if settings.privacy.whitening == "release":
        frame_of, released = noisy_sum.released_frame, True
    sampled = settings.privacy.sampling == "poisson"
    return noisy_sum.private(float(config.cohort or num_clients), sampled, frame_of, released)


def local_in_frame(local: LocalSolver, settings: ConfigDict) -> LocalSolver:
    """The local solver in the phase's coordinates."""
    whitens = is_private(settings) and settings.privacy.whitening != "none"
    return noisy_sum.in_frame(local) if whitens else local


def public_frame(task: Task, rank: int, params: dict, spent: Spent, rates: PrivacyRates) -> Frame:
    """The frame of the curvature at public examples, as the model has it now: it needs no labels."""

    def outputs(theta, batch):
        return task.outputs(trees.nested(theta), batch)[0]

    size, out = trees.ravel(params).size, jax.eval_shape(outputs, params, rates.public)
    if out.size * size <= MOST_ENTRIES:
        rows = make_ggn(outputs, task.loss, jacobian="rows")(params, rates.public).rows
        return frame_of_rows(rows, rank, rates.damping)
    of_all = make_sketch(outputs, task.loss, rank=min(rank, size), solver="auto", probes=0)
    return whitened(of_all(jax.random.key(0), params, rates.public), rates.damping)


def rates_of(settings: ConfigDict, dtype: str, public: dict | None) -> PrivacyRates | None:
    """The traced numbers of a phase's channel, before its noise is known: as they are they afford no round."""
    if not is_private(settings):
        return None
    if settings.privacy.whitening == "public" and public is None:
        raise ValueError(
            "privacy.whitening: 'public' needs examples that are no client's, and this task has none; for images name "
            "a set in config.data.public, own data have them in x_public of the file; or set it to 'none'"
        )
    given = settings.privacy
    clip, damping, decay = (jnp.asarray(value, dtype) for value in (given.clip, given.damping, given.clip_decay))
    seen = public if given.whitening == "public" else ()
    none, all_ = jnp.zeros([], dtype), jnp.ones([], dtype)
    return PrivacyRates(jax.random.key(0), clip, none, all_, damping, decay, jnp.int32(0), seen)


class Budget(NamedTuple):
    """What a phase may spend, and what its rows say."""

    rounds: int  # that it affords; as many as asked for where nothing is private
    of_row: Callable[[dict, dict], dict]  # (row, info) -> the row as it may be shown


def unlimited(settings: ConfigDict) -> Budget:
    """The budget of a phase that is not private."""
    return Budget(settings.rounds, lambda row, info: row)


def begin(experiment: Any, settings: ConfigDict, rates: Rates, state: State, entropy: Callable[[], int]):
    """(rates, state, budget) with which a phase begins or goes on, its noise known.

    Args:
      entropy: the secret of the phase, the same whenever it goes on.

    Raises:
      ValueError: the phase was stopped with another plan than it would go on with.
    """
    if not is_private(settings):
        return rates, state, unlimited(settings)
    given, plan, mesh = settings.privacy, plan_of(experiment, settings), make_mesh(experiment.config.devices)
    rounds = settings.rounds
    if given.noise_multiplier:
        rounds = accounting.affordable(given.epsilon, rounds, plan)
    old = rates.channel.privacy
    new = old._replace(
        secret=_key_of(entropy()),
        noise=jnp.asarray(plan.noise, old.noise.dtype),
        rate=jnp.asarray(plan.rate, old.rate.dtype),
        rounds=jnp.int32(rounds),
    )
    state = _goes_on(state, plan) if int(state.history.rounds) else _begun(experiment, settings, plan, new, state)
    console.attempt("the budget", print, _in_words(given, plan))
    if rounds < settings.rounds:
        logging.warning("the budget affords %d of %d rounds, and the phase stops then", rounds, settings.rounds)
    rates = rates._replace(channel=rates.channel._replace(privacy=new))
    budget = Budget(rounds, functools.partial(_private_row, functools.cache(_spent_by(plan)), given.delta))
    return (
        replicate(rates, mesh),
        state._replace(history=replicate(jax.tree.map(jnp.copy, state.history), mesh)),
        budget,
    )


def plan_of(experiment: Any, settings: ConfigDict) -> Plan:
    """What a private phase releases, its noise the least that its budget allows unless the config says it."""
    given, clients = settings.privacy, experiment.population.num_examples.size
    rate = experiment.config.cohort / clients if given.sampling == "poisson" else 1.0
    delta = given.delta * (1 - accounting.RESERVE) if rate < 1 else given.delta
    share = given.release_share if given.whitening == "release" else 0.0
    room = float(cohort_of(experiment.config, settings, clients)) if rate < 1 else 0.0
    plan = Plan(given.noise_multiplier, delta, rate, math.sqrt(share) * accounting.mu_for(given.epsilon, delta), room)
    if plan.noise:
        return plan
    return plan._replace(noise=accounting.noise_for(given.epsilon, settings.rounds, plan))


def _in_words(given: ConfigDict, plan: Plan) -> str:
    who = "all clients" if plan.rate == 1 else f"each client with probability {plan.rate:.3g}"
    within = f"epsilon {given.epsilon:g} at delta {given.delta:g}"
    falls = f" times {given.clip_decay:g} a round" if given.clip_decay < 1 else ""
    return f"private: {who}, clip {given.clip:g}{falls}, noise multiplier {plan.noise:.4g}, within {within}"


def _spent_by(plan: Plan) -> Callable[[int], float]:
    return lambda rounds: accounting.epsilon_of(plan, rounds)


def _private_row(spent: Callable[[int], float], delta: float, row: dict, info: dict) -> dict:
    """A round's row with what has been spent so far, and without the seconds, which tell how many clients worked."""
    kept = {name: value for name, value in row.items() if not name.startswith(("seconds_", "rounds_released"))}
    return kept | {"epsilon": spent(int(info["rounds_released"])), "delta": delta}


def _key_of(secret: int) -> jax.Array:
    """The key of noise and sampling, of 64 secret bits."""
    return jax.random.wrap_key_data(jnp.asarray([secret >> 32, secret & 0xFFFFFFFF], jnp.uint32))


IN_WORDS = "the noise multiplier", "the delta", "the clients' share", "the release's mu", "a cohort's room of"


def _goes_on(state: State, plan: Plan) -> State:
    """The state as it was, whose rounds so far must have had the plan that all of them are counted by."""
    for words, kept, now in zip(IN_WORDS, state.history.plan, plan, strict=True):
        before, now = float(kept), float(jnp.asarray(now, kept.dtype))
        if not math.isclose(before, now, rel_tol=1e-5):
            raise ValueError(
                f"--resume: the run's rounds so far had {words} {before:.6g}, and would now have {now:.6g}; epsilon "
                "counts all rounds by one plan: set the fields of fipa.privacy, fipa.rounds and config.cohort to what "
                "they were, or begin anew with --resume=no"
            )
    return state


def _begun(experiment: Any, settings: ConfigDict, plan: Plan, numbers: PrivacyRates, state: State) -> State:
    """The state before the first round, with what is released once."""
    frame = ()
    if plan.released:
        moments = second_moments(experiment, settings)
        key = jax.random.fold_in(numbers.secret, RELEASE)
        frame = mechanism.released_frame(key, moments, 1 / plan.released, numbers.damping)
    kept = Plan(*(jnp.asarray(number, numbers.noise.dtype) for number in plan))
    return state._replace(history=Spent(state.history.rounds, kept, frame))


def second_moments(experiment: Any, settings: ConfigDict) -> jax.Array:
    """[T, D, D], of each client (1/N_m) sum_n phi_n phi_n^T, phi what the trained dense layer multiplies.

    That is the body's features, behind a 1 where the layer has a bias.
    """
    features = np.asarray(experiment.population.data["body"])
    if len(trees.select(experiment.params, settings.trainable)) > 1:
        features = np.concatenate([np.ones_like(features[:, :1]), features], axis=1)
    clients = experiment.problem.clients
    return jnp.stack([jnp.asarray(features[own].T @ features[own] / max(len(own), 1)) for own in clients])


def as_shown(problem: Problem) -> Problem:
    """The problem without what says something of the clients' data: for pictures and tables."""
    return problem._replace(baseline=None, clients=())
