"""What a rule says besides its step, what may be swept, and what it refuses."""

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
    apply_rule,
    as_sent,
    as_tree,
    as_vector,
    assert_close,
    clients_of,
    each_fipa,
    each_form,
    each_rank,
    uploads_of,
)

from fipa_jax import aggregate
from fipa_jax.curvature.sketch import FLAGS, Diagonal, Report, Sketch


@each_form
def test_max_step_shortens_the_step_and_does_not_turn_it(x64, form):
    clients = clients_of(2)
    uploads, longest = uploads_of(*clients), np.linalg.norm(clients[0], axis=1).max()
    free, free_info = apply_rule(form, uploads)
    bound = np.linalg.norm(free) / longest / 2
    step, info = apply_rule(form, uploads, max_step=bound)
    assert_close(step, free / 2, 1e-12)
    np.testing.assert_allclose(info["step_ratio"], bound, rtol=1e-12)
    np.testing.assert_allclose(free_info["step_ratio"], 2 * bound, rtol=1e-12)
    np.testing.assert_array_equal(apply_rule(form, uploads, max_step=3 * bound)[0], free)


@each_rank
@each_fipa
def test_info_equals_its_dense_values(x64, name, rank):
    clients = clients_of(rank)
    dense, (step, info) = Dense(*clients), apply_rule(name, uploads_of(*clients))
    spectrum = np.linalg.eigvalsh(dense.total)[::-1][: min(CLIENTS * rank, SIZE)]
    padded = np.pad(spectrum, [0, CLIENTS * rank - len(spectrum)])  # where D > P, the merged factor has a null space
    np.testing.assert_allclose(info["spectrum"], padded, rtol=1e-10, atol=1e-28)
    assert info["merged_pairs"] == CLIENTS * rank
    absolute = {"tikhonov_absolute": 0.3, "damped_absolute": 0.3}.get(name)
    beta = absolute or {"tikhonov": 1e-2, "damped": 1e-2}.get(name, 0) * spectrum[0]
    np.testing.assert_allclose(info["effective_rank"], np.sum(spectrum / (spectrum + beta)), rtol=1e-10)
    np.testing.assert_allclose(info["condition"], (spectrum[0] + beta) / (spectrum[-1] + beta), rtol=1e-9)
    length, average = np.linalg.norm(step), np.linalg.norm(dense.mean)
    np.testing.assert_allclose(info["fedavg_cosine"], step @ dense.mean / (length * average), rtol=1e-10)
    np.testing.assert_allclose(info["fedavg_norm_ratio"], length / average, rtol=1e-10)
    np.testing.assert_allclose(info["step_ratio"], length / np.linalg.norm(dense.deltas, axis=1).max(), rtol=1e-10)


def test_pinv_counts_the_directions_above_its_cut_off(x64):
    clients = clients_of(2)
    spectrum = np.linalg.eigvalsh(Dense(*clients).total)[::-1][:8]
    rcond = np.sqrt(spectrum[4] * spectrum[5]) / spectrum[0]  # between the fifth and the sixth
    step, info = apply_rule("pinv", uploads_of(*clients), rcond=rcond)
    dense = Dense(*clients)
    assert_close(step, dense.pinv(rcond) @ dense.pull)
    np.testing.assert_allclose(info["effective_rank"], 5, rtol=1e-12)
    np.testing.assert_allclose(info["condition"], spectrum[0] / spectrum[4], rtol=1e-10)


def _report(captured):
    """A report for each client, the second sketch not finite and the last not converged."""
    eigenvalues = clients_of(2)[2]
    flags = {name: jnp.zeros(CLIENTS, bool) for name in FLAGS} | {"not_finite": jnp.array([False, True, False, False])}
    return Report(
        residuals=jnp.asarray(np.arange(CLIENTS * 2).reshape(CLIENTS, 2) / 100),
        products=jnp.array([10, 20, 30, 40]),
        converged=jnp.array([True, False, True, False]),
        trace=jnp.asarray(eigenvalues.sum(axis=1) / captured),
        trace_error=jnp.zeros(CLIENTS),
        flags=flags,
    )


@each_form
def test_a_sketch_that_its_client_flags_as_not_finite_is_set_aside(x64, form):
    """And the others' reports become info."""
    captured = np.array([0.5, 0.9, 0.3, 0.6])
    deltas, counts, eigenvalues, basis = clients_of(2)
    step, info = apply_rule(form, uploads_of(deltas, counts, eigenvalues, basis, _report(captured)))
    without = Dense(deltas, counts * [1, 0, 1, 1], eigenvalues, basis)
    assert_close(step, RULES[form][1](without))
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 1)
    np.testing.assert_allclose(info["captured"], without.weights @ captured[[0, 2, 3]], rtol=1e-12)
    np.testing.assert_allclose(info["sketch_residual"], 0.07, rtol=1e-12)
    assert info["sketch_products"] == 100 and info["sketches_unconverged"] == 1
    assert set(info["flags"]) == set(FLAGS) and info["flags"]["not_finite"].tolist() == [False, True, False, False]
    assert info["merged_pairs"] == 6
    bare = apply_rule(form, uploads_of(deltas, counts, eigenvalues, basis))[1]
    assert set(info) - set(bare) == {
        "captured", "sketch_residual", "sketch_products", "sketches_unconverged", "flags",
    }  # fmt: skip


def test_diagonal_sweeps_its_damping_without_compiling_anew(x64):
    uploads, params = uploads_of(*clients_of(2)), jax.tree.map(jnp.asarray, LIKE)
    rule = aggregate.diagonal()
    uploads = as_sent(rule, uploads)
    states = [rule.init(params)._replace(damping=jnp.asarray(value)) for value in (1e-3, 0.3)]
    chex.clear_trace_counter()
    apply = jax.jit(chex.assert_max_traces(lambda *args: rule.apply(*args)[0], 1))
    small, large = (as_vector(apply(uploads, state, params)) for state in states)
    assert np.linalg.norm(small - large) > 1e-3, "the hyper-parameter does nothing"


@each_form
def test_hyper_parameters_are_traced(x64, form):
    """A sweep compiles once, and a vmap over the state is the same sweep."""
    uploads, params = uploads_of(*clients_of(2)), jax.tree.map(jnp.asarray, LIKE)
    rule = aggregate.fipa(form)
    chex.clear_trace_counter()
    apply = jax.jit(chex.assert_max_traces(lambda *args: rule.apply(*args)[0], 1))
    swept = jnp.array([1e-3, 1e-1, 0.3])
    states = [rule.init(params)._replace(damping=value, rcond=value) for value in swept]
    steps = [apply(uploads, state, params) for state in states]
    dense = Dense(*clients_of(2))
    beta = 0.3 * dense.largest
    wanted = {
        "pinv": dense.pinv(0.3) @ dense.pull,
        "tikhonov": dense.solve(beta)(dense.pull),
        "damped": dense.solve(beta)(dense.pull + beta * dense.mean),
    }
    assert_close(as_vector(steps[2]), wanted[form])
    assert np.linalg.norm(as_vector(steps[0]) - as_vector(steps[2])) > 1e-3, "the hyper-parameter does nothing"
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda *args: rule.apply(*args)[0], in_axes=(None, 0, None)))(uploads, stacked, params)
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps), rtol=1e-9, atol=1e-12
    )


@each_form
def test_fipa_step_equals_the_aggregator(x64, form):
    uploads = uploads_of(*clients_of(2))
    options = {"damping": 0.2, "rcond": 1e-3, "max_step": 2.0, "weighting": "uniform", "relative": False}

    def call(uploads, damping):  # traced, as in a caller's own sweep
        changed = options | {"damping": damping}
        return aggregate.fipa_step(uploads.delta, uploads.sketch, uploads.num_examples, form=form, **changed)

    step, info = jax.jit(call)(uploads, options["damping"])
    rule, params = aggregate.fipa(form, **options), jax.tree.map(jnp.asarray, LIKE)
    wanted, _, wanted_info = jax.jit(rule.apply)(uploads, rule.init(params), params)
    chex.assert_trees_all_close((step, info), (wanted, wanted_info), rtol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(step, params)


def test_mean_takes_uploads_without_a_sketch(x64):
    deltas, counts, *_ = clients = clients_of(2)
    step, _, _ = aggregate.mean().apply(aggregate.Uploads(as_tree(deltas), jnp.asarray(counts)), (), LIKE)
    assert_close(as_vector(step), Dense(*clients).mean)


def test_what_does_not_fit_is_named():
    deltas, counts, eigenvalues, basis = (jnp.asarray(field, jnp.float32) for field in clients_of(2))
    delta, params = as_tree(deltas), jax.tree.map(jnp.asarray, LIKE)
    sketch, fipa, diagonal = Sketch, aggregate.fipa(), aggregate.diagonal()
    cases = {
        r"fipa needs uploads\.sketch, a Sketch": (delta, counts, None),
        r"num_examples.*\[C\].*\(\)": (delta, counts[0], sketch(eigenvalues, basis)),
        r"uploads\.delta.*leading clients axis": (delta, counts[:3], sketch(eigenvalues, basis)),
        r"uploads\.delta.*needed": ({"a": delta["a"]}, counts, sketch(eigenvalues, basis)),
        r"uploads\.sketch.*C = 4, P = 12.*\(4, 11, 2\)": (delta, counts, sketch(eigenvalues, basis[:, :11])),
        r"uploads\.sketch.*\(3, 2\)": (delta, counts, sketch(eigenvalues[:3], basis)),
        r"uploads\.sketch.*\(4, 1\)": (delta, counts, sketch(eigenvalues[:, :1], basis)),
    }
    for words, uploads in cases.items():
        with pytest.raises(ValueError, match=words):
            fipa.apply(aggregate.Uploads(*uploads), fipa.init(params), params)
    for words, sent in {
        r"diagonal needs uploads\.sketch, a Diagonal": sketch(eigenvalues, basis),
        r"uploads\.sketch: needed values \(4, 12\), got \(4, 11\)": Diagonal(jnp.zeros([4, 11])),
    }.items():
        with pytest.raises(ValueError, match=words):
            diagonal.apply(aggregate.Uploads(delta, counts, sent), diagonal.init(params), params)
    with pytest.raises(ValueError, match=r"aggregator\.form: unknown form 'dampd'; known: damped, pinv, tikhonov"):
        aggregate.fipa("dampd")
    with pytest.raises(ValueError, match=r"aggregator\.at: unknown 'home'; known: broadcast, local"):
        aggregate.diagonal(at="home")
    for rule in (aggregate.fipa, aggregate.mean, aggregate.diagonal):
        with pytest.raises(ValueError, match=r"aggregator\.weighting: unknown 'size'; known: examples, uniform"):
            rule(weighting="size")
