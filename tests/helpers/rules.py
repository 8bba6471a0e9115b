"""The aggregation rules beside their dense oracles, and the clients they are tried on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import aggregate
from fipa_jax.aggregate.fisher_informed import FORMS
from fipa_jax.curvature.sketch import Diagonal, Sketch

CLIENTS = 4
LIKE = {"a": np.zeros((2, 4)), "b": np.zeros(4)}  # the parameters' tree
SIZE = 12  # P
RANKS = {"narrow": 2, "full": SIZE}  # D = 8 < P and D = 48 > P
RCOND = 1e-6
UNBOUNDED = aggregate.Limits(max_step=1e9)


class Dense:
    """The quantities of one round as dense matrices, of the clients with examples."""

    def __init__(self, deltas, counts, eigenvalues, basis, weighting="examples"):
        self.given = deltas, counts, eigenvalues, basis
        present = counts > 0
        counts = counts[present] if weighting == "examples" else np.ones(present.sum())
        self.weights = counts / counts.sum()
        self.deltas = deltas[present]
        self.each = np.einsum("cpr,cr,cqr->cpq", basis[present], eigenvalues[present], basis[present])  # H_m
        self.total = np.tensordot(self.weights, self.each, 1)  # H
        self.mean = self.weights @ self.deltas
        self.pull = np.einsum("c,cpq,cq->p", self.weights, self.each, self.deltas)  # sum_m w_m H_m delta_m
        self.largest = np.linalg.eigvalsh(self.total)[-1]

    def solve(self, beta):
        return functools.partial(np.linalg.solve, self.total + beta * np.eye(len(self.total)))

    def pinv(self, rcond=RCOND):
        return np.linalg.pinv(self.total, rcond=rcond, hermitian=True)

    def diagonal(self, beta):
        """With every H_m but its diagonal set to zero."""
        each = np.stack([np.diag(matrix) for matrix in self.each])
        pull = np.einsum("c,cp,cp->p", self.weights, each, self.deltas)
        return (pull + beta * self.mean) / (self.weights @ each + beta)


# name: (rule, its dense oracle)
RULES = {
    "mean": (aggregate.mean(), lambda d: d.mean),
    "mean_uniform": (
        aggregate.mean("uniform"),
        lambda d: np.mean(d.deltas, axis=0),
    ),
    "pinv": (
        aggregate.fipa("pinv", rcond=RCOND, limits=UNBOUNDED),
        lambda d: d.pinv() @ d.pull,
    ),
    "tikhonov": (
        aggregate.fipa("tikhonov", damping=1e-2, limits=UNBOUNDED),
        lambda d: d.solve(1e-2 * d.largest)(d.pull),
    ),
    "tikhonov_absolute": (
        aggregate.fipa("tikhonov", damping=0.3, relative=False, limits=UNBOUNDED),
        lambda d: d.solve(0.3)(d.pull),
    ),
    "damped": (
        aggregate.fipa("damped", damping=1e-2, limits=UNBOUNDED),
        lambda d: d.solve(1e-2 * d.largest)(d.pull + 1e-2 * d.largest * d.mean),
    ),
    "damped_absolute": (
        aggregate.fipa("damped", damping=0.3, relative=False, limits=UNBOUNDED),
        lambda d: d.solve(0.3)(d.pull + 0.3 * d.mean),
    ),
    "damped_zero": (
        aggregate.fipa("damped", damping=0.0, limits=UNBOUNDED),
        lambda d: d.mean + d.pinv(1e-12) @ (d.pull - d.total @ d.mean),
    ),
    "diagonal": (
        aggregate.diagonal(damping=1e-2),
        lambda d: d.diagonal(1e-2 * np.diag(d.total).max()),
    ),
    "diagonal_absolute": (
        aggregate.diagonal(damping=0.3, relative=False, weighting="uniform"),
        lambda d: Dense(*d.given, "uniform").diagonal(0.3),
    ),
}
FIPA = [name for name in RULES if not name.startswith(("mean", "diagonal"))]


def _set(field, index, value):
    """Sets entries of a client's own arrays, (delta, count, eigenvalues, basis), to what they are multiplied by."""

    def spoil(own):
        own[field][index] = value(own[field]) if callable(value) else value

    return spoil


# What may be wrong with a client: name -> (the reason it is left out for, what spoils its own arrays in place).
FAULTS = {
    "update_nan": ("update_not_finite", _set(0, -1, np.nan)),
    "update_infinite": ("update_not_finite", _set(0, -1, -np.inf)),
    "update_overflows": ("update_not_finite", _set(0, ..., 1e200)),
    "eigenvalue_nan": ("sketch_not_finite", _set(2, -1, np.nan)),
    "eigenvalue_infinite": ("sketch_not_finite", _set(2, 0, np.inf)),
    "basis_nan": ("sketch_not_finite", _set(3, (-1, 0), np.nan)),
    "eigenvalue_negative": ("curvature_negative", _set(2, -1, -9.0)),
    "basis_too_long": ("basis_not_orthonormal", _set(3, ..., lambda basis: 1.5 * basis)),
    "basis_repeats_a_column": ("basis_not_orthonormal", _set(3, (..., 1), lambda basis: basis[:, 0])),
    "examples_negative": ("examples_invalid", _set(1, ..., -3)),
}
each_fault = pytest.mark.parametrize("fault", FAULTS)
each_rule = pytest.mark.parametrize("name", RULES)
each_fipa = pytest.mark.parametrize("name", FIPA)
each_form = pytest.mark.parametrize("form", FORMS)
each_rank = pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)


def clients_of(rank, seed=0):
    """(deltas [C, P], counts [C], eigenvalues [C, R], basis [C, P, R]) of random clients."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(CLIENTS, SIZE, rank)))[0]
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, size=(CLIENTS, rank)), axis=1)
    return draw.normal(size=(CLIENTS, SIZE)), np.array([5, 1, 3, 7]), eigenvalues, basis


def as_tree(vectors):
    """The last axis [P] of an array as the parameters' tree."""
    lead = vectors.shape[:-1]
    return {"a": jnp.asarray(vectors[..., :8].reshape(*lead, 2, 4)), "b": jnp.asarray(vectors[..., 8:])}


def as_vector(tree):
    return np.concatenate([np.asarray(tree["a"]).reshape(-1), np.asarray(tree["b"])])


def uploads_of(deltas, counts, eigenvalues, basis, report=None, dtype=np.float64):
    sketch = Sketch(jnp.asarray(eigenvalues.astype(dtype)), jnp.asarray(basis.astype(dtype)), report)
    return aggregate.Uploads(as_tree(deltas.astype(dtype)), jnp.asarray(counts), sketch)


def as_sent(rule, uploads):
    """The uploads with the curvature as the rule wants it."""
    if rule.needs.curvature != "diagonal":
        return uploads
    eigenvalues, basis, _ = uploads.sketch
    return uploads._replace(sketch=Diagonal(jnp.sum(basis**2 * eigenvalues[:, None, :], axis=2)))


def apply(rule, uploads, state, params):
    """(step, state, info) of a rule: uploads are screened, those that it must not see left out, the others applied."""
    received, info = aggregate.receive(uploads, params)
    step, state, info, _ = aggregate.step_of(rule, received, state, params, info)
    return step, state, info


def shapes_of(rule, uploads, state, params):
    """What `apply` gives, by shapes alone; what does not fit shows in no time."""
    return jax.eval_shape(functools.partial(apply, rule), uploads, state, params)


def with_hyper(state, **hyper):
    """A rule's state with some of its traced numbers changed; they go by config paths such as `limits.max_step`."""
    numbers = state.hyper if isinstance(state, aggregate.FipaState) else state
    assert set(hyper) <= set(numbers), f"no such numbers: {hyper}"
    changed = numbers | {name: jnp.asarray(value, numbers[name].dtype) for name, value in hyper.items()}
    return state._replace(hyper=changed) if isinstance(state, aggregate.FipaState) else changed


PROGRAMS = {"damped_zero": "damped"}  # rules that differ from another in traced numbers alone


@functools.cache
def _compiled(name):
    return jax.jit(functools.partial(apply, RULES[name][0]))


def apply_rule(name, uploads, dtype=np.float64, **hyper):
    """The step [P] and info of a rule, its traced numbers changed as by `with_hyper`."""
    params, (rule, _) = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), LIKE), RULES[name]
    state = rule.init(params)
    state = with_hyper(state, **hyper) if hyper else state
    step, _, info = _compiled(PROGRAMS.get(name, name))(as_sent(rule, uploads), state, params)
    return as_vector(step), jax.tree.map(np.asarray, info)


def assert_close(actual, wanted, rtol=1e-9):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=rtol * np.linalg.norm(wanted))
