"""Within `jax.shard_map` at its defaults every device gets what it would get alone, whatever differs between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from fipa_jax import aggregate
from fipa_jax.aggregate import PastRounds, Uploads
from fipa_jax.aggregate import merged_curvature as merge
from fipa_jax.curvature.common_basis import Core
from fipa_jax.curvature.products import make_ggn_diagonal, make_gradient
from fipa_jax.curvature.sketch import Diagonal, Sketch, make_sketch

DEVICES, CLIENTS, SIZE, RANK = 2, 3, 12, 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", 1)


def _each(function):
    """function(shared, own) -> what every device gets, stacked."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])

    def body(shared, own):
        return jax.tree.map(lambda x: x[None], function(shared, jax.tree.map(lambda x: x[0], own)))

    spread = PartitionSpec("d")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(PartitionSpec(), spread), out_specs=spread))


def _equals_alone(function, shared, own):
    together = _each(function)(shared, own)
    for device in range(DEVICES):
        alone = jax.jit(function)(shared, jax.tree.map(lambda x, device=device: x[device], own))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[device], b, rtol=1e-4, atol=1e-5)


def _sent():
    """What the clients of each device send: [D, C, ...]."""
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(DEVICES, CLIENTS, SIZE, RANK)))[0]
    values = -np.sort(-draw.uniform(0.5, 4, size=(DEVICES, CLIENTS, RANK)), axis=2)
    counts = draw.integers(1, 9, (DEVICES, CLIENTS))
    fields = draw.normal(size=(DEVICES, CLIENTS, SIZE)), values, basis, counts
    return tuple(jnp.asarray(x, jnp.float32) for x in fields)


def _rounds(rule, sent, number=2):
    """The parameters after some rounds of what one device's clients send."""
    delta, values, basis, counts = sent
    params, loss = jnp.zeros(SIZE), values[:, 0]
    sketch = Sketch(values, basis)
    if rule.needs.curvature == "diagonal":
        sketch = Diagonal(jnp.sum(basis**2 * values[:, None], axis=2))
    if rule.needs.curvature == "core":  # of all SIZE directions
        sketch = Core(jnp.einsum("cpr,cr,cqr->cpq", basis, values, basis))
    uploads = Uploads(delta, counts, sketch, loss, loss, jnp.arange(CLIENTS, dtype=jnp.int32))
    state = rule.init(params)
    for _ in range(number):
        received, info = aggregate.receive(uploads, params)
        step, state, *_ = aggregate.step_of(rule, received, state, params, info)
        params = params + step
    return params


RULES = {
    "pinv": {"form": "pinv", "merge": "tsqr"},
    "tikhonov": {"form": "tikhonov", "merge": "qr"},
    "trust": {"trust": True},
    "own_damping": {"own_damping": True, "relative": False},
    "prior": {"past": PastRounds("prior", rank=3)},
    "targets": {"past": PastRounds("targets", rank=3, length=2)},
    "latest": {"past": PastRounds("latest", rank=RANK, num_clients=6)},
}


@pytest.mark.parametrize("name", [*RULES, "mean", "diagonal", "span"])
def test_every_rule_can_be_traced(name):
    rule = aggregate.fipa(**RULES[name]) if name in RULES else aggregate.AGGREGATORS[name]()
    run = _each(lambda _, sent: _rounds(rule, sent))
    assert run.eval_shape((), _sent()).shape == (DEVICES, SIZE)


def _step(sent):
    delta, values, basis, counts = sent
    return aggregate.fipa_step(delta, Sketch(values, basis), counts)[0]


@pytest.mark.parametrize("differs", [(0, 1, 2, 3), (3,)], ids=["all", "num_examples"])
def test_a_step_is_that_of_one_device(differs):
    sent = _sent()
    own, shared = [sent[i] for i in differs], [x[0] for x in sent]

    def step(shared, own):
        given = dict(zip(differs, own, strict=True))
        return _step([given.get(i, x) for i, x in enumerate(shared)])

    _equals_alone(step, shared, own)


def test_a_gradient_through_the_step_is_that_of_one_device():
    def slope(_, sent):
        return jax.grad(lambda delta: jnp.sum(_step((delta, *sent[1:])) ** 2))(sent[0])

    _equals_alone(slope, (), _sent())


EXAMPLES, WIDTH, CLASSES = 12, 4, 3


def _outputs(params, batch):
    return batch["x"] @ params["w"] + params["b"][None]


def _loss(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def _data():
    """(params, (batch, mask) of each device)."""
    draw = np.random.default_rng(1)
    params = {"w": jnp.asarray(draw.normal(size=(WIDTH, CLASSES)), jnp.float32), "b": jnp.zeros(CLASSES)}
    x = jnp.asarray(draw.normal(size=(DEVICES, EXAMPLES, WIDTH)), jnp.float32)
    batch = {"x": x, "y": jnp.asarray(draw.integers(0, CLASSES, (DEVICES, EXAMPLES)))}
    return params, (batch, jnp.asarray(draw.uniform(size=(DEVICES, EXAMPLES)) > 0.3))


def _sketched(params, batch, mask, start=None, **options):
    make = make_sketch(_outputs, _loss, rank=3, features=lambda params, batch: batch["x"], **options)
    sketch = make(jax.random.key(0), params, batch, mask, start)
    return sketch.eigenvalues, sketch.report.trace, sketch.basis @ (sketch.basis.T * sketch.eigenvalues[:, None])


SEARCHES = [("subspace", "matrix_free"), ("lanczos", "matrix_free"), ("lanczos", "rows"), ("rows", "rows")]


@pytest.mark.parametrize("micro_batch", [0, 5])
@pytest.mark.parametrize(("solver", "jacobian"), [*SEARCHES, ("head", "head")])
def test_every_search_can_be_traced_whatever_differs(solver, jacobian, micro_batch):
    params, (batch, mask) = _data()
    options = {"solver": solver, "jacobian": jacobian, "micro_batch": micro_batch}
    sketched = functools.partial(_sketched, **options)
    first = jax.tree.map(lambda x: x[0], batch)
    start = jnp.stack([jnp.eye(WIDTH * CLASSES + CLASSES, 3)] * DEVICES)
    _each(lambda params, own: sketched(params, *own)).eval_shape(params, (batch, mask))
    _each(lambda params, own: sketched(params, own, None)).eval_shape(params, batch)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    _each(lambda batch, own: sketched(own, batch, None)).eval_shape(first, many)
    _each(lambda given, own: sketched(*given, None, own)).eval_shape((params, first), start)


def test_curvature_and_gradients_are_those_of_one_device_and_no_sum_over_all():
    params, own = _data()

    def seen(params, own):
        batch, mask = own
        diagonal = make_ggn_diagonal(_outputs, _loss, micro_batch=5)(params, batch, mask)
        gradient = make_gradient(_outputs, _loss)(params, batch, mask)
        return diagonal, gradient, _sketched(params, batch, mask, micro_batch=5)

    _equals_alone(seen, params, own)
