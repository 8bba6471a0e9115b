"""Products of a client's curvature with a common basis, beside the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.curvature import Core, make_core, make_image
from fipa_jax.curvature.common_basis import BLOCK, bytes_of_core, in_few_bits

SIZE, EXAMPLES = 24, 7


def outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])


def loss(out, batch):
    return jnp.sum((out - batch["y"]) ** 2, axis=-1) / 2


def _problem():
    draw = np.random.default_rng(0)
    params = {"w": jnp.asarray(draw.normal(size=(12, 2)))}
    batch = {"x": jnp.asarray(draw.normal(size=(EXAMPLES, 12))), "y": jnp.asarray(draw.normal(size=(EXAMPLES, 2)))}
    mask = jnp.arange(EXAMPLES) < 5
    jacobian = jax.jacobian(outputs)(params, batch)["w"].reshape(EXAMPLES, 2, SIZE)[:5]
    return params, batch, mask, np.einsum("nkp,nkq->pq", jacobian, jacobian) / 5


@pytest.mark.parametrize("options", [{}, {"jacobian": "rows"}, {"solver": "auto"}], ids=str)
def test_an_image_is_the_dense_matrix_times_the_basis(x64, options):
    params, batch, mask, dense = _problem()
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (SIZE, 13)))[0]
    image = jax.jit(make_image(outputs, loss, **options))
    np.testing.assert_allclose(image(params, batch, mask, basis).values, dense @ basis, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"jacobian": "rows"}, {"solver": "auto"}], ids=str)
def test_a_core_is_the_dense_matrix_within_the_basis(x64, options):
    params, batch, mask, dense = _problem()
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (SIZE, 13)))[0]
    core = jax.jit(make_core(outputs, loss, **options))(params, batch, mask, basis).values
    np.testing.assert_allclose(core, basis.T @ dense @ basis, atol=1e-12)
    np.testing.assert_array_equal(core, core.T)
    few = make_core(outputs, loss, **options)(params, batch, mask, basis.at[:, 4:].set(0), jnp.int32(4)).values
    np.testing.assert_allclose(few[:4, :4], core[:4, :4], atol=1e-12)
    assert not np.any(few[4:])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_core_in_few_bits_is_right_in_the_mean_and_weak_directions_are_not_lost(x64, bits):
    scales = jnp.geomspace(1, 1e-3, 9)
    root = jax.random.normal(jax.random.key(0), (9, 20)) * scales[:, None]
    core = Core(root @ root.T)
    sent = jax.vmap(lambda key: in_few_bits(key, core, bits).values)(jax.random.split(jax.random.key(1), 4000))
    length = np.sqrt(np.diag(core.values))
    unit = length[:, None] * length / (2 ** (bits - 1) - 1)
    sent, values = np.asarray(sent), np.asarray(core.values)
    assert np.all(np.abs(sent - values) <= unit)
    np.testing.assert_array_equal(sent, np.swapaxes(sent, 1, 2))
    np.testing.assert_array_equal(np.diagonal(sent, axis1=1, axis2=2), np.broadcast_to(np.diag(values), (4000, 9)))
    assert np.all(np.abs(np.mean(sent, axis=0) - values) <= 5 * unit / np.sqrt(4 * 4000))


def test_the_bytes_of_a_core_are_those_of_its_diagonal_and_of_what_is_above():
    assert bytes_of_core(5, 0) == 4 * 15 and bytes_of_core(0, 0) == 0
    assert bytes_of_core(5, 4, 8) == 8 * 5 + 5 + 4
    assert bytes_of_core(0, 4, 8) == 0


def test_columns_that_are_not_in_use_cost_no_product(x64):
    """Blocks up to the last one in use are multiplied, here the first of two; what is behind them stays zero."""
    params, batch, mask, dense = _problem()
    basis = jnp.eye(SIZE)[:, : 2 * BLOCK]
    found = jax.jit(make_image(outputs, loss))(params, batch, mask, basis, jnp.int32(4)).values
    np.testing.assert_allclose(found[:, :BLOCK], dense[:, :BLOCK], atol=1e-12)
    assert not np.any(found[:, BLOCK:])


def test_a_basis_of_other_parameters_is_refused():
    params, batch, mask, _ = _problem()
    with pytest.raises(ValueError, match=f"basis: needed {SIZE} rows, one of each parameter, got 5"):
        make_image(outputs, loss)(params, batch, mask, jnp.ones([5, 2]))
