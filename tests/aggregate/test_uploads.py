"""Which clients take part: every fault in every rule, what passes as sound, and how far one client moves the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import (
    CLIENTS,
    FAULTS,
    LIKE,
    Dense,
    apply_rule,
    as_tree,
    assert_close,
    clients_of,
    each_fault,
    each_form,
    each_rule,
    uploads_of,
)

from fipa_jax import aggregate
from fipa_jax.aggregate import filters as forms
from fipa_jax.aggregate import uploads
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import Diagonal, Sketch

BAD = 2  # the client that is spoilt


def _spoilt(fault, seed=0):
    fields = clients_of(2, seed)
    own = [field[BAD : BAD + 1] for field in fields]  # views
    FAULTS[fault][1]([own[0][0], own[1], own[2][0], own[3][0]])
    return fields


@each_fault
@each_rule
def test_a_faulty_client_is_left_out_with_its_reason_and_the_step_is_that_of_the_others(x64, name, fault):
    reason = FAULTS[fault][0]
    if reason == "basis_not_orthonormal" and name.startswith("diagonal"):
        pytest.skip("a diagonal has no basis")
    fields = _spoilt(fault)
    step, info = apply_rule(name, uploads_of(*fields))
    deltas, counts, eigenvalues, basis = clients_of(2)
    counts[BAD] = 0
    wanted, without = apply_rule(name, uploads_of(deltas, counts, eigenvalues, basis))
    np.testing.assert_array_equal(step, wanted)
    bad = np.arange(CLIENTS) == BAD
    np.testing.assert_array_equal(info["rejected"], bad)
    for name_, clients in info["reasons"].items():
        np.testing.assert_array_equal(clients, bad & (name_ == reason), err_msg=name_)
    assert not without["rejected"].any() and without["absent"].tolist() == bad.tolist()
    assert not info["absent"].any()


def _screened(**changes):
    """The info of a screening without a rule."""
    deltas, counts, eigenvalues, basis = clients_of(2)
    sent = uploads_of(deltas, counts, eigenvalues, basis)._replace(**changes)
    return uploads.screen(sent, jax.tree.map(jnp.asarray, LIKE), "examples")[3]


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0, 1e308])
def test_a_number_of_examples_that_is_none(x64, count):
    info = _screened(num_examples=jnp.array([count, 1, 0, 7]))
    assert info["rejected"].tolist() == info["reasons"]["examples_invalid"].tolist() == [True, False, False, False]
    assert info["absent"].tolist() == [False, False, True, False]


def test_a_loss_that_is_not_finite(x64):
    info = _screened(loss=jnp.array([1.0, jnp.nan, 0.0, jnp.inf]))
    assert info["rejected"].tolist() == info["reasons"]["loss_not_finite"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["sketch", "diagonal"])
def test_curvature_below_zero_is_rounding_up_to_the_root_of_eps(x64, kind, dtype):
    basis = clients_of(2)[3]
    edge = np.sqrt(np.finfo(dtype).eps)
    least = np.array([-0.5 * edge, -2 * edge, 0, -1.0]) * [4, 4, 4, 1]
    values = np.stack([np.full(CLIENTS, 4.0), least], axis=1).astype(dtype)
    values[3] = -1  # nothing above zero to be the rounding of
    if kind == "diagonal":
        sent = Diagonal(jnp.asarray(np.tile(values, (1, 6))))
    else:
        sent = Sketch(jnp.asarray(values), jnp.asarray(basis))
    info = _screened(sketch=sent)
    assert info["reasons"]["curvature_negative"].tolist() == [False, True, False, True]


def _bases(size, rank, clients=3, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(clients, size, rank)))[0]


def _distance(basis, eigenvalues=None):
    eigenvalues = np.ones((len(basis), basis.shape[2])) if eigenvalues is None else eigenvalues
    probe = jax.jit(lambda sent: uploads.orthonormality(sent))  # traced anew: BLOCK may have changed
    return probe(Sketch(jnp.asarray(eigenvalues, jnp.float32), jnp.asarray(basis)))


@pytest.mark.parametrize("block", [1, 40, 10**9])
def test_the_probe_is_the_dense_one_in_any_blocks(x64, block, monkeypatch):
    """Also of a basis that is far from orthonormal, with pairs that are left out."""
    monkeypatch.setattr(uploads, "BLOCK", block)
    basis = np.random.default_rng(1).normal(size=(3, 11, 4))
    eigenvalues = np.array([[3, 2, 1, 0.5], [3, 2, 0, 0], [0, 0, 0, 0]])
    finite, found = _distance(basis, eigenvalues)
    signs = np.where(eigenvalues > 0, np.random.default_rng(0).choice([-1, 1], 4), 0)
    error = np.einsum("cpr,cps,cs->cr", basis, basis, signs) - signs
    np.testing.assert_allclose(found, np.max(np.abs(error) * (eigenvalues > 0), axis=1), rtol=1e-10)
    assert finite.all() and found[2] == 0


@pytest.mark.parametrize("size", [12, 200])
@pytest.mark.parametrize("store", ["bfloat16", "float16", "float32"])
def test_a_basis_passes_in_every_dtype_it_may_be_stored_in(size, store):
    basis = jnp.asarray(_bases(size, 12), jnp.float32).astype(store)
    for sent in (basis, basis.astype(jnp.float32)):  # a cast back does not undo the rounding
        finite, distance = _distance(sent)
        assert finite.all() and np.all(distance < uploads.ORTHONORMAL / 3)
    spoilt = np.array(basis, np.float32)
    spoilt[0, :, 3] = spoilt[0, :, 4]  # repeated
    spoilt[1, :, 5] *= 1.05  # too long
    spoilt[2] = 0  # lost
    assert np.all(_distance(jnp.asarray(spoilt).astype(store))[1] > uploads.ORTHONORMAL)


@pytest.mark.parametrize("solver", ["lanczos", "subspace"])
def test_bases_of_the_iterative_solvers_pass(solver):
    """In float32, of a curvature whose rank is below that asked for."""
    draw = np.random.default_rng(2)
    batch = {"x": jnp.asarray(draw.normal(size=(5, 40)), jnp.float32)}
    outputs = lambda params, batch: jnp.tanh(batch["x"] @ params)[:, None]
    loss = lambda out, batch: jnp.sum(out**2, axis=1) / 2
    make = jax.jit(sketch.make_sketch(outputs, loss, rank=12, solver=solver))
    found = make(jax.random.key(0), jnp.full(40, 0.1), batch)
    finite, distance = _distance(found.basis[None], found.eigenvalues[None])
    assert finite[0] and distance[0] < 1e-4 and (found.eigenvalues == 0).any()


def test_a_basis_in_bfloat16_is_not_converted_as_a_whole():
    basis = jax.ShapeDtypeStruct((4, 100_000, 20), jnp.bfloat16)
    compiled = (
        jax.jit(uploads.orthonormality).lower(Sketch(jax.ShapeDtypeStruct((4, 20), jnp.float32), basis)).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < basis.size  # half of what the uploads take


def test_traces_are_capped_at_the_lower_median_of_those_who_take_part(x64):
    eigenvalues = np.array([[3.0, 1], [2, 0], [1e9, 1], [np.nan, 1], [600, 400]])
    weights = np.array([0.2, 0.2, 0.4, 0, 0.2])  # traces 4, 2, 1e9, out, 1000: the lower median is 4
    given = Sketch(jnp.asarray(eigenvalues), jnp.zeros([5, 3, 2]))
    found, capped = uploads.cap_traces(given, uploads.relative_traces(given, jnp.asarray(weights)), 100.0)
    assert capped.tolist() == [False, False, True, False, True]
    np.testing.assert_array_equal(found.eigenvalues[:2], eigenvalues[:2])
    np.testing.assert_allclose(found.eigenvalues[2], 400 * eigenvalues[2] / (1e9 + 1))
    np.testing.assert_allclose(found.eigenvalues[4], [240, 160])
    assert uploads.cap_traces(given, jnp.ones(5), 0.0)[0] is given
    some = Sketch(jnp.asarray(eigenvalues * [[0], [0], [1], [1], [1]]), given.basis)  # half have no curvature
    found, capped = uploads.cap_traces(some, uploads.relative_traces(some, jnp.asarray(weights)), 100.0)
    assert not capped.any() and found.eigenvalues[2, 0] == 1e9


def _five(scale, seed=0, size=8, rank=4):
    """(deltas, counts, eigenvalues, basis) of five clients, the last one's eigenvalues times `scale`."""
    draw = np.random.default_rng(seed)
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, (5, rank)), axis=1)
    eigenvalues[-1] *= scale
    return draw.normal(size=(5, size)), np.array([5, 1, 3, 7, 4]), eigenvalues, _bases(size, rank, 5, seed)


@functools.cache
def _step(trace_cap):
    return jax.jit(functools.partial(aggregate.fipa_step, relative=False, trace_cap=trace_cap))


@pytest.mark.parametrize("seed", range(5))
def test_one_client_with_huge_eigenvalues_moves_the_step_no_further_than_stated(x64, seed):
    """The bounds of `fipa`'s docstring: in the others' curvature by the cap, in length by `max_step`."""
    fields, beta, cap = _five(1e6, seed), 0.05, 2.0

    def moved(trace_cap, counts=fields[1], max_step=0.0):
        sent = jnp.asarray(fields[0]), Sketch(*map(jnp.asarray, fields[2:])), jnp.asarray(counts)
        step, info = _step(trace_cap)(*sent, damping=beta, max_step=max_step)
        return np.asarray(step), np.asarray(info["capped"])

    without = fields[1] * [1, 1, 1, 1, 0]
    alone, none = moved(cap, without)
    dense = Dense(*fields)
    others = np.tensordot(dense.weights[:4], dense.each[:4] + beta * np.eye(8), 1)  # A
    norm = lambda x: np.sqrt(x @ others @ x)
    middle = np.sort(fields[2].sum(axis=1))[2]
    distance = np.linalg.norm(fields[0][4] - alone)
    kappa = dense.weights[4] * (cap * middle + beta)
    (capped, which), (free, _) = moved(cap), moved(0.0)
    assert which.tolist() == [False] * 4 + [True] and not none.any()
    assert norm(capped - alone) <= np.sqrt(kappa) / 2 * distance
    assert np.linalg.norm(capped - alone) <= np.sqrt(kappa / (1 - dense.weights[4]) / beta) / 2 * distance
    assert norm(capped - alone) < 0.9 * norm(free - alone), "the cap does nothing"
    assert norm(free - alone) <= norm(fields[0][4] - alone), "true of any eigenvalues"
    bound, longest = 0.1, np.linalg.norm(fields[0], axis=1).max()
    short = moved(0.0, max_step=bound)[0] - moved(0.0, without, bound)[0]
    assert 0 < np.linalg.norm(short) <= 2 * bound * longest


def _nearly_collinear():
    """Two clients whose curvatures differ by an angle of 1e-4 and whose updates differ by one: a lot of noise."""
    basis = _bases(12, 2, 1)[0]
    turned = basis.copy()
    turned[:, 1] = np.cos(1e-4) * basis[:, 1] + np.sin(1e-4) * np.linalg.qr(np.c_[basis, np.eye(12)])[0][:, 2]
    deltas, counts, *_ = clients_of(2)
    return deltas, counts * [1, 1, 0, 0], np.ones((4, 2)) * [1, 0.5], np.stack([basis, turned, basis, basis])


@each_form
def test_a_step_that_explodes_falls_back_to_the_damped_form(x64, form):
    fields = _nearly_collinear()
    options = {"damping": 1e-12, "rcond": 1e-12, "explosion": 0.0}
    free, before = apply_rule(form, uploads_of(*fields), **options)
    longest = np.linalg.norm(fields[0][:2], axis=1).max()
    assert before["fallback"] == 0 and np.linalg.norm(free) > 200 * longest
    step, info = apply_rule(form, uploads_of(*fields), **options | {"explosion": 200.0})
    dense = Dense(*fields)
    beta = forms.CAREFUL * dense.largest
    assert info["fallback"] == 1
    assert_close(step, dense.solve(beta)(dense.pull + beta * dense.mean), 1e-8)
    np.testing.assert_array_equal(info["spectrum"], before["spectrum"])


@each_form
def test_what_fails_even_damped_is_the_mean(x64, form):
    """Here as no step is short enough."""
    fields = clients_of(2)
    step, info = apply_rule(form, uploads_of(*fields), explosion=1e-9)
    assert info["fallback"] == 2
    assert_close(step, Dense(*fields).mean, 1e-12)


@pytest.mark.parametrize("name", ["damped", "tikhonov", "diagonal"])
def test_a_step_that_is_not_finite_falls_back_to_the_mean(x64, name):
    fields = clients_of(2)
    step, info = apply_rule(name, uploads_of(*fields), damping=np.nan)
    if name == "diagonal":  # where it divides by what is not finite it takes the mean anyway
        assert info["fallback"] == 0
    else:
        assert info["fallback"] == 2
    assert_close(step, Dense(*fields).mean, 1e-12)


def test_a_diagonal_step_that_overflows_falls_back_to_the_mean():
    deltas, counts, eigenvalues, basis = clients_of(2)
    deltas *= 1e15
    sent = uploads_of(deltas, counts, 1e35 * eigenvalues, basis, dtype=np.float32)
    step, info = apply_rule("diagonal", sent, np.float32)
    assert info["fallback"] == 2 and not info["rejected"].any()
    assert_close(step, Dense(deltas, counts, eigenvalues, basis).mean, 1e-5)


def _single(place, **changes):
    """What one client of `clients_of` sends."""
    deltas, counts, eigenvalues, basis = clients_of(2)
    sent = Uploads(as_tree(deltas[place]), counts[place], Sketch(eigenvalues[place], basis[place]))
    return sent._replace(**changes)


def _narrow(place, **parts):
    return _single(place).sketch._replace(**parts)


MISFITS = {
    "tree": ({"delta": {"a": np.zeros((2, 4))}}, "its update has the tree or shapes"),
    "shape": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(5)}}, "its update has the tree or shapes"),
    "words": ({"delta": {"a": np.zeros((2, 4)), "b": "none"}}, "holds what is no array"),
    "integers": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(4, int)}}, "needed floating-point numbers, got.*int"),
    "complex": ({"sketch": _narrow(BAD, basis=np.zeros((12, 2), complex))}, "floating-point numbers, got.*complex"),
    "rank": ({"sketch": Sketch(np.ones(3), np.zeros((12, 3)))}, "sent a sketch of rank 3, most sent .* rank 2"),
    "size": ({"sketch": Sketch(np.ones(2), np.zeros((11, 2)))}, r"basis \(11, 2\), needed \[R\] and \[12, R\]"),
    "diagonal": ({"sketch": Diagonal(np.ones(12))}, "sent a diagonal, most sent a sketch of rank 2"),
    "short": ({"sketch": Diagonal(np.ones(11))}, r"its diagonal has the shape \(11,\)"),
    "tuple": ({"sketch": (np.ones(2), np.zeros((12, 2)))}, "its sketch is a tuple"),
    "counts": ({"num_examples": np.ones(2)}, r"need to be numbers, got shapes \(2,\)"),
    "loss": ({"loss": 0.5}, "with its loss, most sent a sketch of rank 2"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_becomes_a_client_without_examples(x64, misfit):
    changes, words = MISFITS[misfit]
    params = jax.tree.map(jnp.asarray, LIKE)
    sent = [_single(place, **(changes if place == BAD else {})) for place in range(CLIENTS)]
    found, wrong = uploads.collect(sent, params)
    assert list(wrong) == [BAD]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(wrong[BAD])
    deltas, counts, eigenvalues, basis = clients_of(2)
    counts[BAD] = 0
    step, info = apply_rule("damped", found)
    np.testing.assert_array_equal(step, apply_rule("damped", uploads_of(deltas, counts, eigenvalues, basis))[0])
    assert info["absent"].tolist() == [place == BAD for place in range(CLIENTS)]


def test_where_nobody_fits_there_is_nothing_to_collect():
    with pytest.raises(ValueError, match=r"none of 2 clients fits the parameters.*tree or shapes"):
        uploads.collect([_single(0), _single(1)], {"a": jnp.zeros(3)})


def test_all_that_fits_is_stacked(x64):
    params = jax.tree.map(jnp.asarray, LIKE)
    found, wrong = uploads.collect([_single(place) for place in range(CLIENTS)], params)
    assert not wrong
    jax.tree.map(np.testing.assert_array_equal, found, uploads_of(*clients_of(2)))
