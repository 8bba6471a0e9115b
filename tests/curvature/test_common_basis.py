"""Products of a client's curvature with a common basis, beside the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.curvature import make_image
from fipa_jax.curvature.common_basis import BLOCK

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
