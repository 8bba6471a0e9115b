"""Eigenpairs from products alone, against dense eigendecompositions; one table of solvers x properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.curvature import eigenpairs as eigen
from fipa_jax.curvature import overlooked
from fipa_jax.curvature.products import Curvature

SIZE, RANK = 40, 5
# name: (solver, rows M of the factor A [M, P] that the matrix holds; 0 for products alone)
SOLVERS = {
    "subspace": ("subspace", 0),
    "lanczos": ("lanczos", 0),
    "lanczos_with_rows": ("lanczos", 60),
    "exact": ("exact", 30),
    "exact_with_few_parameters": ("exact", 60),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)
WITHOUT_ROWS = [name for name in SOLVERS if name != "lanczos_with_rows"]  # which is lanczos in wider blocks
iterative = pytest.mark.parametrize("name", ["subspace", "lanczos"])
GEOMETRIC = 3.0 * 0.5 ** np.arange(SIZE)
SLOW = 1.0 / (1 + np.arange(SIZE))
EPS = np.finfo(np.float32).eps
MULTIPLIED = []  # columns, by each product with a matrix


def _orthonormal(rows, columns, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def _matrix(spectrum):
    """A symmetric matrix [P, P] with the given leading eigenvalues, and its eigenvectors in that order."""
    vectors = _orthonormal(SIZE, SIZE)
    spectrum = np.concatenate([spectrum, np.zeros(SIZE - len(spectrum))])
    return vectors * spectrum @ vectors.T, vectors


def _factor(spectrum, num_rows):
    """Rows A [M, P] with A^T A the matrix above, but for the eigenvalues beyond M."""
    number = min(len(spectrum), num_rows, SIZE)
    return _orthonormal(num_rows, number, 1) * np.sqrt(spectrum[:number]) @ _matrix(spectrum)[1][:, :number].T


@functools.cache
def _compiled(solver, rank, holds_rows, **options):
    """Jitted (key, matrix or rows, start, tolerance) -> Eigenpairs; one program for all tolerances."""

    def run(key, a, start, tolerance):
        traced = {"tolerance": tolerance} if solver == "lanczos" else {}
        solve = eigen.SOLVERS[solver](rank, **options, **traced)
        if holds_rows:
            return solve(key, Curvature(lambda v: a.T @ (a @ v), a.shape[1], a.dtype, rows=a), start)

        def product(v):
            jax.debug.callback(lambda: MULTIPLIED.append(v.shape[1]))
            return a @ v

        return solve(key, Curvature(product, a.shape[1], a.dtype), start)

    return jax.jit(run)


def _solve(name, matrix, seed=0, rank=RANK, start=None, tolerance=0.0, **options):
    """Of a matrix [P, P], or of its rows for the solvers that want them."""
    solver, num_rows = SOLVERS[name]
    run = _compiled(solver, rank, num_rows > 0, **options)
    start = None if start is None else jnp.asarray(start)
    return jax.tree.map(np.asarray, run(jax.random.key(seed), jnp.asarray(matrix), start, tolerance))


def _given(name, spectrum):
    """What `_solve` takes: the matrix or its rows."""
    num_rows = SOLVERS[name][1]
    return _factor(spectrum, num_rows) if num_rows else _matrix(spectrum)[0]


def _full(name, given):
    return given.T @ given if SOLVERS[name][1] else given


def _sine(found, true):
    """Sine of the largest angle between two subspaces given by orthonormal columns."""
    return np.linalg.norm(true - found @ (found.T @ true), 2)


@each_solver
def test_eigenpairs_equal_dense_eigh(x64, name):
    given, vectors = _given(name, GEOMETRIC), _matrix(GEOMETRIC)[1]
    found = _solve(name, given)
    assert [field.shape for field in found[:4]] == [(RANK,), (SIZE, RANK), (SIZE, RANK), (RANK,)]
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(RANK), atol=1e-13)
    assert np.all(np.diff(found.eigenvalues) <= 0) and found.eigenvalues[-1] > 0
    # The angle shrinks by lam_{B+1} / lam_R each power step, from a random start with a tangent of order P, and in a
    # Krylov space faster; an eigenvalue's relative error is the square of its angle.
    powers = {"subspace": 2, "lanczos": 2, "lanczos_with_rows": 1}.get(name)  # with rows, two blocks of 16 fill P
    angle = SIZE * (GEOMETRIC[RANK + 10] / GEOMETRIC[RANK - 1]) ** powers if powers else 1e-11
    assert _sine(found.vectors, vectors[:, :RANK]) < angle
    np.testing.assert_allclose(found.eigenvalues, GEOMETRIC[:RANK], rtol=max(angle**2, 1e-13))
    assert np.all(found.eigenvalues <= GEOMETRIC[:RANK] * (1 + 1e-13)), "Rayleigh-Ritz values lie below the true ones"
    assert not (found.not_finite or found.asymmetric or found.indefinite)


@each_solver
def test_images_and_residuals_are_the_true_ones_and_bound_the_error(x64, name):
    solver, _ = SOLVERS[name]
    given = _given(name, SLOW)
    # Sketches that are bad on purpose: few products, or any residual allowed.
    options = {"subspace": {"oversample": 1, "power_steps": 1}, "lanczos": {"tolerance": np.inf}, "exact": {}}
    found, matrix = _solve(name, given, **options[solver]), _full(name, given)
    np.testing.assert_allclose(found.images, matrix @ found.vectors, atol=1e-13)
    true = np.linalg.norm(matrix @ found.vectors - found.vectors * found.eigenvalues, axis=0)
    assert np.max(true) > 1e-2 or solver == "exact", "the sketch is too good for this test"
    np.testing.assert_allclose(found.residuals * found.eigenvalues[0], true, rtol=1e-10, atol=1e-14)
    nearest = np.min(np.abs(found.eigenvalues[:, None] - SLOW[None, :]), axis=1)
    assert np.all(nearest <= true * (1 + 1e-10) + 1e-14)


def test_lanczos_is_far_more_exact_than_subspace_iteration_for_as_many_products(x64):
    matrix, vectors = _matrix(SLOW)
    # (q + 1) (R + s) products and (q + 1) R + s: 25 or 26 for both.
    slow = _solve("subspace", matrix, oversample=8, power_steps=1)
    found = _solve("lanczos", matrix)
    assert found.products == slow.products == 26
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(RANK), atol=1e-13)
    assert _sine(found.vectors, vectors[:, :RANK]) < _sine(slow.vectors, vectors[:, :RANK]) / 10
    error = lambda pairs: np.max(np.abs(pairs.eigenvalues - SLOW[:RANK]) / SLOW[:RANK])
    assert error(found) < error(slow) / 10


@pytest.mark.parametrize(("name", "rank"), [("subspace", SIZE), ("lanczos", SIZE), ("lanczos", 11), ("exact", SIZE)])
def test_ranks_up_to_the_whole_matrix_give_as_many_pairs(x64, name, rank):
    """Those beyond the 30 rows of `exact` are zero."""
    found = _solve(name, _given(name, GEOMETRIC), rank=rank)
    assert found.eigenvalues.shape == (rank,) and found.vectors.shape == (SIZE, rank)
    there = np.arange(rank) < (30 if name == "exact" else SIZE)
    np.testing.assert_allclose(found.eigenvalues, GEOMETRIC[:rank] * there, atol=1e-12)
    kept = np.diag((found.eigenvalues > 0).astype(float))
    np.testing.assert_allclose(found.vectors.T @ found.vectors, kept, atol=1e-12)


@pytest.mark.parametrize("name", WITHOUT_ROWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [0, 3])
def test_pairs_beyond_the_matrix_rank_are_exactly_zero_and_nothing_is_flagged(x64, rank, dtype, name):
    spectrum = np.array([4.0, 2.0, 1.0])[:rank]
    found, (_, vectors) = _solve(name, _given(name, spectrum).astype(dtype)), _matrix(spectrum)
    assert {field.dtype for field in found[:4]} == {np.dtype(dtype)}
    for field in (found.eigenvalues[rank:], found.vectors[:, rank:], found.images[:, rank:], found.residuals[rank:]):
        np.testing.assert_array_equal(field, 0)
    tolerance = SIZE * np.finfo(dtype).eps
    np.testing.assert_allclose(found.eigenvalues[:rank], spectrum, rtol=tolerance * 4)  # lam_max / lam_min is 4
    np.testing.assert_allclose(found.vectors[:, :rank].T @ found.vectors[:, :rank], np.eye(rank), atol=tolerance)
    assert not rank or _sine(found.vectors[:, :rank].astype(float), vectors[:, :rank]) < 4 * tolerance
    assert not (found.not_finite or found.asymmetric or found.indefinite)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [slice(None), (3, 7)])
@each_solver
def test_a_product_that_is_not_finite_gives_zero_pairs_and_a_flag(x64, value, where, name):
    given = _given(name, GEOMETRIC)
    given[where] = value
    found = _solve(name, given)
    assert found.not_finite and not found.indefinite and not found.asymmetric
    for field in found[:4]:
        np.testing.assert_array_equal(field, 0)


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_float32_is_near_float64(x64, name):
    given, vectors = _given(name, GEOMETRIC), _matrix(GEOMETRIC)[1]
    single = _solve(name, given.astype(np.float32))
    # A product in float32 is exact for a matrix off by at most P eps lam_max (Weyl; Davis and Kahan for the angle).
    off = SIZE * EPS * GEOMETRIC[0]
    np.testing.assert_allclose(single.eigenvalues, GEOMETRIC[:RANK], rtol=0, atol=off)
    gap = GEOMETRIC[RANK - 1] - GEOMETRIC[RANK]
    assert _sine(single.vectors.astype(float), vectors[:, :RANK]) < 2 * off / gap
    assert not (single.not_finite or single.asymmetric or single.indefinite)


@pytest.mark.parametrize("name", ["exact", "exact_with_few_parameters"])
def test_exact_finds_small_eigenvalues_in_float32_that_the_gram_matrix_alone_blurs(x64, name):
    spectrum, num_rows = np.r_[np.geomspace(1, 1e-5, RANK), np.full(20, 1e-6)], SOLVERS[name][1]
    errors = []
    for seed in range(4):
        rows = _orthonormal(num_rows, 25, seed) * np.sqrt(spectrum) @ _orthonormal(SIZE, 25, seed + 4).T
        rows = rows.astype(np.float32)
        true = np.linalg.svd(rows.astype(float))[1][RANK - 1] ** 2
        ways = _solve(name, rows).eigenvalues[-1], np.linalg.eigvalsh(rows @ rows.T)[-RANK]
        errors.append([abs(way - true) / true for way in ways])
    found, gram = np.max(errors, axis=0)
    # eps sqrt(lam_max / lam) from the factor, eps lam_max / lam from its Gram matrix.
    assert found < EPS * np.sqrt(1e5)
    assert found < gram / 10


@iterative
def test_the_key_draws_the_start_and_nothing_else(x64, name):
    matrix, _ = _matrix(GEOMETRIC)
    one, same, other = _solve(name, matrix), _solve(name, matrix), _solve(name, matrix, seed=1)
    np.testing.assert_array_equal(one.vectors, same.vectors)
    assert not np.array_equal(one.vectors, other.vectors)
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-8)


def test_lanczos_stops_as_soon_as_its_residuals_allow(x64):
    """Where it stops before it has used up its products they do, and they are true."""
    matrix, _ = _matrix(GEOMETRIC)
    most, products = 26, []  # (q + 1) R + s, in blocks of two columns
    for tolerance in (0.0, 1e-6, np.inf):
        found = _solve("lanczos", matrix, tolerance=tolerance)
        assert np.all(found.residuals <= tolerance) or found.products == most
        true = np.linalg.norm(matrix @ found.vectors - found.vectors * found.eigenvalues, axis=0)
        np.testing.assert_allclose(found.residuals * found.eigenvalues[0], true, rtol=1e-6, atol=1e-13)
        products.append(int(found.products))
    # The first look is at 2 R columns; where it is enough, what follows asks whether a vector was overlooked.
    assert products[0] == most > products[1] > products[2]
    assert 12 < products[2] <= 12 + overlooked.WIDTH * overlooked.DEPTH


def test_a_warm_start_saves_products(x64):
    """The true basis is recognised by R products and a fresh block's; a nearby one is not taken for the true one."""
    (matrix, vectors), tolerance = _matrix(GEOMETRIC), 1e-7
    cold = _solve("lanczos", matrix, tolerance=tolerance)
    true = _solve("lanczos", matrix, tolerance=tolerance, start=vectors[:, :RANK])
    assert true.converged and RANK < true.products <= RANK + overlooked.WIDTH * overlooked.DEPTH
    np.testing.assert_allclose(true.eigenvalues, GEOMETRIC[:RANK], rtol=1e-12)
    nearby = vectors[:, :RANK] + 1e-6 * np.random.default_rng(3).normal(size=(SIZE, RANK))
    found = _solve("lanczos", matrix, tolerance=tolerance, start=nearby)
    assert RANK < found.products < cold.products
    np.testing.assert_allclose(found.eigenvalues, GEOMETRIC[:RANK], rtol=1e-12)
    # Columns of a start that are zero, such as the surplus pairs of the last sketch, are drawn anew.
    partial = _solve("lanczos", matrix, start=vectors[:, :RANK] * (np.arange(RANK) < 3))
    np.testing.assert_allclose(partial.eigenvalues, GEOMETRIC[:RANK], rtol=1e-9)


def test_subspace_iteration_too_begins_from_the_start(x64):
    matrix, vectors = _matrix(SLOW)
    options = {"oversample": 1, "power_steps": 1}
    cold = _solve("subspace", matrix, **options)
    warm = _solve("subspace", matrix, **options, start=vectors[:, :RANK])
    assert np.max(warm.residuals) < 1e-12 < 1e-2 < np.max(cold.residuals)


@iterative
def test_products_counts_the_columns_that_are_multiplied(x64, name):
    """On the way that is taken at run time: for a matrix that lets lanczos stop early, and for one that does not."""
    found = []
    for spectrum in (GEOMETRIC**2, SLOW):
        jax.effects_barrier()
        MULTIPLIED.clear()
        found.append(_solve(name, _matrix(spectrum)[0], tolerance=eigen.TOLERANCE).products)
        jax.effects_barrier()
        assert sum(MULTIPLIED) == found[-1]
    assert (found[0] < found[1]) == (name == "lanczos")


def test_exact_counts_the_columns_of_its_clean_up_and_of_its_residuals(x64):
    found = _solve("exact", _given("exact", GEOMETRIC))
    assert found.products == (RANK + 10) + RANK


@iterative
def test_products_that_are_not_those_of_a_symmetric_matrix_are_flagged(x64, name):
    matrix, vectors = _matrix(SLOW)
    skew = 1e-3 * (vectors[:, :1] * vectors[:, 1] - vectors[:, 1:2] * vectors[:, 0])
    found = _solve(name, matrix + skew)
    assert found.asymmetric and not found.not_finite and not found.indefinite


@iterative
@pytest.mark.parametrize("signs", [[1, 1, -1, 1, 1, 1], [-1] * 6], ids=["one", "all"])
def test_negative_eigenvalues_are_flagged_and_left_out(x64, name, signs):
    spectrum = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.5]) * signs
    found = _solve(name, _matrix(spectrum)[0])
    assert found.indefinite and not found.asymmetric
    positive = spectrum[spectrum > 0][:RANK]
    np.testing.assert_allclose(found.eigenvalues, np.r_[positive, np.zeros(RANK - len(positive))], atol=1e-9)


def test_exact_hands_on_that_the_rows_leave_something_out():
    rows = jnp.asarray(_given("exact", GEOMETRIC), jnp.float32)
    solve = jax.jit(lambda flag: eigen.exact(RANK)(None, Curvature(None, SIZE, rows.dtype, rows, indefinite=flag)))
    assert [bool(solve(jnp.array(flag)).indefinite) for flag in (False, True)] == [False, True]


def test_a_batch_of_matrices_gives_each_its_own_pairs(x64):
    """Although they stop at different times."""
    matrices = np.stack([_matrix(spectrum)[0] for spectrum in (GEOMETRIC**2, SLOW)])
    keys = jax.random.split(jax.random.key(0), 2)
    solve = lambda key, a: eigen.lanczos(RANK)(key, Curvature(lambda v: a @ v, SIZE, a.dtype))
    found = jax.jit(jax.vmap(solve))(keys, jnp.asarray(matrices))
    for m in range(2):
        run = _compiled("lanczos", RANK, False)
        alone = run(keys[m], jnp.asarray(matrices[m]), None, eigen.TOLERANCE)
        assert found.products[m] == alone.products
        np.testing.assert_allclose(found.eigenvalues[m], alone.eigenvalues, rtol=1e-10)
    assert found.products[0] < found.products[1]


@each_solver
def test_what_does_not_fit_is_named(name):
    solver, num_rows = SOLVERS[name]
    rows = jnp.zeros([num_rows, SIZE])
    matrix = Curvature(lambda v: v, SIZE, rows.dtype, rows)
    with pytest.raises(ValueError, match=r"sketch\.rank: needs a whole number of at least 1, got 0"):
        eigen.SOLVERS[solver](0)
    with pytest.raises(ValueError, match=r"sketch\.rank: 41 is above the number of trainable parameters, 40; lower it"):
        eigen.SOLVERS[solver](SIZE + 1)(None, matrix)
    with pytest.raises(ValueError, match=r"start: needed a basis of shape \(40, 5\), got \(40, 4\)"):
        eigen.SOLVERS[solver](RANK)(None, matrix, jnp.zeros([SIZE, RANK - 1]))
    if solver == "exact":
        with pytest.raises(ValueError, match=r"exact solver needs the matrix's rows"):
            eigen.exact(RANK)(None, matrix._replace(rows=None))
