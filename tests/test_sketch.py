"""Sketches against dense eigendecompositions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax import sketch, trees

SIZE, RANK = 40, 5


def _matrix(spectrum):
    """A symmetric matrix [P, P] with the given leading eigenvalues, and its eigenvectors in that order."""
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]
    spectrum = np.concatenate([spectrum, np.zeros(SIZE - len(spectrum))])
    return vectors * spectrum @ vectors.T, vectors


@functools.cache
def _compiled(solver="subspace", **options):
    solve = sketch.SOLVERS[solver](RANK, **options)
    return jax.jit(lambda key, a: solve(key, lambda v: a @ v, SIZE, a.dtype))


def _solve(matrix, seed=0, **options):
    return jax.tree.map(np.asarray, _compiled(**options)(jax.random.key(seed), jnp.asarray(matrix)))


def _sine(found, true):
    """Sine of the largest angle between two subspaces given by orthonormal columns."""
    return np.linalg.norm(true - found @ (found.T @ true), 2)


GEOMETRIC = 3.0 * 0.5 ** np.arange(SIZE)


@pytest.mark.parametrize("power_steps", [1, 3])
def test_subspace_equals_dense_eigh(x64, power_steps):
    matrix, vectors = _matrix(GEOMETRIC)
    found = _solve(matrix, power_steps=power_steps)
    assert found.eigenvalues.shape == (RANK,) and found.basis.shape == (SIZE, RANK) and found.residuals.shape == (RANK,)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(RANK), atol=1e-13)
    assert np.all(np.diff(found.eigenvalues) <= 0) and found.eigenvalues[-1] > 0
    # The angle shrinks by lam_{B+1} / lam_R each power step, from a random start with a tangent of order P;
    # an eigenvalue's relative error is the square of its angle.
    angle = SIZE * (GEOMETRIC[RANK + 10] / GEOMETRIC[RANK - 1]) ** power_steps
    assert _sine(found.basis, vectors[:, :RANK]) < max(angle, 1e-13)
    np.testing.assert_allclose(found.eigenvalues, GEOMETRIC[:RANK], rtol=max(angle**2, 1e-13))
    assert np.all(found.eigenvalues <= GEOMETRIC[:RANK] * (1 + 1e-13)), "Rayleigh-Ritz values lie below the true ones"


def test_residuals_are_the_true_ones_and_bound_the_error(x64):
    spectrum = 1.0 / (1 + np.arange(SIZE))  # slow decay, few columns: a bad sketch on purpose
    matrix, _ = _matrix(spectrum)
    found = _solve(matrix, oversample=1, power_steps=1)
    true = np.linalg.norm(matrix @ found.basis - found.basis * found.eigenvalues, axis=0)
    assert np.max(true) > 1e-2, "the sketch is too good for this test"
    np.testing.assert_allclose(found.residuals * found.eigenvalues[0], true, rtol=1e-10)
    nearest = np.min(np.abs(found.eigenvalues[:, None] - spectrum[None, :]), axis=1)
    assert np.all(nearest <= true * (1 + 1e-10))


def test_lanczos_is_far_more_exact_than_subspace_iteration_for_as_many_products(x64):
    spectrum = 1.0 / (1 + np.arange(SIZE))
    matrix, vectors = _matrix(spectrum)
    # (q + 1) (R + s) products: 20 for both.
    slow = _solve(matrix, oversample=5, power_steps=1)
    found = _solve(matrix, solver="lanczos", oversample=10, power_steps=1)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(RANK), atol=1e-13)
    assert _sine(found.basis, vectors[:, :RANK]) < _sine(slow.basis, vectors[:, :RANK]) / 10
    error = lambda sketch: np.max(np.abs(sketch.eigenvalues - spectrum[:RANK]) / spectrum[:RANK])
    assert error(found) < error(slow) / 10
    whole = _solve(matrix, solver="lanczos", oversample=SIZE, power_steps=3)  # the Krylov space is the whole space
    np.testing.assert_allclose(whole.eigenvalues, spectrum[:RANK], rtol=1e-12)


@pytest.mark.parametrize("solver", sorted(sketch.SOLVERS))
@pytest.mark.parametrize("rank", [SIZE, SIZE - 1, 11])
def test_ranks_up_to_the_whole_matrix_give_as_many_pairs(x64, solver, rank):
    matrix, _ = _matrix(GEOMETRIC)
    solve = sketch.SOLVERS[solver](rank)
    found = jax.jit(lambda a: solve(jax.random.key(0), lambda v: a @ v, SIZE, a.dtype))(jnp.asarray(matrix))
    assert found.eigenvalues.shape == (rank,) and found.basis.shape == (SIZE, rank)
    np.testing.assert_allclose(found.eigenvalues, GEOMETRIC[:rank], atol=1e-12)


@pytest.mark.parametrize("solver", sorted(sketch.SOLVERS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [0, 3])
def test_pairs_beyond_the_matrix_rank_are_exactly_zero(x64, rank, dtype, solver):
    spectrum = np.array([4.0, 2.0, 1.0])[:rank]
    matrix, vectors = _matrix(spectrum)
    found = _solve(matrix.astype(dtype), solver=solver)
    assert found.eigenvalues.dtype == found.basis.dtype == found.residuals.dtype == dtype
    for field in (found.eigenvalues[rank:], found.basis[:, rank:], found.residuals[rank:]):
        np.testing.assert_array_equal(field, 0)
    tolerance = SIZE * np.finfo(dtype).eps
    np.testing.assert_allclose(found.eigenvalues[:rank], spectrum, rtol=tolerance * 4)  # lam_max / lam_min is 4
    np.testing.assert_allclose(found.basis[:, :rank].T @ found.basis[:, :rank], np.eye(rank), atol=tolerance)
    assert not rank or _sine(found.basis[:, :rank].astype(float), vectors[:, :rank]) < 4 * tolerance


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [slice(None), (3, 7)])
@pytest.mark.parametrize("solver", sorted(sketch.SOLVERS))
def test_a_product_that_is_not_finite_gives_a_sketch_that_is_not(value, where, solver):
    matrix = _matrix(GEOMETRIC)[0].astype(np.float32)
    matrix[where] = value
    found = _solve(matrix, solver=solver)
    assert not trees.is_finite(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found))[0]


def test_float32_is_near_float64(x64):
    matrix, _ = _matrix(GEOMETRIC)
    double, single = _solve(matrix), _solve(matrix.astype(np.float32))
    # A product in float32 is exact for a matrix off by at most P eps lam_max (Weyl; Davis and Kahan for the angle).
    off = SIZE * np.finfo(np.float32).eps * GEOMETRIC[0]
    np.testing.assert_allclose(single.eigenvalues, double.eigenvalues, rtol=0, atol=off)
    gap = GEOMETRIC[RANK - 1] - GEOMETRIC[RANK]
    assert _sine(single.basis.astype(float), double.basis) < 2 * off / gap


def test_the_key_draws_the_start_and_nothing_else(x64):
    matrix, _ = _matrix(GEOMETRIC)
    one, same, other = _solve(matrix), _solve(matrix), _solve(matrix, seed=1)
    np.testing.assert_array_equal(one.basis, same.basis)
    assert not np.array_equal(one.basis, other.basis)
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-8)


@pytest.mark.parametrize("jacobian", ["matrix_free", "rows"])
def test_make_sketch_sees_the_gauss_newton_matrix_of_the_examples_there(x64, jacobian):
    draw = np.random.default_rng(1)
    params = {"w": jnp.asarray(draw.normal(size=(4, 3))), "b": jnp.asarray(draw.normal(size=3))}
    batch = {"x": jnp.asarray(draw.normal(size=(6, 4))), "label": jnp.asarray(draw.integers(3, size=6))}
    mask = jnp.arange(6) < 4
    outputs = lambda p, b: b["x"] @ p["w"] + p["b"][None]
    loss = lambda out, b: optax.softmax_cross_entropy_with_integer_labels(out, b["label"])
    # The model is linear in its parameters, so that the loss's own Hessian is its Gauss-Newton matrix.
    flat, unravel = ravel_pytree(params)
    dense = jax.hessian(lambda v: jnp.sum(jnp.where(mask, loss(outputs(unravel(v), batch), batch), 0)) / 4)(flat)
    values, vectors = np.linalg.eigh(np.asarray(dense))
    make = lambda rank: sketch.make_sketch(outputs, loss, rank=rank, jacobian=jacobian, micro_batch=4)
    found = jax.jit(make(6))(jax.random.key(0), params, batch, mask)
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:6], rtol=1e-10)
    assert _sine(np.asarray(found.basis), vectors[:, ::-1][:, :6]) < 1e-7
    full = jax.jit(make(flat.size))(jax.random.key(0), params, batch, mask)
    np.testing.assert_allclose(full.basis * full.eigenvalues[None] @ full.basis.T, dense, atol=1e-12)
    with pytest.raises(ValueError, match=rf"sketch\.rank: {flat.size + 1} is above .* {flat.size}"):
        make(flat.size + 1)(jax.random.key(0), params, batch, mask)


def test_wrong_choices_name_the_field():
    with pytest.raises(ValueError, match=r"sketch\.rank: needs at least 1, got 0"):
        sketch.subspace(0)
    with pytest.raises(ValueError, match=r"sketch\.solver: unknown solver 'lanczo'; known: .*subspace"):
        sketch.make_sketch(None, None, rank=1, solver="lanczo")
