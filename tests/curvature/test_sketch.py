"""A client's sketch and its report, against dense eigendecompositions of its Gauss-Newton matrix."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax.curvature import eigenpairs as eigen
from fipa_jax.curvature import overlooked, sketch, solver_choice
from fipa_jax.curvature import products as curvature

RANK, EXAMPLES, WIDTH, CLASSES = 6, 6, 4, 3
SIZE = WIDTH * CLASSES + CLASSES  # P
HERE = np.arange(EXAMPLES) < 4
# name: (options, whether the trace is known exactly)
WAYS = {
    "subspace": ({"solver": "subspace"}, False),
    "subspace_on_rows": ({"solver": "subspace", "jacobian": "rows"}, True),
    "lanczos": ({"solver": "lanczos"}, False),
    "rows": ({"solver": "rows"}, True),
    "head": ({"solver": "head"}, True),
}


def _outputs(params, batch):
    """Linear in its parameters, so that the loss's own Hessian is its Gauss-Newton matrix."""
    return batch["x"] @ params["w"] + params["b"][None]


def _loss(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def _saddle(out, batch):
    """Not convex in the outputs."""
    return jnp.sum(jnp.asarray([2.0, -1.0, 1.0], out.dtype)[None] * out**2, axis=1) / 2


def _problem():
    draw = np.random.default_rng(1)
    params = {"w": draw.normal(size=(WIDTH, CLASSES)), "b": draw.normal(size=CLASSES)}
    batch = {"x": draw.normal(size=(EXAMPLES, WIDTH)), "label": draw.integers(CLASSES, size=EXAMPLES)}
    return jax.tree.map(jnp.asarray, (params, batch))


@functools.cache
def _dense(loss=_loss):
    """H [P, P] of the examples that are there."""
    params, batch = _problem()
    flat, unravel = ravel_pytree(params)
    total = lambda v: jnp.sum(jnp.where(jnp.asarray(HERE), loss(_outputs(unravel(v), batch), batch), 0)) / HERE.sum()
    return np.asarray(jax.jit(jax.hessian(total))(flat))


@functools.cache
def _compiled(loss=_loss, **options):
    fields = {"rank": RANK, "micro_batch": 4, "features": lambda params, batch: batch["x"]} | options
    return jax.jit(sketch.make_sketch(_outputs, loss, **fields))


def _sketch(mask=HERE, loss=_loss, seed=0, batch=None, **options):
    params, own = _problem()
    found = _compiled(loss, **options)(jax.random.key(seed), params, batch or own, jnp.asarray(mask))
    return jax.tree.map(np.asarray, found)


def _raised(found):
    """Names of the flags that are set."""
    assert set(found.report.flags) == set(sketch.FLAGS)
    return {name for name, flag in found.report.flags.items() if flag}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way in ("head", "subspace_on_rows"))) for way in WAYS]
)
def test_a_sketch_and_its_report_equal_their_dense_values(x64, way):
    options, trace_is_known = WAYS[way]
    found, dense = _sketch(**options), _dense()
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(dense))
    np.testing.assert_allclose(found.eigenvalues, values[:RANK], rtol=1e-6)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(RANK), atol=1e-13)
    sine = np.linalg.norm(vectors[:, :RANK] - found.basis @ (found.basis.T @ vectors[:, :RANK]), 2)
    assert sine < 1e-2
    report = found.report
    residuals = np.linalg.norm(dense @ found.basis - found.basis * found.eigenvalues, axis=0) / values[0]
    np.testing.assert_allclose(report.residuals, residuals, rtol=1e-6, atol=1e-14)
    assert report.converged == np.all(residuals <= eigen.TOLERANCE)
    assert report.converged
    assert _raised(found) == set()
    if trace_is_known:
        np.testing.assert_allclose(report.trace, np.trace(dense), rtol=1e-12)
        assert report.trace_error == 0
    else:  # the four probes' estimate of what is left
        assert 0 < abs(report.trace - np.trace(dense)) < 5 * report.trace_error
    # (q + 1) (R + s), s = 10 and P = 15; the first look at 2 R columns of lanczos; R + s and R of the exact solver;
    # then those that ask whether a vector was overlooked, in a space that is nearly searched through.
    products = {"subspace": 45 + 4, "subspace_on_rows": 45, "rows": SIZE + RANK}.get(way)
    asked = 0 if way == "rows" else 3 * overlooked.WIDTH
    least, most = (products, products) if products else (2 * RANK, SIZE + 4)
    assert least <= report.products <= most + asked


def test_a_full_rank_is_the_whole_matrix(x64):
    found = _sketch(rank=SIZE, solver="rows")
    np.testing.assert_allclose(found.basis * found.eigenvalues @ found.basis.T, _dense(), atol=1e-12)
    # Softmax outputs that move together change nothing: P less the WIDTH + 1 such directions, and N (K - 1) at most.
    rank = HERE.sum() * (CLASSES - 1)
    np.testing.assert_array_equal(found.eigenvalues > 0, np.arange(SIZE) < rank)
    assert _raised(found) == {"rank_deficient"}
    np.testing.assert_allclose(found.report.trace, np.trace(_dense()), rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "room", "picked"),
    [
        ({}, 2.0, {"solver": "head"}),
        ({"features": None}, 2.0, {"solver": "rows"}),
        ({"features": None, "tolerance": 1e-4}, 0.0, {"solver": "lanczos", "tolerance": 1e-4}),  # traced anew
    ],
    ids=["head", "rows", "lanczos"],
)
def test_auto_is_the_solver_that_it_picks(x64, monkeypatch, options, room, picked):
    monkeypatch.setattr(solver_choice, "ROWS_GIB", room)
    params, batch = _problem()
    program = lambda **fields: _compiled(**fields).lower(jax.random.key(0), params, batch, jnp.asarray(HERE)).as_text()
    auto = program(solver="auto", **options)
    assert auto == program(**picked)
    assert auto != program(solver="subspace")


# What is cheap follows from the operations f of a forward pass, 2 N P for a dense network and far more for a
# convolution, whose weights are used at many places.
CONVOLUTION = dict(examples=50, outputs=10, size=6000, flops=2.0 * 50 * 6000 * 100, products=70)
HELD = (500 * 6000 + 50 * 10**2) * 4 / 2**30  # GiB of its rows, and of the Hessians of its losses


@pytest.mark.parametrize(
    ("picked", "room", "changed"),
    [
        (("lanczos", "head"), 2.0, {"is_head": True}),
        (("lanczos", "head"), 0.0, {"is_head": True}),
        (("lanczos", "matrix_free"), 0.99 * HELD, {}),
        (("lanczos", "rows"), HELD, {}),
        (("lanczos", "matrix_free"), HELD, {"itemsize": 8}),
        (("exact", "rows"), 2.0, {"outputs": 5}),  # 250 rows
        (("exact", "rows"), 2.0, {"size": 256, "examples": 10**5}),  # few parameters
        (("lanczos", "matrix_free"), 2.0, {"flops": 2.0 * 50 * 6000}),  # a dense network
        (("exact", "rows"), 2.0, {"products": 610}),
        (("lanczos", "matrix_free"), 2.0, {"side": 2000, "outputs": 3}),  # a sequence, by loss_rank: few rows, but
        (("lanczos", "matrix_free"), 2.0, {"side": 4000, "outputs": 3}),  # Hessians of all positions together
    ],
)
def test_the_rule_of_auto(monkeypatch, picked, room, changed):
    monkeypatch.setattr(solver_choice, "ROWS_GIB", room)
    case = CONVOLUTION | dict(itemsize=4, is_head=False) | changed
    case = {"side": case["outputs"]} | case
    assert solver_choice.choose(**case) == picked
    rows, size, products = case["examples"] * case["outputs"], case["size"], case["products"]
    if max(min(rows, size), case["side"]) > 256 and room == 2.0 and not case["is_head"]:  # then by the written costs
        n, wide = min(rows, size), max(rows, size)
        pull = 25 * case["examples"] * case["side"] ** 3 + 2 * case["flops"] * case["outputs"]
        keep = 6 * size * products**2
        costs = {
            ("lanczos", "matrix_free"): 4 * case["flops"] * products + keep,
            ("lanczos", "rows"): pull + 4 * rows * size * products + keep,
            ("exact", "rows"): pull + 2 * n**2 * wide + 25 * n**3,
        }
        assert costs[picked] == min(costs.values())


def _pairs(dense, rank):
    """The true top pairs, as a solver gives them."""
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(dense))
    kept = vectors[:, :rank]
    found = (values[:rank], kept, dense @ kept, np.zeros(rank))
    return eigen.Eigenpairs(*map(jnp.asarray, found), jnp.int32(0), *[jnp.array(False)] * 4)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_estimate_of_the_trace_that_is_left_has_its_stated_error(x64, rank):
    """Over many keys: unbiased, with Hutchinson's variance 2 (|M|_F^2 - |diag M|^2) / probes of the deflated M."""
    probes, draws, dense = 4, 4000, _dense()
    matrix, pairs = curvature.Curvature(lambda v: dense @ v, SIZE, dense.dtype), _pairs(dense, rank)
    estimate = jax.jit(jax.vmap(lambda key: sketch.trace_left(key, matrix, pairs, probes)))
    left, error = map(np.asarray, estimate(jax.random.split(jax.random.key(0), draws)))
    outside = np.eye(SIZE) - np.asarray(pairs.vectors @ pairs.vectors.T)
    deflated = outside @ dense @ outside
    variance = 2 * (np.sum(deflated**2) - np.sum(np.diag(deflated) ** 2)) / probes
    assert abs(left.mean() - np.trace(deflated)) < 4 * np.sqrt(variance / draws)
    np.testing.assert_allclose(left.var(), variance, rtol=0.15)
    np.testing.assert_allclose(np.mean(error**2), variance, rtol=0.15)
    assert (np.sqrt(variance) < 0.1 * np.trace(dense)) == (rank > 0), "the pairs' part adds no variance"


SCALES = (1e-18, 1e-9, 1e9, 1e18)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way not in ("lanczos", "rows"))) for way in WAYS]
)
def test_a_report_is_the_same_at_any_scale_of_the_curvature(way):
    """In float32, whose squares vanish below 1e-19 and overflow above 1e19: residuals, trace, errors, flags."""
    options = WAYS[way][0] | {"power_steps": 0, "oversample": 2, "rank": 3}
    if options["solver"] in ("lanczos", "head"):
        options["tolerance"] = 0.3  # so that it stops at once, and its residuals are not those of rounding
    params, batch = _problem()

    @jax.jit
    def scaled(scale):
        make = sketch.make_sketch(
            _outputs, lambda out, batch: scale * _loss(out, batch), features=lambda p, b: b["x"], **options
        )
        return make(jax.random.key(0), params, batch, jnp.asarray(HERE))

    one = jax.tree.map(np.asarray, scaled(jnp.float32(1)))
    assert np.max(one.report.residuals) > 1e-8
    for scale in SCALES:
        found = jax.tree.map(np.asarray, scaled(jnp.float32(scale)))
        np.testing.assert_allclose(found.report.residuals, one.report.residuals, rtol=1e-3, atol=1e-6)
        for mine, own in (
            (found.eigenvalues, one.eigenvalues),
            (found.report.trace, one.report.trace),
            (found.report.trace_error, one.report.trace_error),
        ):
            np.testing.assert_allclose(mine / np.float32(scale), own, rtol=1e-4)
        assert found.report.converged == one.report.converged and _raised(found) == _raised(one)
        share = sketch.enough(found, 0.7)
        np.testing.assert_array_equal(share, sketch.enough(one, 0.7))


@pytest.mark.parametrize("loss_rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_loss_rank_leaves_out_is_in_the_trace_and_in_the_flags(x64, loss_rank):
    """A softmax over three classes has a Hessian of rank two, so that a rank of two leaves nothing out."""
    dense, found = _dense(), []
    for seed in range(40):
        found.append(_sketch(solver="rows", loss_rank=loss_rank, seed=seed, rank=3))
    reports = [one.report for one in found]
    kept = np.asarray([one.eigenvalues.sum() for one in found])
    left_out = loss_rank == 1
    assert all(report.flags["loss_truncated"] == left_out for report in reports)
    assert all(report.converged != left_out for report in reports), "of the whole curvature"
    assert np.ptp(kept) < 1e-12, "the pairs need no key"
    traces, errors = np.asarray([[report.trace, report.trace_error] for report in reports]).T
    if left_out:
        assert abs(traces.mean() - np.trace(dense)) < 4 * traces.std() / np.sqrt(len(traces))
        np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), traces.std(), rtol=0.5)
        assert 0 < traces.std() < 0.3 * np.trace(dense)
        np.testing.assert_array_equal(_sketch(solver="rows", loss_rank=1, rank=3, probes=0).report.trace, 0)
    else:
        np.testing.assert_allclose(traces, np.trace(dense), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [0, 1, 2])
def test_the_error_of_the_trace_is_infinite_where_it_is_unknown(x64, probes):
    report = _sketch(solver="subspace", probes=probes, rank=3, oversample=0).report
    assert np.isfinite(report.trace_error) == (probes == 2) and not np.isnan(report.trace_error)
    assert (report.trace > 0) == (probes > 0)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [3, SIZE])
def test_the_residuals_of_a_rounded_basis_are_bounded(x64, store, rank):
    """By a bound that is no more than three times what dense products with the rounded basis give."""
    dense = _dense()
    stored = sketch.stored_as(_compiled(rank=rank, solver="rows"), store)
    found = jax.tree.map(np.asarray, jax.jit(stored)(jax.random.key(0), *_problem(), jnp.asarray(HERE)))
    basis = found.basis.astype(float)
    true = np.linalg.norm(dense @ basis - basis * found.eigenvalues, axis=0) / found.eigenvalues[0]
    true = true[found.eigenvalues > 0]
    bound = found.report.residuals[found.eigenvalues > 0]
    assert np.all(true <= bound * (1 + 1e-6)) and np.max(bound) < 3 * np.max(true)
    assert found.report.converged == np.all(bound <= eigen.TOLERANCE) == (store == "float16")


def test_without_probes_the_trace_is_not_known_and_nothing_is_wrong(x64):
    found = _sketch(solver="subspace", probes=0)
    assert found.report.converged and _raised(found) == set()
    by_energy = sketch.keeping_energy(lambda *given: found, 0.9)(None, None, None)
    np.testing.assert_array_equal(by_energy.eigenvalues, found.eigenvalues)
    assert np.all(found.eigenvalues > 0)


def test_the_pairs_that_are_kept_reach_a_share_of_the_trace_which_is_in_0_to_1(x64):
    found = _sketch(rank=SIZE, solver="rows")
    shares = np.cumsum(found.eigenvalues) / found.report.trace
    for share in (0, 0.5, np.float32(0.9), jnp.float32(1 - 1e-6)):
        kept = sketch.keeping_energy(lambda *given: found, share)(None, None, None)
        wanted = np.argmax(shares >= share) + 1 if share else 0
        np.testing.assert_array_equal(kept.eigenvalues, np.where(np.arange(SIZE) < wanted, found.eigenvalues, 0))
    traced = jax.jit(lambda share: sketch.keeping_energy(lambda *given: found, share)(None, None, None))(0.5)
    assert np.count_nonzero(traced.eigenvalues) == np.argmax(shares >= 0.5) + 1
    for share in (-0.1, 1.1, np.nan, np.float32(2), jnp.float32(np.nan)):
        with pytest.raises(ValueError, match=r"sketch\.energy: needs a share in \[0, 1\], got"):
            sketch.keeping_energy(lambda *given: found, share)


@pytest.mark.parametrize("solver", ["lanczos", "rows", "head"])
def test_an_empty_client_has_an_empty_sketch(x64, solver):
    found = _sketch(mask=np.zeros(EXAMPLES, bool), solver=solver)
    assert _raised(found) == {"empty"}
    for leaf in jax.tree.leaves(found._replace(report=found.report._replace(products=0, converged=0, flags={}))):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    "solver", ["subspace", "rows", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lanczos", "head"))]
)
def test_what_is_not_finite_gives_a_finite_sketch_of_zeros_and_a_flag(x64, solver):
    _, batch = _problem()
    found = _sketch(batch=batch | {"x": batch["x"].at[0, 0].set(jnp.nan)}, solver=solver)
    assert _raised(found) - {"asymmetric"} == {"not_finite"} and not found.report.converged
    for leaf in (found.eigenvalues, found.basis, found.report.residuals, found.report.trace):
        np.testing.assert_array_equal(leaf, 0)
    assert found.report.trace_error == np.inf, "nothing is known of the trace"


@pytest.mark.parametrize("solver", ["subspace", "rows"])
def test_a_loss_that_is_not_convex_in_the_outputs_is_flagged(x64, solver):
    found = _sketch(loss=_saddle, solver=solver)
    assert "indefinite" in _raised(found) and "not_finite" not in _raised(found)
    assert np.all(found.eigenvalues >= 0)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_energy_keeps_the_fewest_pairs_that_reach_its_share_of_the_trace(x64, share):
    whole, dense = _sketch(rank=SIZE, solver="rows"), _dense()
    values = np.linalg.eigvalsh(dense)[::-1]
    fewest = np.searchsorted(np.cumsum(values) / np.trace(dense), share) + 1
    keep = np.asarray(sketch.enough(whole, share))
    np.testing.assert_array_equal(keep, np.arange(SIZE) < fewest)
    cut = jax.tree.map(np.asarray, sketch.truncate(whole, jnp.asarray(keep)))
    np.testing.assert_array_equal(cut.eigenvalues, whole.eigenvalues * keep)
    np.testing.assert_array_equal(cut.basis, whole.basis * keep)
    np.testing.assert_array_equal(cut.report.residuals, whole.report.residuals * keep)
    others = [found.report._replace(residuals=0) for found in (cut, whole)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *others)), "the trace is that of the whole"


def test_what_is_sent_is_cut_by_energy_and_rounded_to_nearest(x64):
    """To the 8 significant bits of bfloat16: by at most 2^-8 of each entry. Nothing but the basis is rounded."""
    whole = _sketch(rank=SIZE, solver="rows")
    rounded = sketch.stored_as(_compiled(rank=SIZE, solver="rows"), "bfloat16")
    sent_of = jax.jit(sketch.keeping_energy(rounded, 0.9))
    found = jax.tree.map(np.asarray, sent_of(jax.random.key(0), *_problem(), jnp.asarray(HERE)))
    cut = jax.tree.map(np.asarray, sketch.truncate(whole, sketch.enough(whole, 0.9)))
    assert found.basis.dtype == jnp.bfloat16
    sent = found.basis.astype(float)
    assert np.all(np.abs(sent - cut.basis) <= 2.0**-8 * np.abs(cut.basis))
    assert not np.array_equal(sent, cut.basis)
    assert whole.report.converged and not found.report.converged, "the rounding is above the tolerance"
    found, cut = (x._replace(basis=0, report=x.report._replace(residuals=0, converged=0)) for x in (found, cut))
    for mine, own in zip(jax.tree.leaves(found), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(mine, own)
        assert np.asarray(mine).dtype == np.asarray(own).dtype


@pytest.mark.parametrize(
    ("own", "total", "round", "scale"), [(3.0, 1.0, 2, 1.0), (0.02, 0.01, 1, 1.0), (0.2, 0.3, 7, 0.5)]
)
def test_above_gradient_is_the_published_rule(x64, own, total, round, scale):
    values = np.geomspace(5.0, 1e-3, 12)
    found = sketch.above_gradient(sketch.Sketch(jnp.asarray(values), None), own, total, round, scale)
    wanted = values >= values[0] * min(0.99, scale / (round * (own + total)))
    np.testing.assert_array_equal(found, wanted)
    assert wanted[0] and not wanted[-1]


def test_above_gradient_without_gradients_keeps_the_largest_pairs():
    values = jnp.array([5.0, 4.96, 1.0, 0.0])
    keep = lambda values, round: sketch.above_gradient(sketch.Sketch(values, None), 0.0, 0.0, jnp.int32(round))
    for round in (0, 1):
        np.testing.assert_array_equal(keep(values, round), [True, True, False, False])
    assert jnp.all(jnp.isfinite(keep(0 * values, 1)))


def test_a_start_is_handed_to_the_solver(x64):
    """One product of the true basis shows that it is."""
    params, batch = _problem()
    start = _sketch(solver="rows").basis
    once = _compiled(solver="subspace", oversample=0, power_steps=0)
    warm = once(jax.random.key(0), params, batch, jnp.asarray(HERE), start)
    assert RANK + 4 < warm.report.products <= RANK + 4 + overlooked.WIDTH * overlooked.DEPTH
    assert np.max(warm.report.residuals) < 1e-12
    np.testing.assert_allclose(np.abs(np.sum(warm.basis * start, axis=0)), 1, rtol=1e-12)


def test_make_diagonal_is_the_diagonal(x64):
    params, batch = _problem()
    diagonal = jax.jit(sketch.make_diagonal(_outputs, _loss, micro_batch=4))
    np.testing.assert_allclose(
        diagonal(jax.random.key(0), params, batch, jnp.asarray(HERE)).values, np.diag(_dense()), rtol=1e-11
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"sketch\.rank: needs a whole number of at least 1, got 0"),
        ({"rank": SIZE + 1}, rf"sketch\.rank: {SIZE + 1} is above .* {SIZE}"),
        ({"solver": "lanczo"}, r"sketch\.solver: unknown 'lanczo'; known: auto, head, lanczos, rows, subspace"),
        ({"jacobian": "dense"}, r"sketch\.jacobian: unknown 'dense'; known: head, matrix_free, rows"),
        ({"solver": "head", "features": None}, r"sketch\.solver, or jacobian: head needs the model's features"),
        ({"solver": "head", "features": lambda params, batch: batch["x"][:, 1:]}, "last layer"),
    ],
)
def test_wrong_choices_name_the_field(options, message):
    params, batch = _problem()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sketch.make_sketch(_outputs, _loss, **{"rank": 1} | options), jax.random.key(0), params, batch)


@pytest.mark.parametrize("dtype", ["int8", "bfloat61"])
def test_a_wrong_dtype_names_the_field(dtype):
    with pytest.raises(ValueError, match=rf"sketch\.store: .*{dtype!r}.*bfloat16"):
        sketch.stored_as(None, dtype)


def test_every_solver_of_the_table_is_reached():
    """The names a user may write are those of the rule, and of the ways above."""
    assert set(solver_choice.SOLVERS) == {options["solver"] for options, _ in WAYS.values()} | {"auto"}
    assert inspect.signature(sketch.make_sketch).parameters["solver"].default in solver_choice.SOLVERS


def test_auto_does_not_take_a_lower_layer_of_the_same_shape_for_the_head(x64):
    """Here every layer is [4, 4]; the last one's inputs depend on the first one's parameters."""
    draw = np.random.default_rng(5)
    head = jnp.asarray(draw.normal(size=(4, 4)))
    batch = {"x": jnp.asarray(draw.normal(size=(6, 4))), "y": jnp.asarray(draw.normal(size=(6, 4)))}
    params = {"w": jnp.asarray(draw.normal(size=(4, 4)))}
    features = lambda p, b: jnp.tanh(b["x"] @ p["w"])
    options = {"rank": 3, "features": features}
    loss = lambda out, b: jnp.sum((out - b["y"]) ** 2, axis=1) / 2
    found, wanted = (
        jax.jit(sketch.make_sketch(lambda p, b: features(p, b) @ head, loss, solver=solver, **options))(
            jax.random.key(0), params, batch
        )
        for solver in ("auto", "rows")
    )
    np.testing.assert_allclose(found.eigenvalues, wanted.eigenvalues, rtol=1e-8)
