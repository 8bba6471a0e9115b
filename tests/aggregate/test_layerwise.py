"""Rules by Kronecker factors beside dense systems in NumPy: forms, kinds, past rounds, bounds and what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import apply, assert_close

from fipa_jax import aggregate
from fipa_jax.aggregate.layerwise import kronecker
from fipa_jax.curvature.layer_factors import LayerFactors, packed

CLIENTS, BETA = 3, 0.3
LIKE = {"conv": {"kernel": np.zeros((1, 3, 1, 2))}, "dense": {"bias": np.zeros(2), "kernel": np.zeros((3, 2))}}
LIKE |= {"norm": {"scale": np.zeros(2)}}
SIDES = {"conv/kernel": (3, 2), "dense/kernel": (4, 2)}  # a, the bias in it, and g
KINDS = ("foof", "kfac", "regmean")


class Clients:
    """Random clients, their factors, and the layers' systems as dense matrices over row-major [a, g]."""

    def __init__(self, kind, seed=0):
        draw = np.random.default_rng(seed)
        self.delta = jax.tree.map(lambda leaf: draw.normal(size=(CLIENTS, *leaf.shape)), LIKE)
        self.counts = np.array([5, 1, 3])
        self.factors, self.kind = {}, kind
        for path, sides in SIDES.items():
            roots = [draw.normal(size=(CLIENTS, side, side)) for side in sides]
            self.factors[path] = [root @ root.swapaxes(1, 2) for root in roots]

    @property
    def uploads(self):
        halves = [
            {path: jnp.stack([packed(jnp.asarray(m)) for m in pair[axis]]) for path, pair in self.factors.items()}
            for axis in (0, 1)
        ]
        sketch = LayerFactors(halves[0], halves[1] if self.kind == "kfac" else {})
        return aggregate.Uploads(jax.tree.map(jnp.asarray, self.delta), jnp.asarray(self.counts), sketch)

    def vectors(self, path):
        """[C, a g], the layer's updates."""
        kernel = self.delta[path.partition("/")[0]]["kernel"].reshape(CLIENTS, -1, 2)
        bias = [self.delta["dense"]["bias"][:, None]] if path == "dense/kernel" else []
        return np.concatenate([kernel, *bias], axis=1).reshape(CLIENTS, -1)

    def dense(self, path):
        """[C, a g, a g], H_m of the layer."""
        inputs, outputs = self.factors[path]
        if self.kind == "regmean":
            inputs = 0.9 * inputs + 0.1 * np.stack([np.diag(np.diag(m)) for m in inputs])
        if self.kind != "kfac":
            outputs = np.broadcast_to(np.eye(outputs.shape[1]), outputs.shape)
        return np.stack([np.kron(a, g) for a, g in zip(inputs, outputs, strict=True)])

    def wanted(self, form, beta):
        """{path: step}, of the layers, by dense algebra."""
        weights, steps = self.counts / self.counts.sum(), {}
        for path in SIDES:
            each, deltas = self.dense(path), self.vectors(path)
            total = np.tensordot(weights, each, 1)
            extra = beta if form == "damped" else 0
            pull = np.einsum("c,cpq,cq->p", weights, each + extra * np.eye(total.shape[0]), deltas)
            steps[path] = np.linalg.solve(total + beta * np.eye(len(total)), pull)
        return steps


def _as_vectors(step):
    """{path: [a g]} of a step in the parameters' tree."""
    dense = np.concatenate([step["dense"]["kernel"], step["dense"]["bias"][None]])
    return {"conv/kernel": np.asarray(step["conv"]["kernel"]).reshape(-1), "dense/kernel": dense.reshape(-1)}


@functools.cache
def _rule(kind, form, **options):
    options = {"relative": False, "damping": BETA, "limits": aggregate.Limits(0, 0, 0, 0)} | options
    return kronecker(layers=aggregate.LayerOptions(kind, iterations=40), form=form, **options)


def _step(rule, clients, state=None):
    params = jax.tree.map(jnp.asarray, LIKE)
    return jax.jit(functools.partial(apply, rule))(clients.uploads, state or rule.init(params), params)


FORMS = [("kfac", "damped"), ("regmean", "damped")]
MORE_FORMS = [("foof", "damped"), ("foof", "pinv"), ("kfac", "tikhonov")]


@pytest.mark.parametrize(
    ("kind", "form"), [*FORMS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_FORMS)]
)
def test_a_step_solves_the_layers_systems(x64, kind, form):
    clients, beta = Clients(kind), 0 if form == "pinv" else BETA
    step, _, info = _step(_rule(kind, form), clients)
    for path, wanted in clients.wanted(form, beta).items():
        assert_close(_as_vectors(step)[path], wanted, 1e-8)
    weights = clients.counts / clients.counts.sum()
    assert_close(step["norm"]["scale"], weights @ clients.delta["norm"]["scale"])  # of no layer: the mean
    assert info["solve_residual"] < 1e-9


@pytest.mark.parametrize("kind", ["foof", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_identical_updates_pass_and_a_large_damping_is_the_mean(x64, kind):
    """The weights sum to the identity."""
    clients = Clients(kind)
    far = _step(_rule(kind, "damped", damping=1e9), clients)[0]
    weights = clients.counts / clients.counts.sum()
    jax.tree.map(lambda one, each: assert_close(one, np.tensordot(weights, each, 1), 1e-6), far, clients.delta)
    clients.delta = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), clients.delta)
    same = _step(_rule(kind, "damped"), clients)[0]
    jax.tree.map(lambda one, each: assert_close(one, each[0]), same, clients.delta)


def test_past_rounds_are_one_more_client_that_stays(x64):
    """foof: decayed sums of A, exactly; in the first round the cohort's own curvature stands in."""
    decay, first, second = 0.5, Clients("foof", 1), Clients("foof", 2)
    rule = _rule("foof", "damped", past=aggregate.PastRounds("prior", decay=decay))
    _, state, _ = _step(rule, first)
    step, state, info = _step(rule, second, state)
    size = second.counts.sum()
    before = decay * first.counts.sum() / (1 - decay)
    for path in SIDES:
        old = np.tensordot(first.counts / first.counts.sum(), first.dense(path), 1)
        total = (np.tensordot(second.counts, second.dense(path), 1) + before * old) / (size + before)
        identity = BETA * np.eye(len(total))
        each = second.dense(path) + identity
        pull = np.einsum("c,cpq,cq->p", second.counts / (size + before), each, second.vectors(path))
        assert_close(_as_vectors(step)[path], np.linalg.solve(total + identity, pull), 1e-8)
    assert_close(info["past_share"], before / (size + before))


def test_a_client_whose_factors_are_broken_is_left_out(x64):
    clients, rule = Clients("kfac"), _rule("kfac", "damped")
    uploads = clients.uploads
    params = jax.tree.map(jnp.asarray, LIKE)
    run = jax.jit(functools.partial(apply, rule))
    alone = run(uploads._replace(num_examples=jnp.array([5, 0, 3])), rule.init(params), params)[0]
    for axis, value, reason in ((0, jnp.nan, "sketch_not_finite"), (1, -9.0, "curvature_negative")):
        halves = dict(uploads.sketch[axis])
        halves["dense/kernel"] = halves["dense/kernel"].at[1, 0].set(value)
        broken = uploads._replace(sketch=uploads.sketch._replace(**{uploads.sketch._fields[axis]: halves}))
        step, _, info = run(broken, rule.init(params), params)
        assert info["reasons"][reason].tolist() == [False, True, False]
        jax.tree.map(np.testing.assert_array_equal, step, alone)


@pytest.mark.slow
def test_bounds_shorten_the_step_and_cap_a_client(x64):
    clients = Clients("kfac")
    free = _step(_rule("kfac", "damped"), clients)
    most = float(free[2]["divergence"]) / 4
    bound = _step(_rule("kfac", "damped", limits=aggregate.Limits(0, most, 0, 0)), clients)
    assert_close(bound[2]["divergence"], most, 1e-6)
    jax.tree.map(lambda one, other: assert_close(2 * one, other, 1e-6), bound[0], free[0])
    clients.factors = {path: [a * np.array([1, 1, 1e6])[:, None, None], g] for path, (a, g) in clients.factors.items()}
    capped = _step(_rule("kfac", "damped", limits=aggregate.Limits(0, 0, 0, 10)), clients)
    assert capped[2]["capped"].tolist() == [False, False, True]


def test_where_most_clients_send_no_curvature_the_cap_leaves_the_others_theirs(x64):
    clients = Clients("foof")
    for sides in clients.factors.values():
        sides[0][:2] = 0  # two of three
    step, _, info = _step(_rule("foof", "damped", limits=aggregate.Limits(0, 0, 0, 1000)), clients)
    assert not info["capped"].any()
    for path, wanted in clients.wanted("damped", BETA).items():
        assert_close(_as_vectors(step)[path], wanted, 1e-8)


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(ValueError, match=r"aggregator.layers.kind: .*foof"):
        kronecker(layers=aggregate.LayerOptions("kfak"))
    with pytest.raises(ValueError, match=r"aggregator.past.kind: .*decayed sums"):
        kronecker(past=aggregate.PastRounds("latest"))
    with pytest.raises(ValueError, match=r"aggregator.past.decay: needs a number in \[0, 1\)"):
        kronecker(past=aggregate.PastRounds("prior", decay=1.0))
    with pytest.raises(ValueError, match=r"aggregator.past.adaptive: .*not for 'kronecker'"):
        kronecker(past=aggregate.PastRounds("prior", adaptive=True))
    uploads = Clients("foof").uploads
    short = {path: half[:, :-1] for path, half in uploads.sketch.inputs.items()}
    with pytest.raises(ValueError, match=r"uploads.sketch: needed \(3, 6\) at 'conv/kernel'"):
        aggregate.receive(uploads._replace(sketch=LayerFactors(short, {})), LIKE)
