"""What a model, a loss and their data must be like: what breaks it is refused in words, or changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import aggregate, curvature
from fipa_jax.client.examples import Client
from fipa_jax.client.first_order import first_order
from fipa_jax.client.local_solver import Hyper, with_initial_loss
from fipa_jax.client.second_order import gauss_newton, lbfgs, natural_gradient
from fipa_jax.curvature import contracts

N, F, K, RANK = 12, 5, 2, 3
VIEWS = {  # how the curvature may be seen, all of the same matrix
    "subspace": {"solver": "subspace", "power_steps": 20},
    "lanczos": {"solver": "lanczos"},
    "rows": {"solver": "rows"},
    "lanczos on rows": {"solver": "lanczos", "jacobian": "rows"},
    "micro-batches": {"solver": "lanczos", "micro_batch": 5},
}


def outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]


def loss(out, batch):
    return jnp.sum((out - batch["y"]) ** 2, axis=1) / 2


def problem(dtype=np.float64, number=N):
    rng = np.random.default_rng(0)
    params = {"b": rng.normal(size=K), "w": rng.normal(size=(F, K))}
    batch = {"x": rng.normal(size=(number, F)), "y": rng.normal(size=(number, K))}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))


def local(make, **options):
    """(outputs, loss, params, batch, mask) -> the update [P] of one client's local work."""

    def run(outputs, loss, params, batch, mask=None):
        def with_features(params, batch):
            return outputs(params, batch), ()

        number = batch["x"].shape[0]
        count = number if mask is None else jnp.sum(mask, dtype=jnp.int32)  # the first ones
        client = Client(jnp.arange(number, dtype=jnp.int32), jnp.asarray(count, jnp.int32))
        lr, damping, mu = (jnp.float32(value) for value in (0.1, 0.1, 0.0))
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
        blank = curvature.Sketch(jnp.zeros([2]), jnp.zeros([size, 2]))
        solver = with_initial_loss(make(loss, lambda key, batch: batch, **options), loss)
        result = solver(
            with_features, params, batch, client, jax.random.key(0), Hyper(lr, damping, mu, sketch=blank), (), ()
        )
        assert jax.tree.map(jnp.result_type, result.delta) == jax.tree.map(jnp.result_type, params)
        return jnp.append(jax.flatten_util.ravel_pytree(result.delta)[0], result.before)

    return run


def sketched(outputs, loss, params, batch, mask=None, **options):
    found = curvature.make_sketch(outputs, loss, rank=RANK, **options)(jax.random.key(0), params, batch, mask)
    return (found.basis * found.eigenvalues[None]) @ found.basis.T


# Everything that weighs the loss of each example: (outputs, loss, params, batch, mask=None) -> array.
ENTRIES = {
    "product": lambda out, of, p, b, m=None: curvature.make_ggn(out, of)(p, b, m).product(jnp.eye(F * K + K)),
    "rows": lambda out, of, p, b, m=None: curvature.make_ggn(out, of, jacobian="rows")(p, b, m).rows,
    "diagonal": lambda out, of, p, b, m=None: curvature.make_ggn_diagonal(out, of)(p, b, m),
    "gradient": lambda out, of, p, b, m=None: curvature.make_gradient(out, of)(p, b, m),
    **{f"sketch by {name}": functools.partial(sketched, **options) for name, options in VIEWS.items()},
    "sgd": local(first_order, batch_size=0),
    "sgd on mini-batches": local(first_order, batch_size=5, micro_batch=1),
    "gauss_newton": local(gauss_newton),
    "gauss_newton by cg": local(gauss_newton, system="cg"),
    "lbfgs": local(lbfgs),
    "natural_gradient": local(natural_gradient),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_loss_that_is_not_one_number_of_each_example_is_refused(entry):
    params, batch = problem(np.float32)
    wrong = {
        rf"\({N}, {K}\)": lambda out, batch: (out - batch["y"]) ** 2 / 2,
        rf"\({N}, 1\)": lambda out, batch: loss(out, batch)[:, None],
        r"\(\)": lambda out, batch: jnp.mean(loss(out, batch)),
    }
    for shape, bad in wrong.items():
        shape = shape.replace(f"{N}", r"\d+")  # of a mini-batch
        with pytest.raises(ValueError, match=rf"loss: needed one number per example, shape \(\d+,\), got {shape}"):
            ENTRIES[entry](outputs, bad, params, batch)
    with pytest.raises(ValueError, match=r"outputs: needed a first axis of \d+ examples"):
        ENTRIES[entry](lambda p, b: jnp.mean(outputs(p, b), axis=0), loss, params, batch)
    with pytest.raises(ValueError, match="outputs: needed floating-point arrays, got int32"):
        ENTRIES[entry](lambda p, b: jnp.argmax(outputs(p, b), axis=1), loss, params, batch)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_leaf_that_is_no_float_is_refused_by_its_path(entry):
    params, batch = problem(np.float32)
    for leaf in (np.int32(3), np.array([True, False]), np.array("word"), 1 + 2j, object(), jax.random.key(0)):
        with pytest.raises(ValueError, match=r"params: needed floating-point arrays, got .* at 'counter/steps'"):
            ENTRIES[entry](outputs, loss, params | {"counter": {"steps": leaf}}, batch)


# In the fast suite those of which each takes less than a few seconds to compile.
SLOWER = {
    *("sketch by lanczos", "sketch by lanczos on rows", "sketch by micro-batches", "gauss_newton by cg", "lbfgs"),
    "sgd on mini-batches",
}
EACH = [pytest.param(entry, marks=[pytest.mark.slow] * (entry in SLOWER)) for entry in ENTRIES]


@pytest.mark.parametrize("entry", EACH)
def test_rows_that_are_masked_out_never_reach_the_network(entry):
    """Nor their derivatives, which are finite for none of NaN, infinity and zero."""

    def unsafe(params, batch):
        scale = jnp.sum(batch["x"] ** 2, axis=1, keepdims=True) ** 0.5  # its slope at 0 is NaN
        return outputs(params, {"x": batch["x"] / scale * jnp.sum(params["b"] ** 2)})

    params, batch = problem(np.float32)
    mask = jnp.arange(N) < 7
    run = jax.jit(lambda batch: ENTRIES[entry](unsafe, loss, params, batch, mask))
    sound = run(batch)
    assert np.all(np.isfinite(sound)) and np.any(sound)
    for filling in (np.nan, np.inf, 0.0):
        spoilt = jax.tree.map(lambda x, filling=filling: jnp.where(mask[:, None], x, filling), batch)
        np.testing.assert_array_equal(run(spoilt), sound)


@pytest.mark.parametrize("view", ["rows", *(pytest.param(v, marks=pytest.mark.slow) for v in VIEWS if v != "rows")])
def test_a_client_without_examples_has_an_empty_sketch(view):
    params, batch = problem(np.float32)
    make = jax.jit(curvature.make_sketch(outputs, loss, rank=RANK, **VIEWS[view]))
    nothing = jax.tree.map(lambda x: x[:0], batch)
    hidden = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), batch)
    for data, mask in ((nothing, None), (nothing, jnp.zeros([0], bool)), (hidden, jnp.zeros([N], bool))):
        found = make(jax.random.key(0), params, data, mask)
        assert not np.any(found.eigenvalues) and not np.any(found.basis)
        assert {name for name, flag in found.report.flags.items() if flag} == {"empty"}
        for other in (curvature.make_gradient, curvature.make_ggn_diagonal):
            assert not np.any(jax.jit(other(outputs, loss))(params, data, mask))


@pytest.mark.parametrize("entry", EACH)
def test_half_precision_is_that_of_the_same_numbers_in_float32(entry):
    for dtype in (jnp.bfloat16, jnp.float16):
        params, batch = problem(dtype)
        run = jax.jit(functools.partial(ENTRIES[entry], outputs, loss))
        half = run(params, batch)
        full = run(*jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch)))
        trains = entry.startswith(("sgd", "gauss", "lbfgs", "natural"))  # its update has the parameters' precision
        slack = 0.05 if trains else 1e-5
        np.testing.assert_allclose(half.astype(np.float32), full, atol=slack * float(np.max(np.abs(full))))
        assert trains or half.dtype == jnp.float32


def test_batches_masks_and_keys_that_are_none_are_refused():
    params, batch = problem(np.float32)
    sketch = curvature.make_sketch(outputs, loss, rank=2)
    cases = {
        r"batch: needed arrays with a first axis of examples, got float32 of shape \(\) at 'scale'": {"scale": 0.5},
        r"batch: .* got key<fry> of shape \(\) at 'key'": {"key": jax.random.key(0)},
        r"batch: needed as many examples in every array, got .*'y': 7": {"y": batch["y"][:7]},
    }
    for words, change in cases.items():
        change = jax.tree.map(lambda x: jnp.float32(x) if isinstance(x, float) else x, change)
        with pytest.raises(ValueError, match=words):
            sketch(jax.random.key(0), params, batch | change)
    for key in (0, jax.random.split(jax.random.key(0)), jnp.zeros([2]), None, "key"):
        with pytest.raises(ValueError, match=r"key: needed one key, such as jax\.random\.key"):
            sketch(key, params, batch)
    assert contracts.key(jax.random.PRNGKey(0)).shape == (2,)
    for mask in (jnp.ones([N]), jnp.ones([N - 1], bool), jnp.ones([N, 1], bool), True):
        with pytest.raises(ValueError, match=f"mask: needed {N} booleans"):
            sketch(jax.random.key(0), params, batch, mask)
    assert contracts.present_rows(batch, [True] * (N - 1) + [False])[1].tolist() == [True] * (N - 1) + [False]
    with pytest.raises(ValueError, match=r"sketch\.rank: needs a whole number of at least 1, got 2\.5"):
        curvature.make_sketch(outputs, loss, rank=2.5)(jax.random.key(0), params, batch)
    with pytest.raises(ValueError, match=r"basis: needed an array \[P, s\], got float32 of shape \(3,\)"):
        curvature.make_image(outputs, loss)(params, batch, None, jnp.zeros(3))
    with pytest.raises(ValueError, match="params: there are no arrays in it"):
        sketch(jax.random.key(0), {}, batch)
    for name in ("oversample", "power_steps", "probes", "tolerance", "micro_batch", "loss_rank"):
        with pytest.raises(ValueError, match=f"{name}: needed 0 or more, got -1"):
            jax.jit(curvature.make_sketch(outputs, loss, rank=2, **{name: -1}))(jax.random.key(0), params, batch)


def normalised(params, batch):
    out = outputs(params, batch)
    return (out - jnp.mean(out, axis=0)[None]) / (jnp.std(out, axis=0)[None] + 1e-3)


MIXING = {
    "batch normalisation": (normalised, loss),
    "batch mean in the loss": (outputs, lambda out, batch: loss(out, batch) / (1 + jnp.mean(loss(out, batch)))),
    "batch size in the loss": (outputs, lambda out, batch: loss(out, batch) / out.shape[0]),
    "contrast": (lambda p, b: outputs(p, b) @ outputs(p, b).T @ b["y"], loss),
}


@pytest.mark.parametrize("case", MIXING)
def test_examples_that_mix_are_named(case, x64):
    params, batch = problem()
    found = jax.jit(curvature.make_sketch(*MIXING[case], rank=2, solver="rows"))(jax.random.key(0), params, batch)
    assert found.report.flags["examples_mixed"]
    with pytest.raises(ValueError, match="outputs: an example's outputs, or its loss, change with the other examples"):
        curvature.check(*MIXING[case], params, batch)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16, jnp.float32])
def test_examples_that_are_kept_apart_pass(dtype):
    params, batch = problem(dtype)
    found = jax.jit(curvature.make_sketch(outputs, loss, rank=2, solver="rows"))(jax.random.key(0), params, batch)
    assert not found.report.flags["examples_mixed"]
    curvature.check(outputs, loss, params, batch)
    curvature.check(outputs, loss, params, batch, jnp.arange(N) < 1)


def test_rounding_is_no_mixing():
    """Of a model that fits its data all but exactly, or whose outputs are zero but for rounding, in float32.

    Three hundred terms are summed in another order in a batch of one than in one of two.
    """
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("w", (1, 300)), ("v", (300, 1)))
    }
    x = jnp.linspace(0.1, 1, N, dtype=jnp.float32)[:, None]

    def fitted(params, batch):
        return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]

    batch = {"x": x, "y": jax.jit(fitted)(params, {"x": x})}
    zero = float(batch["y"][0, 0])

    def confident(out, batch):  # cross-entropy of an answer that is certain
        return jax.nn.softplus(-20 * jnp.abs(out[:, 0]) - 15)

    for case in ((fitted, loss), (lambda p, b: fitted(p, b) - zero, loss), (fitted, confident)):
        assert not jax.jit(contracts.mixes_examples, static_argnums=(0, 1))(*case, params, batch)


def test_check_finds_what_is_not_finite():
    params, batch = problem(np.float32)
    with pytest.raises(ValueError, match="outputs: not finite at these parameters"):
        curvature.check(lambda p, b: outputs(p, b) / 0, loss, params, batch)
    with pytest.raises(ValueError, match="loss: not finite at these parameters"):
        curvature.check(outputs, lambda out, batch: jnp.log(-loss(out, batch)), params, batch)


@jax.tree_util.register_pytree_node_class
class Model:
    """A pytree class as users write them, without `__eq__`, of which some aux data is compared by identity."""

    def __init__(self, w, b, name=None):
        self.w, self.b, self.name = w, b, name

    def tree_flatten(self):
        return (self.w, self.b), self.name

    @classmethod
    def tree_unflatten(cls, name, leaves):
        return cls(*leaves, name)


def test_any_pytree_class_may_hold_the_parameters():
    params, batch = problem(np.float32)
    model = Model(params["w"], params["b"])

    def of_model(model, batch):
        return outputs({"w": model.w, "b": model.b}, batch)

    key = jax.random.key(0)
    found = jax.jit(curvature.make_sketch(of_model, loss, rank=2, solver="rows"))(key, model, batch)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (model, found))
    step, info = jax.jit(aggregate.fipa_step)(*stacked, jnp.array([3, 4]))
    assert isinstance(step, Model) and not jnp.any(info["rejected"])


def test_examples_that_mix_are_named_whichever_are_there(x64):
    params, batch = problem()
    for there in ([0, 5], [3, 4, 7], [N - 2, N - 1]):
        mask = jnp.zeros([N], bool).at[jnp.array(there)].set(True)
        assert contracts.mixes_examples(normalised, loss, params, *contracts.present_rows(batch, mask))
    alone = jnp.arange(N) == 3  # has nobody to mix with
    assert not contracts.mixes_examples(normalised, loss, params, *contracts.present_rows(batch, alone))


def test_leaves_whose_paths_read_alike_are_told_apart():
    params, batch = problem(np.float32)
    twins = {"w": params["w"], "a/b": params["b"], "a": {"b": np.int32(1)}}
    with pytest.raises(ValueError, match=r"params: needed floating-point arrays, got int32 of shape \(\) at 'a/b'"):
        curvature.make_gradient(lambda p, b: b["x"] @ p["w"] + p["a/b"], loss)(twins, batch)
