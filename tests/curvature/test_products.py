"""Curvature against the dense matrix 1/N sum_n J_n^T L_n J_n, with L_n in closed form, in every way of seeing it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax import backend
from fipa_jax.curvature import products as curvature

NUM_EXAMPLES, WIDTH, HIDDEN, NUM_OUTPUTS = 7, 3, 4, 3
MASK = np.array([True, False, True, True, True, False, True])  # padding anywhere, not at the end alone
EVERYONE = np.ones(NUM_EXAMPLES, bool)
BOUNDARY_WEIGHT = 7.0
HEAD = ("b2", "w2")  # the last layer's leaves


def _hidden(params, batch):
    return jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])


def _network(params, batch):
    return _hidden(params, batch) @ params["w2"] + params["b2"][None]


def _two_fields(params, batch):
    out = _network(params, batch)
    return {"boundary": out[:, :2], "interior": out[:, 2]}


def _two_fields_loss(out, batch):
    return (BOUNDARY_WEIGHT * jnp.sum(out["boundary"] ** 2, axis=1) + out["interior"] ** 2) / 2


def _softmax_hessian(out):
    p = np.exp(out) / np.exp(out).sum()
    return np.diag(p) - np.outer(p, p)


def _bernoulli_hessian(out):
    p = 1 / (1 + np.exp(-out))
    return np.diag(p * (1 - p))


# name: (outputs, loss, L of one example's outputs [K])
LOSSES = {
    "half_squared": (
        _network,
        lambda out, batch: jnp.sum((out - batch["target"]) ** 2, axis=1) / 2,
        lambda out: np.eye(NUM_OUTPUTS),
    ),
    "softmax": (
        _network,
        lambda out, batch: optax.softmax_cross_entropy_with_integer_labels(out, batch["label"]),
        _softmax_hessian,
    ),
    "bernoulli": (
        _network,
        lambda out, batch: jnp.sum(optax.sigmoid_binary_cross_entropy(out, batch["bit"]), axis=1),
        _bernoulli_hessian,
    ),
    "weighted_residuals_in_a_tree": (
        _two_fields,
        _two_fields_loss,
        lambda out: np.diag([BOUNDARY_WEIGHT, BOUNDARY_WEIGHT, 1.0]),
    ),
}
# Not convex in the outputs: H has negative eigenvalues.
SIGNS = np.array([2.0, -1.0, 1.0])
SADDLE = (_network, lambda out, batch: jnp.sum(jnp.asarray(SIGNS, out.dtype)[None] * out**2, axis=1) / 2)
OF_A_TREE = "weighted_residuals_in_a_tree"
# A tree of outputs is no last layer's; all examples at once are a single micro-batch.
WAYS = [(name, jacobian, 3) for name in LOSSES for jacobian in curvature.JACOBIANS]
WAYS = [way for way in WAYS if way[:2] != (OF_A_TREE, "head")] + [("softmax", way, 0) for way in curvature.JACOBIANS]


def _problem():
    draw = np.random.default_rng(0)
    shapes = {"w1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, NUM_OUTPUTS), "b2": (NUM_OUTPUTS,)}
    params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}
    batch = {
        "x": draw.normal(size=(NUM_EXAMPLES, WIDTH)),
        "target": draw.normal(size=(NUM_EXAMPLES, NUM_OUTPUTS)),
        "label": draw.integers(NUM_OUTPUTS, size=NUM_EXAMPLES),
        "bit": draw.integers(2, size=(NUM_EXAMPLES, NUM_OUTPUTS)).astype(float),
    }
    return params, {name: jnp.asarray(field) for name, field in batch.items()}


@functools.cache
def _outputs_and_jacobians(outputs):
    """Outputs [N, K] and Jacobians [N, K, P] of all examples."""
    params, batch = _problem()
    flat, unravel = ravel_pytree(params)

    def of(example):
        function = lambda theta: ravel_pytree(outputs(unravel(theta), jax.tree.map(lambda x: x[None], example)))[0]
        return function(flat), jax.jacobian(function)(flat)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(of))(batch))


def _dense(outputs, hessian, mask):
    out, jacobian = _outputs_and_jacobians(outputs)
    return sum(jacobian[n].T @ hessian(out[n]) @ jacobian[n] for n in np.flatnonzero(mask)) / mask.sum()


def _restricted(leaves):
    """(the chosen leaves, a model's function of them alone, their places among all parameters [P])."""
    params, _ = _problem()
    places = jax.tree.map(
        lambda leaf, name: jnp.full(leaf.shape, name in leaves), params, {name: name for name in params}
    )
    chosen = {name: params[name] for name in leaves}
    return chosen, lambda model: lambda theta, batch: model(params | theta, batch), np.asarray(ravel_pytree(places)[0])


def _seen(outputs, loss, mask, jacobian, **options):
    """(what `ggn` gives, its products those with all unit vectors, i.e. the matrix; the places of its parameters)."""
    leaves = HEAD if jacobian == "head" else tuple(_problem()[0])
    chosen, of, places = _restricted(leaves)
    features = of(_hidden) if jacobian == "head" else None
    ggn = curvature.make_ggn(of(outputs), loss, jacobian=jacobian, features=features, **options)

    @jax.jit
    def see(batch, mask):
        matrix = ggn(chosen, batch, mask)
        assert (matrix.size, matrix.dtype) == (places.sum(), chosen["w2"].dtype)
        product = matrix.product(jnp.eye(matrix.size))
        return matrix._replace(product=product, size=None, dtype=None, left_out=None)

    return jax.tree.map(np.asarray, see(_problem()[1], None if mask is None else jnp.asarray(mask))), places


@pytest.mark.parametrize(("name", "jacobian", "micro_batch"), WAYS)
def test_products_trace_and_rows_equal_the_dense_matrix(x64, name, jacobian, micro_batch):
    outputs, loss, hessian = LOSSES[name]
    found, places = _seen(outputs, loss, MASK, jacobian, micro_batch=micro_batch)
    dense = _dense(outputs, hessian, MASK)[np.ix_(places, places)]
    np.testing.assert_allclose(found.product, dense, rtol=1e-10, atol=1e-12)
    assert (found.trace is not None, found.rows is not None) == (jacobian != "matrix_free", jacobian == "rows")
    if found.trace is not None:
        np.testing.assert_allclose(found.trace, np.trace(dense), rtol=1e-12)
    if found.rows is not None:
        np.testing.assert_allclose(found.rows.T @ found.rows, dense, rtol=1e-10, atol=1e-12)
    assert not found.indefinite


def test_the_head_may_be_a_kernel_alone(x64):
    """Any shapes but a last layer's are an error, and so are outputs that are no array."""
    _, loss, hessian = LOSSES["softmax"]
    params, batch = _problem()
    head = {"w2": params["w2"]}
    outputs = lambda theta, batch: _hidden(params, batch) @ theta["w2"]
    features = lambda theta, batch: _hidden(params, batch)
    ggn = curvature.make_ggn(outputs, loss, jacobian="head", features=features)
    found = jax.jit(lambda theta: (lambda m: (m.product(jnp.eye(m.size)), m.trace))(ggn(theta, batch)))
    product, trace = found(head)
    phi = np.asarray(_hidden(params, batch))
    rows = [(np.kron(x[:, None], np.eye(NUM_OUTPUTS)), x @ np.asarray(params["w2"])) for x in phi]
    dense = sum(jacobian @ hessian(out) @ jacobian.T for jacobian, out in rows) / NUM_EXAMPLES
    np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(trace, np.trace(dense), rtol=1e-12)
    in_a_tree = lambda theta, batch: {"out": outputs(theta, batch)}
    for model, wrong in ((_network, params), (outputs, {"w2": params["w2"], "c": params["b1"]}), (in_a_tree, head)):
        with pytest.raises(ValueError, match=r"sketch\.solver, or jacobian: head needs trainable parameters"):
            jax.eval_shape(curvature.make_ggn(model, loss, jacobian="head", features=features), wrong, batch)


@pytest.mark.parametrize("jacobian", curvature.JACOBIANS)
def test_padding_changes_nothing_and_an_empty_client_has_no_curvature(x64, jacobian):
    outputs, loss, _ = LOSSES["softmax"]
    chosen, of, places = _restricted(HEAD if jacobian == "head" else tuple(_problem()[0]))
    _, batch = _problem()
    garbage = batch | {"x": jnp.where(jnp.asarray(MASK)[:, None], batch["x"], 1e6)}
    ggn = curvature.make_ggn(of(outputs), loss, jacobian=jacobian, micro_batch=3, features=of(_hidden))
    size = places.sum()
    matrix = jax.jit(lambda batch, mask: ggn(chosen, batch, mask).product(jnp.eye(size)))
    np.testing.assert_array_equal(matrix(garbage, jnp.asarray(MASK)), matrix(batch, jnp.asarray(MASK)))
    np.testing.assert_array_equal(matrix(garbage, jnp.zeros(NUM_EXAMPLES, bool)), np.zeros([size, size]))


COUNTS = [0, 1, 3, 4, NUM_EXAMPLES]  # of examples that are there, in micro-batches of three


def _every_way(model):
    """{name: (batch, mask) -> arrays}: all that goes over micro-batches, of a model's outputs."""
    _, loss, _ = LOSSES["softmax"]
    params, _ = _problem()

    def matrix(jacobian):
        chosen, of, places = _restricted(HEAD if jacobian == "head" else tuple(params))
        ggn = curvature.make_ggn(of(model), loss, jacobian=jacobian, micro_batch=3, features=of(_hidden))
        seen = lambda found: (found.product(jnp.eye(int(places.sum()))), found.trace)
        return lambda batch, mask: seen(ggn(chosen, batch, mask))

    diagonal = curvature.make_ggn_diagonal(model, loss, micro_batch=3)
    return {way: matrix(way) for way in curvature.JACOBIANS} | {"diagonal": lambda *one: diagonal(params, *one)}


@pytest.mark.parametrize("way", [*curvature.JACOBIANS, "diagonal"])
def test_the_network_is_not_evaluated_for_micro_batches_behind_the_last_example(x64, way):
    evaluated = []

    @jax.custom_jvp
    def note(x):
        jax.debug.callback(lambda: evaluated.append(1))
        return x

    note.defjvp(lambda primals, tangents: (note(*primals), *tangents))
    ways = _every_way(lambda params, batch: note(_network(params, batch)))
    see = jax.jit(ways[way])

    def evaluations(count):
        evaluated.clear()
        jax.block_until_ready(see(_problem()[1], jnp.arange(NUM_EXAMPLES) < count))
        jax.effects_barrier()
        return len(evaluated)

    in_one = evaluations(3)
    assert in_one > 0
    assert [evaluations(count) for count in COUNTS] == [in_one * -(-count // 3) for count in COUNTS]


@pytest.mark.slow
@pytest.mark.parametrize("way", [*curvature.JACOBIANS, "diagonal"])
def test_clients_side_by_side_see_as_one_alone(x64, way):
    see = jax.jit(_every_way(_network)[way])
    _, batch = _problem()
    masks = jnp.arange(NUM_EXAMPLES)[None] < jnp.array(COUNTS)[:, None]
    together = jax.jit(jax.vmap(see, in_axes=(None, 0)))(batch, masks)
    for i, mask in enumerate(masks):
        alone = jax.tree.map(lambda leaf: leaf[i], together)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), alone, see(batch, mask))


def test_without_a_mask_all_examples_count(x64):
    outputs, loss, hessian = LOSSES["softmax"]
    found, _ = _seen(outputs, loss, None, "matrix_free", micro_batch=3)
    np.testing.assert_allclose(found.product, _dense(outputs, hessian, EVERYONE), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_rank", [1, NUM_OUTPUTS])
def test_loss_rank_takes_the_largest_directions_of_each_loss_hessian(x64, loss_rank):
    outputs, loss, hessian = LOSSES["softmax"]

    def largest(out):
        values, vectors = np.linalg.eigh(hessian(out))
        return vectors[:, -loss_rank:] * values[-loss_rank:] @ vectors[:, -loss_rank:].T

    found, _ = _seen(outputs, loss, MASK, "rows", micro_batch=3, loss_rank=loss_rank)
    assert found.rows.shape[0] == 9 * loss_rank  # three micro-batches of three
    np.testing.assert_allclose(found.product, _dense(outputs, largest, MASK), rtol=1e-9, atol=1e-12)
    whole = _dense(outputs, hessian, MASK)
    left_out = np.linalg.eigvalsh(whole - found.product)
    assert left_out[0] > -1e-12, "what is left out is positive semi-definite"
    assert (left_out[-1] > 1e-3 * np.trace(whole)) == (loss_rank < NUM_OUTPUTS) == found.truncated


def test_a_loss_that_is_not_convex_in_the_outputs_is_flagged_and_its_negative_part_left_out(x64):
    outputs, loss = SADDLE
    found, _ = _seen(outputs, loss, MASK, "rows", micro_batch=3)
    assert found.indefinite
    convex = _dense(outputs, lambda out: np.diag(np.maximum(SIGNS, 0)), MASK)
    np.testing.assert_allclose(found.product, convex, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.trace, np.trace(convex), rtol=1e-12)
    for jacobian in ("matrix_free", "head"):
        found, places = _seen(outputs, loss, MASK, jacobian)
        dense = _dense(outputs, lambda out: np.diag(SIGNS), MASK)[np.ix_(places, places)]
        np.testing.assert_allclose(found.product, dense, rtol=1e-9, atol=1e-12)


def test_a_confident_softmax_is_not_taken_for_indefinite():
    """In float32 1 - p is rounding where p is nearly one: negative eigenvalues of that size say nothing."""
    loss = lambda out, batch: optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])
    batch = {"x": jnp.eye(3), "label": jnp.arange(3)}
    outputs = lambda params, batch: batch["x"] @ params["w"]
    rows = jax.jit(lambda w: curvature.scaled_rows(outputs, loss, {"w": w}, batch, jnp.full(3, 1 / 3)))
    for logit in (5.0, 10.0, 14.0, 15.0, 16.0, 17.0, 20.0):
        scaled, negative = rows(jnp.diag(jnp.array([1.0, 1.0, logit])))
        assert not negative, logit
        assert jnp.all(jnp.isfinite(scaled))


@pytest.mark.parametrize("name", ["softmax", OF_A_TREE])
def test_diagonal_is_that_of_the_dense_matrix(x64, name):
    outputs, loss, hessian = LOSSES[name]
    params, batch = _problem()
    diagonal = jax.jit(curvature.make_ggn_diagonal(outputs, loss, micro_batch=3))
    found = diagonal(params, batch, jnp.asarray(MASK))
    np.testing.assert_allclose(found, np.diag(_dense(outputs, hessian, MASK)), rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(diagonal(params, batch, jnp.zeros(NUM_EXAMPLES, bool)), 0)


def test_gradient_is_of_the_mean_loss_over_the_mask(x64):
    outputs, loss, _ = LOSSES["half_squared"]
    params, batch = _problem()
    gradient = jax.jit(curvature.make_gradient(outputs, loss))
    out, jacobian = _outputs_and_jacobians(outputs)
    each = np.einsum("nkp,nk->np", jacobian, out - np.asarray(batch["target"]))
    np.testing.assert_allclose(gradient(params, batch, jnp.asarray(MASK)), each[MASK].mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(gradient(params, batch), each.mean(axis=0), rtol=1e-10)
    np.testing.assert_array_equal(gradient(params, batch, jnp.zeros(NUM_EXAMPLES, bool)), 0)


@pytest.mark.parametrize("name", ["softmax", OF_A_TREE])
def test_jacobian_rows_are_the_jacobian(x64, name):
    outputs = LOSSES[name][0]
    rows = jax.jit(lambda *problem: curvature.jacobian_rows(outputs, *problem))(*_problem())
    np.testing.assert_allclose(rows, _outputs_and_jacobians(outputs)[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("worst", "flag"),
    [(-1e-3, True), (-1e-9, False), (0.0, False), (-1.0, True)],
    ids=["small", "noise", "zero", "all"],
)
def test_indefinite_is_what_rounding_does_not_explain(worst, flag):
    eigenvalues = np.array([[worst, 1e-12, 0.5], [worst, worst, worst]], np.float32)
    np.testing.assert_array_equal(curvature.indefinite(jnp.asarray(eigenvalues)), [flag, worst < 0])


def test_forward_flops_count_two_for_a_multiplication_and_an_addition():
    image, kernel, grouped = jnp.ones([2, 5, 5, 4]), jnp.ones([3, 3, 4, 6]), jnp.ones([3, 3, 2, 6])
    layout, batch, width, length = ("NHWC", "HWIO", "NHWC"), 7, 3, 5
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
    dense = lambda p, x: jnp.tanh(x @ p)
    # name: (program, parameters, input, its multiplications and additions)
    cases = {
        "dense": (dense, jnp.ones([width, 4]), jnp.ones([batch, width]), 2 * batch * width * 4),
        "batched": (lambda p, x: jnp.einsum("nij,njk->nik", x, p), jnp.ones([batch, 2, 4]), jnp.ones([batch, 3, 2]),
                    batch * 2 * 3 * 2 * 4),
        "convolution": (lambda p, x: convolve(x, p, dimension_numbers=layout), kernel, image,
                        2 * (2 * 3 * 3) * 6 * (3 * 3 * 4)),
        "groups": (lambda p, x: convolve(x, p, dimension_numbers=layout, feature_group_count=2), grouped, image,
                   2 * (2 * 3 * 3) * 6 * (3 * 3 * 2)),
        "scan": (lambda p, x: jax.lax.scan(lambda x, _: (dense(p, x), None), x, length=length),
                 jnp.ones([width, width]), jnp.ones([batch, width]), length * 2 * batch * width**2),
        "call": (jax.jit(dense), jnp.ones([width, 4]), jnp.ones([batch, width]), 2 * batch * width * 4),
        "remat": (jax.checkpoint(dense), jnp.ones([width, 4]), jnp.ones([batch, width]), 2 * batch * width * 4),
        "none": (lambda p, x: x + p, jnp.ones([batch]), jnp.ones([batch]), 0),
    }  # fmt: skip
    for name, (program, params, x, wanted) in cases.items():
        assert curvature.forward_flops(program, params, x) == wanted, name


def test_wrong_choices_name_the_field():
    with pytest.raises(ValueError, match=r"sketch\.jacobian.*'dense'.*head, matrix_free, rows"):
        curvature.make_ggn(_network, _two_fields_loss, jacobian="dense")
    with pytest.raises(ValueError, match=r"sketch\.solver, or jacobian: head needs the model's features"):
        curvature.make_ggn(_network, _two_fields_loss, jacobian="head")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_products_side_by_side_are_those_one_after_another(x64, device):
    """What another device than a CPU takes, seen on one."""
    draw = np.random.default_rng(0)
    params, batch = {"w": jnp.asarray(draw.normal(size=(4, 3)))}, {"x": jnp.asarray(draw.normal(size=(7, 4)))}
    outputs = lambda params, batch: jnp.tanh(batch["x"] @ params["w"])
    loss = lambda out, batch: jax.nn.logsumexp(out, axis=1)
    vectors = jnp.asarray(draw.normal(size=(12, 5)))
    rows = curvature.make_ggn(outputs, loss, jacobian="rows")(params, batch).rows
    with backend.traced_for(device):
        found = curvature.make_ggn(outputs, loss, micro_batch=3)(params, batch).product(vectors)
    np.testing.assert_allclose(found, rows.T @ (rows @ vectors), rtol=1e-10, atol=1e-12)
