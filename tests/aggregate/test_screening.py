"""Which clients take part: every fault in every rule, a person's own too, and what passes as sound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import (
    CLIENTS,
    FAULTS,
    LIKE,
    SIZE,
    apply,
    apply_rule,
    as_tree,
    as_vector,
    clients_of,
    each_fault,
    each_rule,
    uploads_of,
)

from fipa_jax import aggregate
from fipa_jax.aggregate import screening
from fipa_jax.curvature import few_bits, sketch
from fipa_jax.curvature.sketch import Diagonal, Sketch

BAD = 2  # the client that is spoilt
RECEIVE = jax.jit(screening.receive)


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


def _clipped_mean(received):
    return jax.tree.map(lambda leaf: jnp.clip(jnp.mean(leaf, axis=0), -0.1, 0.1), received.delta)


def _median(received):
    def of_leaf(leaf):
        present = received.took_part.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.nanmedian(jnp.where(present, leaf, jnp.nan), axis=0)

    return jax.tree.map(of_leaf, received.delta)


@functools.cache
def _own_rule(average):
    """A person's own rule, which knows nothing of faults, compiled."""

    def apply_own(received, state, params):
        return average(received), state, {}

    rule = aggregate.Aggregator(lambda params: (), apply_own)
    return jax.jit(lambda sent: apply(rule, sent, (), jax.tree.map(jnp.asarray, LIKE)))


@each_fault
@pytest.mark.parametrize("average", [_median, _clipped_mean])
def test_a_rule_of_ones_own_never_sees_a_faulty_client(x64, average, fault):
    """The same bits as without the client's examples, by a rule that checks nothing."""
    absent = clients_of(2)
    absent[1][BAD] = 0
    step, _, info = _own_rule(average)(uploads_of(*_spoilt(fault)))
    wanted, _, _ = _own_rule(average)(uploads_of(*absent))
    assert np.linalg.norm(as_vector(wanted)) > 0.1
    np.testing.assert_array_equal(as_vector(step), as_vector(wanted))
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == BAD)
    if average is _median:
        np.testing.assert_array_equal(as_vector(step), np.median(np.delete(clients_of(2)[0], BAD, axis=0), axis=0))


def test_who_takes_no_part_arrives_as_zero(x64):
    """All that a sum over the clients could read, and who is left out later too."""
    sent = uploads_of(*_spoilt("update_nan"))._replace(
        age=jnp.array([3, 2, -1, 0]),
        damping=jnp.array([1.0, 2.0, jnp.nan, 4.0]),
        moved=as_tree(np.full((CLIENTS, SIZE), np.nan)),
        ids=jnp.arange(4),
    )
    sent = sent._replace(moved=jax.tree.map(lambda leaf: leaf.at[:BAD].set(1.0).at[BAD + 1 :].set(1.0), sent.moved))
    received, _ = RECEIVE(sent, jax.tree.map(jnp.asarray, LIKE))
    fewer = jax.jit(screening.Received.only)(received, jnp.array([True, False, True, True]))
    for arrived, out in ((received, [BAD]), (fewer, [1, BAD])):
        taken = ~np.isin(np.arange(CLIENTS), out)
        np.testing.assert_array_equal(arrived.took_part, taken)
        np.testing.assert_array_equal(arrived.damping, np.where(taken, [1, 2, 0, 4], 0))
        np.testing.assert_array_equal(arrived.age, np.where(taken, [3, 2, 0, 0], 0))
        np.testing.assert_array_equal(arrived.deltas, np.where(taken[:, None], clients_of(2)[0], 0))
        for leaf in jax.tree.leaves(arrived.moved):
            np.testing.assert_array_equal(leaf[np.asarray(out)], 0)
            assert np.all(leaf[taken] == 1)
        jax.tree.map(np.testing.assert_array_equal, (arrived.sketch, arrived.ids), (sent.sketch, sent.ids))


def _screened(**changes):
    """The info of a screening without a rule."""
    sent = uploads_of(*clients_of(2))._replace(**changes)
    return RECEIVE(sent, jax.tree.map(jnp.asarray, LIKE))[1]


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0, 1e308])
def test_a_number_of_examples_that_is_none(x64, count):
    info = _screened(num_examples=jnp.array([count, 1, 0, 7]))
    assert info["rejected"].tolist() == info["reasons"]["examples_invalid"].tolist() == [True, False, False, False]
    assert info["absent"].tolist() == [False, False, True, False]


def test_a_loss_that_is_not_finite(x64):
    info = _screened(loss=jnp.array([1.0, jnp.nan, 0.0, jnp.inf]))
    assert info["rejected"].tolist() == info["reasons"]["loss_not_finite"].tolist() == [False, True, False, True]


def test_a_start_that_cannot_be(x64):
    """A client that is to start in a round to come, or whose way since is none; absent ones may say anything."""
    deltas, counts, *_ = clients_of(2)
    moved = np.where(np.arange(CLIENTS)[:, None] == 1, np.nan, np.zeros_like(deltas))
    absent = jnp.asarray(np.where(np.arange(CLIENTS) == 0, 0, counts))
    info = _screened(age=jnp.array([-1, 0, 2, -1]), moved=as_tree(moved), num_examples=absent)
    assert info["rejected"].tolist() == info["reasons"]["start_invalid"].tolist() == [False, True, False, True]


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
    probe = jax.jit(lambda sent: screening.orthonormality(sent))  # traced anew: BLOCK may have changed
    return probe(Sketch(jnp.asarray(eigenvalues, jnp.float32), jnp.asarray(basis)))


@pytest.mark.parametrize("block", [1, 40, 10**9])
def test_the_probe_is_the_dense_one_in_any_blocks(x64, block, monkeypatch):
    """Also of a basis that is far from orthonormal, with pairs that are left out."""
    monkeypatch.setattr(screening, "BLOCK", block)
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
        assert finite.all() and np.all(distance < screening.ORTHONORMAL / 3)
    spoilt = np.array(basis, np.float32)
    spoilt[0, :, 3] = spoilt[0, :, 4]  # repeated
    spoilt[1, :, 5] *= 1.05  # too long
    spoilt[2] = 0  # lost
    assert np.all(_distance(jnp.asarray(spoilt).astype(store))[1] > screening.ORTHONORMAL)


@pytest.mark.parametrize("solver", [pytest.param("lanczos", marks=pytest.mark.slow), "subspace"])
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
        jax.jit(screening.orthonormality).lower(Sketch(jax.ShapeDtypeStruct((4, 20), jnp.float32), basis)).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < basis.size  # half of what the uploads take


def test_a_sum_over_all_clients_is_one_over_those_that_take_part(x64):
    """Also of numbers that a faulty client has sent."""
    sent = uploads_of(*clients_of(2))
    sent = sent._replace(num_examples=jnp.array([5.0, 1.0, jnp.nan, 7.0]), loss=jnp.array([1.0, jnp.nan, 2.0, 3.0]))
    received, _ = RECEIVE(sent, jax.tree.map(jnp.asarray, LIKE))
    np.testing.assert_array_equal(received.took_part, [True, False, False, True])
    assert float(jnp.sum(received.num_examples)) == 12 and float(jnp.sum(received.loss)) == 4


def test_the_weights_have_the_precision_of_the_parameters():
    """However coarse the updates come: float16 could not count so many examples."""
    number, count = 4, 100_000
    sent = aggregate.Uploads({"a": jnp.ones([number, 3], jnp.float16)}, jnp.full(number, count))
    received, _ = RECEIVE(sent, {"a": jnp.zeros(3, jnp.float32)})
    weights, total = aggregate.weights_of(received, {"a": jnp.zeros(3, jnp.float32)}, "examples")
    assert weights.dtype == jnp.float32 and float(total) == number * count
    np.testing.assert_array_equal(weights, 0.25)


@pytest.mark.parametrize(("size", "rank", "bits"), [(1000, 40, 4), (1000, 10, 3), (500, 60, 6), (8000, 5, 8)])
def test_vectors_in_few_bits_are_as_orthogonal_as_their_rounding_leaves_them(size, rank, bits):
    """Of entries whose sizes differ much, too; a column that is sent twice shows all the same."""
    most = screening.most_distance(size, rank, bits)
    gauss = _bases(size, rank, clients=10)
    heavy = np.linalg.qr(np.random.default_rng(1).laplace(size=(10, size, rank)))[0]
    for exact in (gauss, heavy):
        keys = jax.random.split(jax.random.key(0), (10, rank))
        each = jax.vmap(few_bits.rounded, in_axes=(0, 1, None), out_axes=1)
        sent = np.array(jax.vmap(each, in_axes=(0, 0, None))(keys, jnp.asarray(exact, jnp.float32), bits))
        sent /= np.linalg.norm(sent, axis=1, keepdims=True)
        assert np.all(_distance(sent)[1] <= most)
    sent[:, :, 1] = sent[:, :, 0]
    assert np.all(_distance(sent)[1] > most)


def test_who_says_that_vectors_were_rounded_has_them_taken():
    """Sixty vectors of 500 entries in 4 bits are left out as they are, and taken by who says that they were rounded."""
    basis = _bases(500, 60)
    noise = np.random.default_rng(2).normal(size=basis.shape) * 0.2 / np.sqrt(500)
    basis = basis + noise
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    sketch = Sketch(jnp.ones([3, 60]), jnp.asarray(basis, jnp.float32))
    uploads = aggregate.Uploads({"w": jnp.ones([3, 500])}, jnp.ones(3), sketch)
    params = {"w": jnp.zeros(500)}
    assert screening.receive(uploads, params)[1]["reasons"]["basis_not_orthonormal"].all()
    assert not screening.receive(uploads, params, bits=4)[1]["rejected"].any()
    for value in (-1, 1, 17):
        with pytest.raises(ValueError, match="bits: needs 2 to 16 bits, or 0"):
            screening.receive(uploads, params, bits=value)
