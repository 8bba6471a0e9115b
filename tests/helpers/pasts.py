"""Cohorts of several rounds, and a server that remembers them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import aggregate
from fipa_jax.aggregate import LateUpdates, Limits, PastRounds
from helpers.rules import CLIENTS, SIZE, apply, as_tree, as_vector, clients_of, uploads_of, with_hyper

DECAY, BETA, RCOND, ROUNDS = 0.7, 0.3, 1e-9, 5
NOTHING, ON_TIME = PastRounds(), LateUpdates()
PRIOR = PastRounds("prior", rank=SIZE, decay=DECAY)
TARGETS = PRIOR._replace(kind="targets", length=3)
LATEST = PRIOR._replace(kind="latest", num_clients=8)


@functools.cache
def rule_of(past=NOTHING, form="damped", **options):
    """(rule, the same compiled), without bounds, of an absolute damping unless options say otherwise."""
    options = {"damping": BETA, "rcond": RCOND, "relative": False, "limits": Limits(0.0, 0.0, 0.0, 0.0)} | options
    rule = aggregate.fipa(form, past=past, **options)
    return rule, jax.jit(functools.partial(apply, rule))


def past_of(state):
    """What a rule's state holds of past rounds."""
    return state.solver[0]


def run(cohorts, past=NOTHING, form="damped", *, state=None, ids=None, sent=None, hyper=None, late=ON_TIME, **options):
    """(the parameters [P] before each round and at the end, the infos, the last state).

    `sent` holds other fields of each round's uploads, `hyper` traced numbers other than those of `rule_of`.
    """
    rule, compiled = rule_of(past, form, late=late, **options)
    theta, visited, infos = np.zeros(SIZE), [], []
    state = with_hyper(state or rule.init(as_tree(theta)), **(hyper or {}))
    for k, cohort in enumerate(cohorts):
        visited.append(theta)
        uploads = uploads_of(*(cohort(theta) if callable(cohort) else cohort))
        uploads = uploads._replace(ids=jnp.asarray(ids[k]) if rule.needs.ids else None, **(sent[k] if sent else {}))
        step, state, info = compiled(uploads, state, as_tree(theta))
        theta = theta + as_vector(step)
        infos.append(jax.tree.map(np.asarray, info))
    return [*visited, theta], infos, state


def solve(form, curvature, pull, bulk):
    """The form's step by a dense H, sum_m w_m H_m delta_m and sum_m w_m delta_m."""
    if form == "pinv":
        return np.linalg.pinv(curvature, rcond=RCOND, hermitian=True) @ pull
    regular = curvature + BETA * np.eye(SIZE)
    return np.linalg.solve(regular, pull + (BETA * bulk if form == "damped" else 0))


COHORTS = [clients_of(2, seed) for seed in range(ROUNDS)]


def quadratics(seed=0, number=8):
    """The losses |theta - best_m|^2_{H_m} / 2 of eight clients, cohorts of four of them with exact steps, their ids."""
    draw = np.random.default_rng(seed)
    roots, best = draw.normal(size=(number, SIZE, SIZE)), draw.normal(size=(number, SIZE))
    each = np.einsum("mpq,mrq->mpr", roots, roots)

    def cohort(ids):
        values, basis = np.linalg.eigh(each[ids])
        regular = each[ids] + BETA * np.eye(SIZE)
        step = lambda theta: -np.linalg.solve(regular, np.einsum("mpq,mq->mp", each[ids], theta - best[ids])[..., None])
        return lambda theta: (step(theta)[..., 0], np.full(CLIENTS, 7), values[:, ::-1], basis[..., ::-1])

    ids = [draw.permutation(number)[:CLIENTS] for _ in range(6)]
    return each, best, [cohort(chosen) for chosen in ids], ids


IDS = [[5, 0, 2, 7], [1, 0, 7, 3], [4, 5, 1, 6], [2, 3, 0, 4], [6, 7, 5, 1]]
