"""Cohorts of several rounds, and a server that remembers them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import aggregate
from helpers.rules import CLIENTS, SIZE, as_tree, as_vector, clients_of, uploads_of

DECAY, BETA, ROUNDS = 0.7, 0.3, 5
FREE = {"relative": False, "damping": BETA, "max_step": 0.0, "explosion": 0.0, "trace_cap": 0.0, "rcond": 1e-9}
PRIOR = FREE | {"memory": "prior", "memory_decay": DECAY, "memory_rank": SIZE}
TARGETS = PRIOR | {"memory": "targets", "memory_length": 3}
LATEST = PRIOR | {"memory": "latest", "num_clients": 8}


@functools.cache
def rule_of(form, **options):
    rule = aggregate.fipa(form, **options)
    return rule, jax.jit(rule.apply)


def run(cohorts, form="damped", state=None, ids=None, sent=None, **options):
    """(the parameters [P] before each round and at the end, the infos, the last state).

    `sent` holds other fields of each round's uploads.
    """
    rule, apply = rule_of(form, **options)
    theta, found, infos = np.zeros(SIZE), [], []
    state = state or rule.init(as_tree(theta))
    for k, cohort in enumerate(cohorts):
        found.append(theta)
        uploads = uploads_of(*(cohort(theta) if callable(cohort) else cohort))
        uploads = uploads._replace(ids=None if ids is None else jnp.asarray(ids[k]), **(sent[k] if sent else {}))
        step, state, info = apply(uploads, state, as_tree(theta))
        theta = theta + as_vector(step)
        infos.append(jax.tree.map(np.asarray, info))
    return [*found, theta], infos, state


def solve(form, curvature, pull, bulk):
    """The form's step by a dense H, sum_m w_m H_m delta_m and sum_m w_m delta_m."""
    if form == "pinv":
        return np.linalg.pinv(curvature, rcond=FREE["rcond"], hermitian=True) @ pull
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
