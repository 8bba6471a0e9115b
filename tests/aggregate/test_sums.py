"""FIPA from sums beside dense float64 matrices: both forms, the basis, past rounds, the trust region, a row of sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from fipa_jax import aggregate
from fipa_jax.aggregate import sums as sums_lib
from fipa_jax.aggregate.sums import SumOptions, row_of, sum_solver
from fipa_jax.curvature import Image

CLIENTS, SIZE, COLUMNS = 4, 12, 5
BETA = 0.3


class Dense:
    """A round's clients as dense matrices: curvature of rank 4 each, of which the basis sees a part."""

    def __init__(self, seed=0, rank=4):
        draw = np.random.default_rng(seed)
        roots = draw.normal(size=(CLIENTS, SIZE, rank))
        self.counts = draw.integers(1, 9, CLIENTS).astype(float)
        self.weights = self.counts / self.counts.sum()
        self.each = roots @ roots.transpose(0, 2, 1)
        self.deltas = draw.normal(size=(CLIENTS, SIZE))
        self.losses = draw.uniform(1, 2, CLIENTS)
        self.total = np.tensordot(self.weights, self.each, 1)
        self.mean = self.weights @ self.deltas
        self.pull = np.einsum("c,cpq,cq->p", self.weights, self.each, self.deltas)

    def nystrom(self, basis):
        image = self.total @ basis
        return image @ np.linalg.pinv(basis.T @ image, hermitian=True) @ image.T

    def uploads(self, basis, **fields):
        images = jnp.asarray(self.each @ np.asarray(basis))
        return aggregate.Uploads(jnp.asarray(self.deltas), jnp.asarray(self.counts), Image(images), **fields)

    def row(self, basis):
        """The sums over all clients."""
        return _sums_of(self.counts, self.each @ basis, self.deltas, self.losses)


@jax.jit
def _sums_of(*clients):
    return jax.tree.map(lambda part: jnp.sum(part, axis=0), jax.vmap(row_of)(*clients))


def _solve(beta, matrix, vector):
    return np.linalg.solve(matrix + beta * np.eye(len(matrix)), vector)


@functools.cache
def _program(rule, wide=True):
    def serve(state, uploads):
        params = jnp.zeros(SIZE)
        received, info = aggregate.receive(uploads, params)
        return aggregate.step_of(rule, received, state, params, info)[:3]

    return jax.jit(lambda: rule.init(jnp.zeros(SIZE)))(), jax.jit(serve)


def _apply(rule, dense, state=None):
    """(step, state, info) of a round."""
    first, serve = _program(rule, jax.config.jax_enable_x64)
    state = first if state is None else state
    return serve(state, dense.uploads(rule.asks(state)[0]))


@functools.cache
def _made(form, fields, **options):
    return aggregate.from_sums(sums=SumOptions(form, **dict(fields)), damping=BETA, relative=False, **options)


def _rule(form, **options):
    fields = {"columns": COLUMNS, "fresh": 1} | options.pop("sums", {})
    return _made(form, tuple(fields.items()), **options)


def test_the_galerkin_step_is_the_best_in_the_mean_and_the_basis(x64):
    """The minimum over dbar + span(Q) of the damped rule's quadratic, by a dense projection of its whole matrix."""
    dense, rule = Dense(), _rule("galerkin")
    basis = np.asarray(_program(rule)[0].basis)
    step, _, info = _apply(rule, dense)
    right = dense.pull + BETA * dense.mean
    within = _solve(
        BETA, basis.T @ dense.total @ basis, basis.T @ (right - dense.total @ dense.mean - BETA * dense.mean)
    )
    np.testing.assert_allclose(step, dense.mean + basis @ within, atol=1e-9)
    exact = _solve(BETA, dense.total, right)
    error = lambda x: (x - exact) @ (dense.total + BETA * np.eye(SIZE)) @ (x - exact)
    assert error(np.asarray(step)) < error(dense.mean)
    assert set(info) > set(sums_lib.INFO_OF_SUMS) - {"gain", "undone", "past_share"}


def test_the_gradient_step_is_that_of_the_nystrom_matrix(x64):
    dense, rule = Dense(), _rule("gradient")
    basis = np.asarray(_program(rule)[0].basis)
    step, _, info = _apply(rule, dense)
    seen = dense.nystrom(basis)
    eigenvalues = np.linalg.eigvalsh(seen)[::-1][:COLUMNS]
    np.testing.assert_allclose(info["spectrum"], eigenvalues, rtol=1e-7, atol=1e-9)
    beta = max(BETA, eigenvalues[-1])  # what the basis misses must be below it, where nobody looks at the losses
    np.testing.assert_allclose(info["damping"], beta, rtol=1e-7)
    np.testing.assert_allclose(step, _solve(beta, seen, dense.mean), atol=1e-7)
    np.testing.assert_allclose(info["tail"], eigenvalues[-1] / beta, rtol=1e-7)


@pytest.mark.parametrize("form", ["galerkin", "gradient"])
def test_a_whole_basis_gives_the_damped_rule_and_newtons_step(x64, form):
    dense, rule = Dense(), _rule(form, sums={"columns": SIZE, "fresh": 0})
    step, *_ = _apply(rule, dense)
    wanted = {"galerkin": dense.pull + BETA * dense.mean, "gradient": dense.mean}[form]
    np.testing.assert_allclose(step, _solve(BETA, dense.total, wanted), atol=1e-7)


@pytest.mark.slow
def test_from_the_last_sum_the_basis_turns_to_the_top_eigenvectors(x64):
    dense, rule = Dense(), _rule("galerkin", sums={"columns": COLUMNS, "fresh": 1})
    state = None
    for _ in range(30):
        _, state, info = _apply(rule, dense, state=state)
    basis = np.asarray(state.basis)
    np.testing.assert_allclose(basis.T @ basis, np.eye(COLUMNS), atol=1e-10)
    top = np.linalg.eigvalsh(dense.total)[::-1][: COLUMNS - 1]
    np.testing.assert_allclose(info["spectrum"][: COLUMNS - 1], top, rtol=1e-2)
    drawn = _rule("galerkin", sums={"basis": "seed"})
    state = _apply(drawn, dense)[1]
    again = _apply(drawn, Dense(seed=1))[1]
    np.testing.assert_array_equal(state.basis, again.basis)  # whatever the clients send


@pytest.mark.slow
def test_columns_come_and_go_by_the_tail(x64):
    """All are in use while the least eigenvalue counts beside beta; of curvature of rank 2 stay 2 and the fresh one."""
    low = Dense()
    low.each[:] = np.diag([9.0, 4.0] + [0.0] * (SIZE - 2))
    rule = _rule("galerkin", sums={"tail": 0.1, "columns": 8})
    _, state, info = _apply(rule, low)
    assert info["columns"] == 8 and state.active == 3
    assert np.count_nonzero(np.any(np.asarray(state.basis) != 0, axis=0)) == 3
    _, state, _ = _apply(rule, Dense(rank=12), state=state)
    assert state.active == 6  # all three are above the tail: twice as many
    np.testing.assert_allclose(state.basis.T @ state.basis, np.diag([1.0] * 6 + [0] * 2), atol=1e-12)


def test_a_decayed_sum_resists_as_a_client_whose_update_is_zero(x64):
    first, second = Dense(0), Dense(1)
    rule = _rule("galerkin", sums={"columns": SIZE, "fresh": 0}, past=aggregate.PastRounds("prior", decay=0.5))
    step, state, told = _apply(rule, first)
    np.testing.assert_allclose(step, 0.5 * _solve(BETA, first.total, first.pull + BETA * first.mean), atol=1e-7)
    np.testing.assert_allclose(told["fedavg_norm_ratio"], np.linalg.norm(step) / np.linalg.norm(first.mean), rtol=1e-7)
    step, _, info = _apply(rule, second, state=state)
    past, now = 0.5 * first.counts.sum(), second.counts.sum()  # the first round's counts alone
    matrix = (past * first.total + now * second.total) / (past + now)
    wanted = now / (past + now) * (second.pull + BETA * second.mean)
    np.testing.assert_allclose(step, _solve(BETA, matrix, wanted), atol=1e-6)
    np.testing.assert_allclose(info["past_share"], past / (past + now), rtol=1e-12)


def test_the_trust_region_takes_back_a_step_that_raised_the_sum_of_the_losses(x64):
    dense = Dense()
    solver = sum_solver(SumOptions("gradient", columns=COLUMNS, fresh=1), damping=BETA, relative=False, trust=True)
    start = state = solver.init(jnp.zeros(SIZE))
    solve = jax.jit(solver.solve)
    first, state, _ = solve(dense.row(state.basis), state)
    loss = dense.weights @ dense.losses
    dense.losses += 1.0
    back, after, info = solve(dense.row(state.basis), state)
    np.testing.assert_allclose(back, -first, rtol=1e-12)
    assert info["undone"] and after.hyper["damping"] == 2 * BETA
    dense.losses -= 1.0 + float(state.trust.predicted)  # as promised
    _, after, info = solve(dense.row(state.basis), state)
    np.testing.assert_allclose(info["gain"], 1, rtol=1e-9)
    seen = dense.nystrom(np.asarray(start.basis))
    np.testing.assert_allclose(state.trust.predicted, dense.mean @ first - first @ seen @ first / 2, rtol=1e-7)
    np.testing.assert_allclose(state.trust.loss, loss, rtol=1e-12)


@pytest.mark.slow
def test_a_bound_on_the_divergence_shortens_the_step(x64):
    dense = Dense()
    free, _, info = _apply(_rule("galerkin"), dense)
    most = float(info["divergence"]) / 4
    step, _, info = _apply(_rule("galerkin", limits=aggregate.Limits(0, most, 0, 0)), dense)
    np.testing.assert_allclose(step, free / 2, rtol=1e-9)
    np.testing.assert_allclose(info["divergence"], most, rtol=1e-9)


@pytest.mark.slow
def test_float32_is_as_near_as_its_rounding_allows():
    dense = Dense()
    for form in ("galerkin", "gradient"):
        rule = _rule(form, sums={"columns": SIZE, "fresh": 0})
        step, *_ = _apply(rule, dense)
        wanted = {"galerkin": dense.pull + BETA * dense.mean, "gradient": dense.mean}[form]
        exact = _solve(BETA, dense.total, wanted)
        assert np.linalg.norm(step - exact) < 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["image", "update", "weight", "loss"])
def test_a_row_that_is_not_finite_is_refused_at_the_client(x64, field, bad):
    given = {"weight": 2.0, "image": jnp.ones((SIZE, 2)), "update": jnp.ones(SIZE), "loss": 1.0}
    value = np.asarray(given[field], float).copy()
    value[(0,) * value.ndim] = bad
    row = jax.jit(row_of)(*(given | {field: jnp.asarray(value)}).values())
    assert all(not np.any(part) for part in jax.tree.leaves(row))
    assert jax.jit(row_of)(*given.values()).clients == 1


@pytest.mark.parametrize("field", ["image", "update", "weight", "loss"])
def test_a_row_that_would_overflow_the_sum_is_refused_at_the_client(field):
    """Finite, but not times 1000; or so large that the sum of two is not, or the square of one."""
    given = {"weight": 1000.0, "image": jnp.ones((SIZE, 2)), "update": jnp.ones(SIZE), "loss": 1.0}
    for large in (1e36, 3e38, 1e22):
        value = np.asarray(given[field], np.float32).copy()
        value[(0,) * value.ndim] = large
        with_large = given | {field: jnp.asarray(value)}
        rows = [jax.jit(row_of)(*each.values()) for each in (with_large, given)]
        total = jax.tree.map(jnp.add, *rows)
        jax.tree.map(np.testing.assert_array_equal, total, rows[1])
    value[(0,) * value.ndim] = 1e12
    row = jax.jit(row_of)(*(given | {field: jnp.asarray(value)}).values())
    assert row.clients == 1, "large, and no harm to a sum"


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("form", ["galerkin", "gradient"])
def test_of_half_precision_the_state_is_in_float32(form, dtype):
    options = {"damping": BETA, "relative": False, "trust": form == "gradient"}
    solver = sum_solver(SumOptions(form, columns=COLUMNS, fresh=1), **options)
    state, wanted = (solver.init(jnp.zeros(SIZE, kind)) for kind in (dtype, jnp.float32))
    for part, value in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert part.dtype == value.dtype
        np.testing.assert_array_equal(part, value)
    with pytest.raises(ValueError, match="theta: needed floating-point arrays, got int32"):
        solver.init(jnp.zeros(SIZE, jnp.int32))


def test_a_total_of_other_columns_than_the_basis_is_refused():
    rule, params = _rule("galerkin"), jnp.zeros(SIZE)
    state, dense = rule.init(params), Dense()
    uploads = dense.uploads(np.eye(SIZE, COLUMNS - 1))
    words = rf"uploads\.sketch: needed images \[C, P, s\] with s = {COLUMNS}, all columns of `asks`, got \[4, 12, 4\]"
    with pytest.raises(ValueError, match=words):
        aggregate.step_of(rule, aggregate.receive(uploads, params)[0], state, params, {})
    solver = sum_solver(SumOptions(columns=COLUMNS, fresh=1))
    row = row_of(5.0, jnp.ones((SIZE, COLUMNS - 1)), jnp.ones(SIZE))
    with pytest.raises(ValueError, match=r"total\.image: needed shape \(12, 5\), that of the state's basis, got"):
        solver.solve(row, solver.init(params))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_row_counts_in_float32_whatever_the_updates_precision(dtype):
    """float16 has no 70001."""
    draw = np.random.default_rng(0)
    image, update = (jnp.asarray(draw.normal(size=shape), dtype) for shape in ((SIZE, 2), (SIZE,)))
    row, (wide, long) = row_of(70001, image, update, 0.5), (np.asarray(x, float) for x in (image, update))
    wanted = 70001, 1, 70001 * wide, 70001 * long, 70001 * wide.T @ long, 70001 * 0.5
    for part, value in zip(row, wanted, strict=True):
        assert part.dtype == jnp.float32
        np.testing.assert_allclose(part, value, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("image", "update", "words"),
    [
        (jnp.ones((SIZE, 2)), jnp.ones((SIZE, 1)), r"update: needed shape \[P\].*got \(12, 1\) and \(12, 2\)"),
        (jnp.ones((SIZE - 1, 2)), jnp.ones(SIZE), r"update: needed shape \[P\]"),
        (jnp.ones(SIZE), jnp.ones(SIZE), r"update: needed shape \[P\]"),
        (jnp.ones((SIZE, 2)), jnp.ones(SIZE, int), "update: needed floating-point arrays, got int"),
        (jnp.ones((SIZE, 2), int), jnp.ones(SIZE), "image: needed floating-point arrays, got int"),
    ],
)
def test_a_row_of_arrays_that_do_not_fit_is_refused(image, update, words):
    with pytest.raises(ValueError, match=words):
        row_of(5.0, image, update)


def test_one_row_of_sums_under_psum_is_the_sum_on_the_server(x64):
    """Each device holds some clients, adds up their rows, and the total is the same."""
    dense, mesh = Dense(), jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    solver = sum_solver(SumOptions(columns=COLUMNS, fresh=1), damping=BETA, relative=False)
    state = solver.init(jnp.zeros(SIZE))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec()
    )
    def round_of(state, clients):
        rows = jax.vmap(row_of)(*clients)
        total = jax.tree.map(lambda part: jax.lax.psum(jnp.sum(part, axis=0), "d"), rows)
        return solver.solve(total, state)[0]

    clients = dense.counts, dense.each @ state.basis, dense.deltas, dense.losses
    step = jax.jit(round_of)(state, clients)
    np.testing.assert_allclose(step, solver.solve(dense.row(state.basis), state)[0], atol=1e-10)


def test_a_round_without_clients_changes_nothing(x64):
    dense, rule = Dense(), _rule("galerkin", past=aggregate.PastRounds("prior"))
    dense.counts[:] = 0
    state = _program(rule)[0]
    step, after, _ = _apply(rule, dense, state=state)
    assert not np.any(step)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limits": aggregate.Limits()}, r"limits\.max_step: a sum shows no single client.*limits\.trace_cap = 0"),
        ({"past": aggregate.PastRounds("latest", num_clients=3)}, r"past\.kind: 'latest' keeps messages of single"),
        ({"past": aggregate.PastRounds("targets")}, r"past\.kind: 'targets'"),
        ({"past": aggregate.PastRounds("prior", decay=1.5)}, r"past\.decay: needs a number in \[0, 1\)"),
        ({"past": aggregate.PastRounds("prior", adaptive=True)}, r"past\.adaptive: .*not for 'sums'"),
        ({"own_damping": True}, r"own_damping: a sum does not show"),
        ({"late": aggregate.LateUpdates(max_drift=1.0)}, r"late\.max_drift"),
        ({"trust": True}, r"aggregator\.trust: .*sums\.form = 'gradient'"),
        ({"sums": SumOptions("nystrom")}, r"aggregator\.sums\.form: unknown 'nystrom'"),
        ({"sums": SumOptions(columns=3, fresh=4)}, r"aggregator\.sums\.columns"),
        ({"sums": SumOptions(bits=40)}, r"aggregator\.sums\.bits: needs 0"),
    ],
)
def test_what_a_sum_cannot_serve_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        aggregate.from_sums(**options)


def test_uploads_that_do_not_fit_are_refused():
    rule, params = _rule("galerkin"), jnp.zeros(SIZE)
    state, dense = rule.init(params), Dense()
    uploads = dense.uploads(np.eye(SIZE, COLUMNS))
    with pytest.raises(ValueError, match="an Image of values"):
        aggregate.step_of(rule, aggregate.receive(uploads._replace(sketch=None), params)[0], state, params, {})
    with pytest.raises(ValueError, match=r"needed values \[C, P, s\]"):
        aggregate.receive(uploads._replace(sketch=Image(jnp.ones([CLIENTS, 3, 2]))), params)
    late = uploads._replace(age=jnp.zeros(CLIENTS, jnp.int32))
    with pytest.raises(ValueError, match="not late"):
        aggregate.step_of(rule, aggregate.receive(late, params)[0], state, params, {})
