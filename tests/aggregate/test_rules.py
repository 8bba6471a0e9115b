"""Every rule against its dense form sum_m B_m delta_m, and the properties that all or some rules have."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import (
    CLIENTS,
    LIKE,
    RULES,
    SIZE,
    Dense,
    apply,
    apply_rule,
    as_sent,
    as_tree,
    as_vector,
    assert_close,
    clients_of,
    each_fipa,
    each_rank,
    each_rule,
    shapes_of,
    uploads_of,
    with_hyper,
)

from fipa_jax import aggregate
from fipa_jax.aggregate.posteriors import Belief
from fipa_jax.curvature.sketch import Diagonal


@each_rank
@each_rule
def test_step_equals_the_dense_form(x64, name, rank):
    clients = clients_of(rank)
    step, info = apply_rule(name, uploads_of(*clients))
    assert_close(step, RULES[name][1](Dense(*clients)))
    assert not info["rejected"].any()


GIVEN = jnp.float32(0.5)  # a number that rules are made with, as an array of the state's own type
STATES = {
    "trust": aggregate.fipa(damping=GIVEN, trust=True),
    **{
        kind: aggregate.fipa(past=aggregate.PastRounds(kind, rank=2, length=2, num_clients=8, decay=GIVEN))
        for kind in ("prior", "targets", "latest")
    },
    "adaptive": aggregate.fipa(relative=False, past=aggregate.PastRounds("prior", rank=2, adaptive=True)),
    "curvature": aggregate.fipa(relative=False, past=aggregate.PastRounds("curvature", rank=2, decay=GIVEN)),
    "budget": aggregate.within_budget(aggregate.fipa(damping=GIVEN), 100.0),
    "diagonal": aggregate.diagonal(damping=GIVEN),
    "posterior": aggregate.posterior(),
    "admm": aggregate.posterior(posterior=aggregate.PosteriorOptions("admm")),
    "span": aggregate.from_span(span=aggregate.SpanOptions(decay=GIVEN)),
    "sums": aggregate.from_sums(damping=GIVEN, past=aggregate.PastRounds("prior")),
    "kronecker": aggregate.kronecker(damping=GIVEN, past=aggregate.PastRounds("prior")),
}


@pytest.mark.parametrize("name", STATES)
def test_a_rules_first_state_can_be_donated_again_and_again(name):
    """No array is there twice, and none is that of a number that the rule was made with."""
    params = jax.tree.map(jnp.asarray, LIKE)
    for _ in range(2):
        state = STATES[name].init(params)
        shapes = jax.tree.map(jnp.shape, state)
        assert jax.tree.map(jnp.shape, jax.jit(lambda tree: tree, donate_argnums=0)(state)) == shapes
        assert not GIVEN.is_deleted()


@pytest.mark.parametrize("name", [name for name in STATES if name not in ("span", "sums", "kronecker")])
def test_a_rules_state_keeps_its_types_beside_wider_uploads(x64, name):
    """Parameters in float32, and updates, losses and curvature in float64: a scan over rounds can carry it on."""
    rule, params = STATES[name], jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), LIKE)
    ones = jnp.ones(CLIENTS)
    sent = uploads_of(*clients_of(2))._replace(loss=ones, damping=ones, ids=jnp.arange(CLIENTS))
    precisions = sent._replace(sketch=Diagonal(jnp.ones([CLIENTS, SIZE])))
    before = rule.init(params)
    sent = precisions if isinstance(before, Belief) else as_sent(rule, sent)
    step, after, _ = shapes_of(rule, sent, before, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(jnp.result_type, before)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(step)} == {"float32"}


@each_rule
def test_the_order_of_the_clients_does_not_matter(x64, name):
    clients, order = clients_of(2), np.array([2, 0, 3, 1])
    step, _ = apply_rule(name, uploads_of(*clients))
    permuted, _ = apply_rule(name, uploads_of(*(field[order] for field in clients)))
    assert_close(permuted, step, 1e-12)


@each_rule
def test_clients_without_examples_take_no_part(x64, name):
    deltas, counts, eigenvalues, basis = clients_of(2)
    counts = np.array([5, 0, 3, 0])
    deltas[1], basis[3] = 1e9, np.nan  # what they send is never looked at, be it finite or not
    step, info = apply_rule(name, uploads_of(deltas, counts, eigenvalues, basis))
    assert_close(step, RULES[name][1](Dense(deltas, counts, eigenvalues, basis)))
    assert not info["rejected"].any(), "an absent client is not a bad one"


@pytest.mark.parametrize("field", ["delta", "eigenvalues", "basis"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@each_rule
def test_a_client_that_is_not_finite_is_set_aside(x64, name, value, field):
    deltas, counts, eigenvalues, basis = clients_of(2)
    without = RULES[name][1](Dense(deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), eigenvalues, basis))
    {"delta": deltas, "eigenvalues": eigenvalues, "basis": basis}[field][2, -1] = value
    step, info = apply_rule(name, uploads_of(deltas, counts, eigenvalues, basis))
    assert_close(step, without)
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 2)


def test_an_update_whose_norm_overflows_is_set_aside():
    deltas, counts, eigenvalues, basis = clients_of(2)
    deltas[2] = 1e25
    _, info = apply_rule("damped", uploads_of(deltas, counts, eigenvalues, basis, dtype=np.float32), np.float32)
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 2)
    chex.assert_tree_all_finite(info)


def test_an_eigenvalue_rounded_below_zero_is_zero(x64):
    deltas, counts, eigenvalues, basis = clients_of(2)
    eigenvalues[1, -1] = 0
    expected, _ = apply_rule("damped", uploads_of(deltas, counts, eigenvalues, basis))
    eigenvalues[1, -1] = -1e-9
    assert_close(apply_rule("damped", uploads_of(deltas, counts, eigenvalues, basis))[0], expected)


@each_rule
def test_without_any_client_left_the_step_is_zero(x64, name):
    deltas, counts, eigenvalues, basis = clients_of(2)
    for bad, number in ((np.full_like(deltas, np.nan), counts), (deltas, 0 * counts)):
        step, info = apply_rule(name, uploads_of(bad, number, eigenvalues, basis))
        np.testing.assert_array_equal(step, 0)
        chex.assert_tree_all_finite(info)


@each_rank
@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(("damped", "diagonal", "mean"))])
def test_identical_updates_pass_unchanged(x64, name, rank):
    deltas, *others = clients_of(rank)
    deltas[:] = deltas[:1]
    assert_close(apply_rule(name, uploads_of(deltas, *others))[0], deltas[0], 1e-12)


def test_damping_goes_from_pinv_and_fedavg_to_fedavg_alone(x64):
    clients = clients_of(2)
    dense, uploads = Dense(*clients), uploads_of(*clients)
    assert_close(apply_rule("damped", uploads, damping=1e12)[0], dense.mean)
    step, _ = apply_rule("damped", uploads, damping=1e-12)
    span = dense.pinv() @ dense.total  # the projector on span(F)
    pinv = RULES["pinv"][1](dense)
    assert_close(span @ step, pinv, 1e-8)
    assert_close(step - span @ step, dense.mean - span @ dense.mean, 1e-8)
    assert np.linalg.norm(pinv - span @ dense.mean) > 0.1, "pinv and FedAvg are too close for this test"


@pytest.mark.parametrize("name", ["diagonal", "diagonal_absolute"])
def test_diagonal_goes_from_fisher_merging_to_fedavg(x64, name):
    """And takes the mean of the entries in which no client has any curvature."""
    deltas, counts, eigenvalues, basis = clients_of(2)
    basis[:, :3] = 0
    clients, weighting = (deltas, counts, eigenvalues, basis), "uniform" if name == "diagonal_absolute" else "examples"
    dense, uploads = Dense(*clients, weighting), uploads_of(*clients)
    assert_close(apply_rule(name, uploads, damping=1e12)[0], dense.mean)
    each = np.stack([np.diag(matrix) for matrix in dense.each])[:, 3:]
    merged = np.einsum("c,cp,cp->p", dense.weights, each, deltas[:, 3:]) / (dense.weights @ each)
    for damping in (0.0, 1e-13):
        assert_close(apply_rule(name, uploads, damping=damping)[0], np.r_[dense.mean[:3], merged])


@each_rank
@each_fipa
def test_equal_curvatures_give_fedavg(x64, name, rank):
    deltas, counts, eigenvalues, basis = clients_of(rank)
    eigenvalues[:], basis[:] = eigenvalues[:1], basis[:1]
    dense = Dense(deltas, counts, eigenvalues, basis)
    step, _ = apply_rule(name, uploads_of(deltas, counts, eigenvalues, basis))
    if name.startswith("damped"):
        assert_close(step, dense.mean)
    elif name == "pinv":  # inside the span; outside it nothing moves
        assert_close(step, dense.pinv() @ dense.total @ dense.mean)
    else:  # tikhonov shrinks the mean by lam / (lam + beta)
        beta = 0.3 if name == "tikhonov_absolute" else 1e-2 * dense.largest
        values, vectors = np.linalg.eigh(dense.total)
        assert_close(step, vectors @ (values / (values + beta) * (vectors.T @ dense.mean)))


def test_diagonal_is_damped_where_the_curvatures_are_diagonal(x64):
    deltas, counts, eigenvalues, _ = clients_of(SIZE)
    basis = np.stack([np.eye(SIZE)[np.random.default_rng(m).permutation(SIZE)] for m in range(CLIENTS)])
    uploads = uploads_of(deltas, counts, eigenvalues, basis)
    assert_close(apply_rule("diagonal", uploads)[0], apply_rule("damped", uploads)[0], 1e-12)


@pytest.mark.parametrize("name", ["pinv", "damped_zero"])
def test_least_squares_is_solved_in_one_round(x64, name):
    draw = np.random.default_rng(2)
    examples = 15
    x, y = draw.normal(size=(CLIENTS, examples, SIZE)), draw.normal(size=(CLIENTS, examples))
    start = draw.normal(size=SIZE)
    local = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y, strict=True)])
    eigenvalues, basis = np.linalg.eigh(np.einsum("cnp,cnq->cpq", x, x) / examples)
    clients = local - start, np.full(CLIENTS, examples), eigenvalues[:, ::-1], basis[:, :, ::-1]
    step, _ = apply_rule(name, uploads_of(*clients))
    assert_close(start + step, np.linalg.lstsq(x.reshape(-1, SIZE), y.reshape(-1), rcond=None)[0])
    mean, _ = apply_rule("mean", uploads_of(*clients))
    assert np.linalg.norm(mean - step) > 0.01 * np.linalg.norm(step), "FedAvg solves it too: a test of nothing"


def test_a_diagonal_step_that_overflows_falls_back_to_the_mean():
    deltas, counts, eigenvalues, basis = clients_of(2)
    deltas *= 1e15
    sent = uploads_of(deltas, counts, 1e35 * eigenvalues, basis, dtype=np.float32)
    step, info = apply_rule("diagonal", sent, np.float32)
    assert info["fallback"] == 2 and not info["rejected"].any()
    assert_close(step, Dense(deltas, counts, eigenvalues, basis).mean, 1e-5)


def test_diagonal_sweeps_its_damping_without_compiling_anew(x64):
    uploads, params = uploads_of(*clients_of(2)), jax.tree.map(jnp.asarray, LIKE)
    rule = aggregate.diagonal()
    uploads = as_sent(rule, uploads)
    states = [with_hyper(rule.init(params), damping=value) for value in (1e-3, 0.3)]
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(lambda *args: apply(rule, *args)[0], 1))
    small, large = (as_vector(compiled(uploads, state, params)) for state in states)
    assert np.linalg.norm(small - large) > 1e-3, "the hyper-parameter does nothing"


def test_mean_takes_uploads_without_a_sketch(x64):
    deltas, counts, *_ = clients = clients_of(2)
    mean = jax.jit(functools.partial(apply, aggregate.mean()))
    step, _, _ = mean(aggregate.Uploads(as_tree(deltas), jnp.asarray(counts)), (), LIKE)
    assert_close(as_vector(step), Dense(*clients).mean)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"aggregator\.form: unknown 'dampd'; known: damped, pinv, tikhonov"):
        aggregate.fipa("dampd")
    with pytest.raises(ValueError, match=r"aggregator\.at: unknown 'home'; known: broadcast, local"):
        aggregate.diagonal(at="home")
    for rule in (aggregate.fipa, aggregate.mean, aggregate.diagonal):
        with pytest.raises(ValueError, match=r"aggregator\.weighting: unknown 'size'; known: examples, uniform"):
            rule(weighting="size")
