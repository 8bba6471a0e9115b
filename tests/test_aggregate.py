"""Every rule against its dense form sum_m B_m delta_m, and the properties that all or some rules have."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import aggregate
from fipa_jax.sketch import Sketch

CLIENTS = 4
LIKE = {"a": np.zeros((2, 4)), "b": np.zeros(4)}  # the parameters' tree
SIZE = 12  # P
RANKS = {"narrow": 2, "full": SIZE}  # D = 8 < P and D = 48 > P
RCOND, UNBOUNDED = 1e-6, 1e9


class Dense:
    """The quantities of one round as dense matrices, of the clients with examples."""

    def __init__(self, deltas, counts, eigenvalues, basis, weighting="examples"):
        there = counts > 0
        counts = counts[there] if weighting == "examples" else np.ones(there.sum())
        self.weights = counts / counts.sum()
        self.deltas = deltas[there]
        self.each = np.einsum("cpr,cr,cqr->cpq", basis[there], eigenvalues[there], basis[there])  # H_m
        self.total = np.tensordot(self.weights, self.each, 1)  # H
        self.mean = self.weights @ self.deltas
        self.pull = np.einsum("c,cpq,cq->p", self.weights, self.each, self.deltas)  # sum_m w_m H_m delta_m
        self.largest = np.linalg.eigvalsh(self.total)[-1]

    def solve(self, beta):
        return functools.partial(np.linalg.solve, self.total + beta * np.eye(len(self.total)))

    def pinv(self, rcond=RCOND):
        return np.linalg.pinv(self.total, rcond=rcond, hermitian=True)


# name: (rule, its dense oracle)
RULES = {
    "mean": (aggregate.mean(), lambda d: d.mean),
    "mean_uniform": (
        aggregate.mean("uniform"),
        lambda d: np.mean(d.deltas, axis=0),
    ),
    "pinv": (
        aggregate.fipa("pinv", rcond=RCOND, max_step=UNBOUNDED),
        lambda d: d.pinv() @ d.pull,
    ),
    "tikhonov": (
        aggregate.fipa("tikhonov", damping=1e-2, max_step=UNBOUNDED),
        lambda d: d.solve(1e-2 * d.largest)(d.pull),
    ),
    "tikhonov_absolute": (
        aggregate.fipa("tikhonov", damping=0.3, relative=False, max_step=UNBOUNDED),
        lambda d: d.solve(0.3)(d.pull),
    ),
    "damped": (
        aggregate.fipa("damped", damping=1e-2, max_step=UNBOUNDED),
        lambda d: d.solve(1e-2 * d.largest)(d.pull + 1e-2 * d.largest * d.mean),
    ),
    "damped_absolute": (
        aggregate.fipa("damped", damping=0.3, relative=False, max_step=UNBOUNDED),
        lambda d: d.solve(0.3)(d.pull + 0.3 * d.mean),
    ),
    "damped_zero": (
        aggregate.fipa("damped", damping=0.0, max_step=UNBOUNDED),
        lambda d: d.mean + d.pinv(1e-12) @ (d.pull - d.total @ d.mean),
    ),
}
FIPA = [name for name in RULES if not name.startswith("mean")]
each_rule = pytest.mark.parametrize("name", RULES)
each_fipa = pytest.mark.parametrize("name", FIPA)
each_form = pytest.mark.parametrize("form", aggregate.FORMS)
each_rank = pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)


def _round(rank, seed=0):
    """(deltas [C, P], counts [C], eigenvalues [C, R], basis [C, P, R]) of random clients."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(CLIENTS, SIZE, rank)))[0]
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, size=(CLIENTS, rank)), axis=1)
    return draw.normal(size=(CLIENTS, SIZE)), np.array([5, 1, 3, 7]), eigenvalues, basis


def _tree(vectors):
    """The last axis [P] of an array as the parameters' tree."""
    lead = vectors.shape[:-1]
    return {"a": jnp.asarray(vectors[..., :8].reshape(*lead, 2, 4)), "b": jnp.asarray(vectors[..., 8:])}


def _vector(tree):
    return np.concatenate([np.asarray(tree["a"]).reshape(-1), np.asarray(tree["b"])])


def _uploads(deltas, counts, eigenvalues, basis, dtype=np.float64):
    eigenvalues, basis = jnp.asarray(eigenvalues.astype(dtype)), jnp.asarray(basis.astype(dtype))
    sketch = Sketch(eigenvalues, basis, jnp.zeros_like(eigenvalues))
    return aggregate.Uploads(_tree(deltas.astype(dtype)), jnp.asarray(counts), sketch)


@functools.cache
def _compiled(name):
    return jax.jit(RULES[name][0].apply)


def _apply(name, uploads, dtype=np.float64, **hyper):
    """The step [P] and info of a rule, its traced hyper-parameters changed to `hyper`."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), LIKE)
    state = RULES[name][0].init(params)
    if hyper:
        state = state._replace(**{field: jnp.asarray(value, dtype) for field, value in hyper.items()})
    step, _, info = _compiled(name)(uploads, state, params)
    return _vector(step), jax.tree.map(np.asarray, info)


def _close(found, wanted, rtol=1e-9):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * np.linalg.norm(wanted))


@each_rank
@each_rule
def test_step_equals_the_dense_form(x64, name, rank):
    clients = _round(rank)
    step, info = _apply(name, _uploads(*clients))
    _close(step, RULES[name][1](Dense(*clients)))
    assert not info["rejected"].any()


@each_rule
def test_the_order_of_the_clients_does_not_matter(x64, name):
    clients, order = _round(2), np.array([2, 0, 3, 1])
    step, _ = _apply(name, _uploads(*clients))
    permuted, _ = _apply(name, _uploads(*(field[order] for field in clients)))
    _close(permuted, step, 1e-12)


@each_rule
def test_clients_without_examples_take_no_part(x64, name):
    deltas, counts, eigenvalues, basis = _round(2)
    counts = np.array([5, 0, 3, 0])
    deltas[1], basis[3] = 1e9, np.nan  # what they send is never looked at, be it finite or not
    step, info = _apply(name, _uploads(deltas, counts, eigenvalues, basis))
    _close(step, RULES[name][1](Dense(deltas, counts, eigenvalues, basis)))
    assert not info["rejected"].any(), "an absent client is not a bad one"


@pytest.mark.parametrize("field", ["delta", "eigenvalues", "basis"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@each_rule
def test_a_client_that_is_not_finite_is_set_aside(x64, name, value, field):
    deltas, counts, eigenvalues, basis = _round(2)
    without = RULES[name][1](Dense(deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), eigenvalues, basis))
    {"delta": deltas, "eigenvalues": eigenvalues, "basis": basis}[field][2, -1] = value
    step, info = _apply(name, _uploads(deltas, counts, eigenvalues, basis))
    _close(step, without)
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 2)


def test_an_update_whose_norm_overflows_is_set_aside():
    deltas, counts, eigenvalues, basis = _round(2)
    deltas[2] = 1e25
    _, info = _apply("damped", _uploads(deltas, counts, eigenvalues, basis, np.float32), np.float32)
    np.testing.assert_array_equal(info["rejected"], np.arange(CLIENTS) == 2)
    chex.assert_tree_all_finite(info)


def test_an_eigenvalue_rounded_below_zero_is_zero(x64):
    deltas, counts, eigenvalues, basis = _round(2)
    eigenvalues[1, -1] = 0
    expected, _ = _apply("damped", _uploads(deltas, counts, eigenvalues, basis))
    eigenvalues[1, -1] = -1e-9
    _close(_apply("damped", _uploads(deltas, counts, eigenvalues, basis))[0], expected)


@each_rule
def test_without_any_client_left_the_step_is_zero(x64, name):
    deltas, counts, eigenvalues, basis = _round(2)
    for bad, number in ((np.full_like(deltas, np.nan), counts), (deltas, 0 * counts)):
        step, info = _apply(name, _uploads(bad, number, eigenvalues, basis))
        np.testing.assert_array_equal(step, 0)
        chex.assert_tree_all_finite(info)


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4, 0.0])
@each_rule
def test_nearly_collinear_clients_stay_finite_in_float32(x64, name, angle):
    deltas, counts, eigenvalues, basis = _round(2)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, 2 + 2 * CLIENTS)))[0]
    for m in range(CLIENTS):  # subspaces that meet in the first two axes and are `angle` off them
        basis[m] = np.cos(angle) * axes[:, :2] + np.sin(angle) * axes[:, 2 + 2 * m : 4 + 2 * m]
    # The oracle gets what float32 gets, so that the difference is the rule's own.
    clients = tuple(np.asarray(field, np.float32) for field in (deltas, counts, eigenvalues, basis))
    dense = Dense(*(np.asarray(field, float) for field in clients))
    step, info = _apply(name, _uploads(*clients, dtype=np.float32), np.float32)
    assert step.dtype == np.float32
    chex.assert_tree_all_finite((step, info))
    # A backward stable merge is exact for F off by a few eps |F|: times F's condition, of the part that is kept.
    spectrum = np.linalg.eigvalsh(dense.total)
    floor = {"pinv": RCOND, "damped_zero": (8 * np.finfo(np.float32).eps) ** 2}.get(name, 1e-3)
    kept = spectrum[spectrum > floor * spectrum[-1]]
    wanted = RULES[name][1](dense)
    scale = max(np.linalg.norm(wanted), np.linalg.norm(deltas))
    error = np.linalg.norm(step - wanted) / scale
    assert error < 20 * np.finfo(np.float32).eps * np.sqrt(kept[-1] / kept[0])


@each_rank
@pytest.mark.parametrize("name", ["damped", "damped_absolute", "damped_zero"])
def test_damped_passes_identical_updates_unchanged(x64, name, rank):
    deltas, *others = _round(rank)
    deltas[:] = deltas[:1]
    _close(_apply(name, _uploads(deltas, *others))[0], deltas[0], 1e-12)


def test_damping_goes_from_pinv_and_fedavg_to_fedavg_alone(x64):
    clients = _round(2)
    dense, uploads = Dense(*clients), _uploads(*clients)
    _close(_apply("damped", uploads, damping=1e12)[0], dense.mean)
    step, _ = _apply("damped", uploads, damping=1e-12)
    span = dense.pinv() @ dense.total  # the projector on span(F)
    pinv = RULES["pinv"][1](dense)
    _close(span @ step, pinv, 1e-8)
    _close(step - span @ step, dense.mean - span @ dense.mean, 1e-8)
    assert np.linalg.norm(pinv - span @ dense.mean) > 0.1, "pinv and FedAvg are too close for this test"


@each_rank
@each_fipa
def test_equal_curvatures_give_fedavg(x64, name, rank):
    deltas, counts, eigenvalues, basis = _round(rank)
    eigenvalues[:], basis[:] = eigenvalues[:1], basis[:1]
    dense = Dense(deltas, counts, eigenvalues, basis)
    step, _ = _apply(name, _uploads(deltas, counts, eigenvalues, basis))
    if name.startswith("damped"):
        _close(step, dense.mean)
    elif name == "pinv":  # inside the span; outside it nothing moves
        _close(step, dense.pinv() @ dense.total @ dense.mean)
    else:  # tikhonov shrinks the mean by lam / (lam + beta)
        beta = 0.3 if name == "tikhonov_absolute" else 1e-2 * dense.largest
        values, vectors = np.linalg.eigh(dense.total)
        _close(step, vectors @ (values / (values + beta) * (vectors.T @ dense.mean)))


@pytest.mark.parametrize("name", ["pinv", "damped_zero"])
def test_least_squares_is_solved_in_one_round(x64, name):
    draw = np.random.default_rng(2)
    examples = 15
    x, y = draw.normal(size=(CLIENTS, examples, SIZE)), draw.normal(size=(CLIENTS, examples))
    start = draw.normal(size=SIZE)
    local = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y, strict=True)])
    eigenvalues, basis = np.linalg.eigh(np.einsum("cnp,cnq->cpq", x, x) / examples)
    clients = local - start, np.full(CLIENTS, examples), eigenvalues[:, ::-1], basis[:, :, ::-1]
    step, _ = _apply(name, _uploads(*clients))
    _close(start + step, np.linalg.lstsq(x.reshape(-1, SIZE), y.reshape(-1), rcond=None)[0])
    mean, _ = _apply("mean", _uploads(*clients))
    assert np.linalg.norm(mean - step) > 0.01 * np.linalg.norm(step), "FedAvg solves it too: a test of nothing"


@each_form
def test_uniform_weights_do_not_look_at_the_number_of_examples(x64, form):
    deltas, _, eigenvalues, basis = _round(SIZE)  # where subspaces meet: apart from each other, pinv has no use for w_m
    many, one = (_uploads(deltas, np.array(counts), eigenvalues, basis) for counts in ([5, 0, 3, 70], [1, 0, 1, 1]))
    rule, params = aggregate.fipa(form, damping=1e-2, rcond=RCOND, weighting="uniform"), jax.tree.map(jnp.asarray, LIKE)
    uniform = _vector(jax.jit(rule.apply)(many, rule.init(params), params)[0])
    _close(uniform, _apply(form, one)[0], 1e-12)
    assert np.linalg.norm(uniform - _apply(form, many)[0]) > 0.01 * np.linalg.norm(uniform)


@each_form
def test_max_step_shortens_the_step_and_does_not_turn_it(x64, form):
    clients = _round(2)
    uploads, longest = _uploads(*clients), np.linalg.norm(clients[0], axis=1).max()
    free, free_info = _apply(form, uploads)
    bound = np.linalg.norm(free) / longest / 2
    step, info = _apply(form, uploads, max_step=bound)
    _close(step, free / 2, 1e-12)
    np.testing.assert_allclose(info["step_ratio"], bound, rtol=1e-12)
    np.testing.assert_allclose(free_info["step_ratio"], 2 * bound, rtol=1e-12)
    np.testing.assert_array_equal(_apply(form, uploads, max_step=3 * bound)[0], free)


@each_rank
@each_fipa
def test_info_equals_its_dense_values(x64, name, rank):
    clients = _round(rank)
    dense, (step, info) = Dense(*clients), _apply(name, _uploads(*clients))
    spectrum = np.linalg.eigvalsh(dense.total)[::-1][: min(CLIENTS * rank, SIZE)]
    np.testing.assert_allclose(info["spectrum"], spectrum, rtol=1e-10)
    absolute = {"tikhonov_absolute": 0.3, "damped_absolute": 0.3}.get(name)
    beta = absolute or {"tikhonov": 1e-2, "damped": 1e-2}.get(name, 0) * spectrum[0]
    np.testing.assert_allclose(info["effective_rank"], np.sum(spectrum / (spectrum + beta)), rtol=1e-10)
    np.testing.assert_allclose(info["condition"], (spectrum[0] + beta) / (spectrum[-1] + beta), rtol=1e-9)
    length, average = np.linalg.norm(step), np.linalg.norm(dense.mean)
    np.testing.assert_allclose(info["fedavg_cosine"], step @ dense.mean / (length * average), rtol=1e-10)
    np.testing.assert_allclose(info["fedavg_norm_ratio"], length / average, rtol=1e-10)
    np.testing.assert_allclose(info["step_ratio"], length / np.linalg.norm(dense.deltas, axis=1).max(), rtol=1e-10)


def test_pinv_counts_the_directions_above_its_cut_off(x64):
    clients = _round(2)
    spectrum = np.linalg.eigvalsh(Dense(*clients).total)[::-1][:8]
    rcond = np.sqrt(spectrum[4] * spectrum[5]) / spectrum[0]  # between the fifth and the sixth
    step, info = _apply("pinv", _uploads(*clients), rcond=rcond)
    dense = Dense(*clients)
    _close(step, dense.pinv(rcond) @ dense.pull)
    np.testing.assert_allclose(info["effective_rank"], 5, rtol=1e-12)
    np.testing.assert_allclose(info["condition"], spectrum[0] / spectrum[4], rtol=1e-10)


@each_form
def test_hyper_parameters_are_traced(x64, form):
    """A sweep compiles once, and a vmap over the state is the same sweep."""
    uploads, params = _uploads(*_round(2)), jax.tree.map(jnp.asarray, LIKE)
    rule = aggregate.fipa(form)
    chex.clear_trace_counter()
    apply = jax.jit(chex.assert_max_traces(lambda *args: rule.apply(*args)[0], 1))
    swept = jnp.array([1e-3, 1e-1, 0.3])
    states = [rule.init(params)._replace(damping=value, rcond=value) for value in swept]
    steps = [apply(uploads, state, params) for state in states]
    dense = Dense(*_round(2))
    beta = 0.3 * dense.largest
    wanted = {
        "pinv": dense.pinv(0.3) @ dense.pull,
        "tikhonov": dense.solve(beta)(dense.pull),
        "damped": dense.solve(beta)(dense.pull + beta * dense.mean),
    }
    _close(_vector(steps[2]), wanted[form])
    assert np.linalg.norm(_vector(steps[0]) - _vector(steps[2])) > 1e-3, "the hyper-parameter does nothing"
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(lambda *args: rule.apply(*args)[0], in_axes=(None, 0, None)))(uploads, stacked, params)
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps), rtol=1e-9, atol=1e-12
    )


@each_form
def test_fipa_step_equals_the_aggregator(x64, form):
    uploads = _uploads(*_round(2))
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
    deltas, counts, *_ = clients = _round(2)
    step, _, _ = aggregate.mean().apply(aggregate.Uploads(_tree(deltas), jnp.asarray(counts)), (), LIKE)
    _close(_vector(step), Dense(*clients).mean)


def test_what_does_not_fit_is_named():
    deltas, counts, eigenvalues, basis = (jnp.asarray(field, jnp.float32) for field in _round(2))
    delta, params = _tree(deltas), jax.tree.map(jnp.asarray, LIKE)
    sketch = lambda eigenvalues, basis: Sketch(eigenvalues, basis, jnp.zeros_like(eigenvalues))
    cases = {
        r"uploads\.sketch.*None": (delta, counts, None),
        r"num_examples.*\[C\].*\(\)": (delta, counts[0], sketch(eigenvalues, basis)),
        r"uploads\.delta.*leading clients axis": (delta, counts[:3], sketch(eigenvalues, basis)),
        r"uploads\.delta.*needed": ({"a": delta["a"]}, counts, sketch(eigenvalues, basis)),
        r"uploads\.sketch.*C = 4, P = 12.*\(4, 11, 2\)": (delta, counts, sketch(eigenvalues, basis[:, :11])),
        r"uploads\.sketch.*\(3, 2\)": (delta, counts, sketch(eigenvalues[:3], basis)),
        r"uploads\.sketch.*\(4, 1\)": (delta, counts, sketch(eigenvalues[:, :1], basis)),
    }
    rule = aggregate.fipa()
    for words, uploads in cases.items():
        with pytest.raises(ValueError, match=words):
            rule.apply(aggregate.Uploads(*uploads), rule.init(params), params)
    with pytest.raises(ValueError, match=r"aggregator\.form: unknown form 'dampd'; known: damped, pinv, tikhonov"):
        aggregate.fipa("dampd")
    for rule in (aggregate.fipa, aggregate.mean):
        with pytest.raises(ValueError, match=r"aggregator\.weighting: unknown 'size'; known: examples, uniform"):
            rule(weighting="size")
