"""The networks, each giving its outputs and its features in one pass, and the convolution they share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "sigmoid": nn.sigmoid, "silu": nn.silu, "tanh": nn.tanh}
LAYOUT = ("NHWC", "HWIO", "NHWC")  # of images, kernels and results


def conv(
    lhs,
    rhs,
    window_strides: Sequence[int],
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    precision=None,
):
    """Convolves images with a kernel: `lax.conv_general_dilated` where it is fast, patches and one matmul on CPU.

    Inside a loop or under `vmap` XLA's convolution on CPU is 5 to 15 times slower than the matmul, and a client's local
    training is such a loop. The backend is JAX's default one at the time of tracing; both ways give the same result.

    Args:
      lhs: images [B, H, W, C].
      rhs: kernel [h, w, C, F].
      window_strides: the two strides.
      padding: "SAME", "VALID" or the two pairs (before, after).
      lhs_dilation, rhs_dilation: None or ones.
      dimension_numbers: None for the layout above, or that layout.
      feature_group_count: 1.
      precision: of the products, as in `lax.dot_general`.

    Returns:
      [B, H', W', F].

    Raises:
      ValueError: another layout, a dilation or groups are asked for.
    """
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
    if layout != lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers or LAYOUT):
        raise ValueError(f"conv needs images NHWC and kernels HWIO, got {dimension_numbers}; transpose them first")
    dilations = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    if feature_group_count != 1 or any(d != 1 for d in dilations):
        raise ValueError(
            f"conv needs one group and no dilation, got feature_group_count={feature_group_count}, "
            f"lhs_dilation={lhs_dilation}, rhs_dilation={rhs_dilation}; use lax.conv_general_dilated for those"
        )
    if jax.default_backend() == "cpu":
        return _conv_by_matmul(lhs, rhs, window_strides, padding, precision)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, dimension_numbers=layout, precision=precision)


def _conv_by_matmul(lhs, rhs, strides, padding, precision):
    """The convolution as patches [B H' W', h w C] times the kernel [h w C, F]; arguments as for `conv`."""
    kernel = rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel, strides, padding)
    if any(side for pair in padding for side in pair):
        lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    rows, columns = ((size - k) // s + 1 for size, k, s in zip(lhs.shape[1:3], kernel, strides, strict=True))
    shifts = [
        lhs[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    # A plain matrix product: with the patches' four axes left apart, a training step takes 1.6 times as long.
    patches = jnp.concatenate(shifts, axis=-1).reshape(-1, rhs[..., 0].size)
    products = jnp.matmul(patches, rhs.reshape(-1, rhs.shape[-1]), precision=precision)
    return products.reshape(lhs.shape[0], rows, columns, rhs.shape[-1])


@jax.custom_jvp
def max_pool(x):
    """Takes the maximum over 2x2 windows, without overlap; an odd last row or column is left out.

    Args:
      x: [B, H, W, C].

    Returns:
      [B, H // 2, W // 2, C].
    """
    return _windows(x).max((2, 4))


@max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    """Takes the tangent at the first maximum of each window, as PyTorch does.

    Transposed, this is a broadcast and a selection. A training step is 1.3 times faster by it than by what JAX derives
    from the maximum of four strided slices, whose transposes are four dilated paddings.
    """
    (x,), (dx,) = primals, tangents
    windows, pooled = _windows(x), max_pool(x)
    first = jnp.full(pooled.shape, 3)
    for k in (2, 1, 0):
        first = jnp.where(windows[:, :, k // 2, :, k % 2] == pooled, k, first)
    chosen = first[:, :, None, :, None] == jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    return pooled, jnp.where(chosen, _windows(dx), 0).sum((2, 4))


def _windows(x):
    """[B, H, W, C] -> [B, H // 2, 2, W // 2, 2, C]."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * rows, : 2 * columns].reshape(-1, rows, 2, columns, 2, x.shape[-1])


class MLP(nn.Module):
    """A fully connected network; its features are the hidden layers' values (the input, if there is none).

    Parameters take the dtype of the inputs they are initialised with, here and below: float64 in, float64 throughout.
    """

    widths: Sequence[int]
    num_outputs: int
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x):
        """Maps inputs [B, ...], flattened, to outputs [B, K] and features, one [B, width] for each hidden layer."""
        x = x.reshape(x.shape[0], -1)
        features = ()
        for width in self.widths:
            x = ACTIVATIONS[self.activation](nn.Dense(width, param_dtype=x.dtype)(x))
            features += (x,)
        return nn.Dense(self.num_outputs, param_dtype=x.dtype)(x), features or (x,)


class CNN(nn.Module):
    """3x3 convolutions, each with 2x2 max-pooling and ReLU, then one hidden layer; no biases."""

    channels: Sequence[int]
    num_outputs: int
    hidden: int = 32

    @nn.compact
    def __call__(self, x):
        """Maps images [B, H, W, C] to outputs [B, K] and features.

        Returns:
          Outputs [B, K]; features, for each convolution its pooled values before the ReLU, averaged over the image
          [B, channels], and last the input of the last layer [B, hidden].
        """
        features = ()
        for channels in self.channels:
            x = nn.Conv(
                channels, (3, 3), padding="VALID", use_bias=False, param_dtype=x.dtype, conv_general_dilated=conv
            )(x)
            x = max_pool(x)
            features += (x.mean((1, 2)),)
            x = nn.relu(x)  # after the pooling, with which it commutes: a quarter of the work
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, use_bias=False, param_dtype=x.dtype)(x))
        return nn.Dense(self.num_outputs, use_bias=False, param_dtype=x.dtype)(x), (*features, x)


# The CNNs are named after their numbers of parameters with images 32x32x3 and ten outputs: 5,956, 23,711 and 197,984.
MODELS = {
    "mlp": lambda config, num_outputs: MLP(
        tuple(config.widths), num_outputs, _known("activation", config.activation, ACTIVATIONS)
    ),
    "cnn_6k": lambda config, num_outputs: CNN((12, 8), num_outputs, hidden=16),
    "cnn_23k": lambda config, num_outputs: CNN((29, 16), num_outputs, hidden=32),
    "cnn_200k": lambda config, num_outputs: CNN((32, 40), num_outputs, hidden=128),
}


def build(config_model, num_outputs: int) -> nn.Module:
    """Builds the network `config_model.name`.

    Args:
      config_model: the fields `name`, and for the MLP `widths` and `activation`.
      num_outputs: K.

    Returns:
      A module that maps inputs [B, ...] to (outputs [B, K], features: tuple of [B, ...]).

    Raises:
      ValueError: the name of the model or of the activation is not known.
    """
    return MODELS[_known("name", config_model.name, MODELS, "model")](config_model, num_outputs)


def _known(field, name, table, kind=None):
    """Returns the name if the table has it, else raises ValueError."""
    if name not in table:
        raise ValueError(f"config.model.{field}: unknown {kind or field} {name!r}; known: {', '.join(sorted(table))}")
    return name
