"""The convolution and the pooling that the networks share, each by what is fast on the backend."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fipa_jax import backend

LAYOUT = ("NHWC", "HWIO", "NHWC")  # of images, kernels and results

CACHE = 2**19  # bytes of patches that stay in a core's cache


def conv(  # its nine parameters are those by which flax calls `conv_general_dilated`
    lhs: jax.Array,
    rhs: jax.Array,
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
    if backend.kind() == "cpu":
        return _conv_by_matmul(lhs, rhs, window_strides, padding, precision)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, dimension_numbers=layout, precision=precision)


def _conv_by_matmul(lhs, rhs, strides, padding, precision):
    """The convolution as patches [B H' W', h w C] times the kernel [h w C, F]; arguments as for `conv`.

    As many images at a time as leave the patches in a core's cache. They are made again for the cotangents, as reading
    them back from memory takes longer than that.
    """
    kernel, images = rhs.shape[:2], lhs.shape[0]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel, strides, padding)
    rows, columns = _places(lhs.shape[1:3], kernel, strides, padding)
    depth = rhs[..., 0].size

    def convolve(lhs):
        """A block of the images."""
        # A plain matrix product: with the patches' four axes left apart, a training step takes 1.6 times as long.
        columns_of = patches(lhs, kernel, strides, padding).reshape(-1, depth)
        products = jnp.matmul(columns_of, rhs.reshape(depth, -1), precision=precision)
        return products.reshape(lhs.shape[0], rows, columns, -1)

    size = _block_size(images, rows * columns * depth * lhs.dtype.itemsize)
    if size >= images:
        return convolve(lhs)
    whole = images // size * size
    products = lax.map(jax.checkpoint(convolve), lhs[:whole].reshape(-1, size, *lhs.shape[1:]))
    products = products.reshape(whole, *products.shape[2:])
    return products if whole == images else jnp.concatenate([products, convolve(lhs[whole:])])


def _places(size, kernel, strides, padding) -> list[int]:
    """[H', W'], at how many places the kernel lies along each side."""
    sides = zip(size, kernel, strides, padding, strict=True)
    return [(size + sum(pad) - k) // s + 1 for size, k, s, pad in sides]


def patches(lhs: jax.Array, kernel: Sequence[int], strides: Sequence[int], padding) -> jax.Array:
    """[B, H', W', h w C], what the kernel of h x w pixels lies on at each of its H' x W' places.

    Args:
      lhs: images [B, H, W, C].
      kernel: (h, w).
      strides: the two strides.
      padding: the two pairs (before, after).
    """
    places = _places(lhs.shape[1:3], kernel, strides, padding)
    if any(side for pair in padding for side in pair):
        lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    reach = (places[0] - 1) * strides[0] + 1, (places[1] - 1) * strides[1] + 1
    shifts = [
        lhs[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return jnp.concatenate(shifts, axis=-1)


def _block_size(images: int, nbytes: int) -> int:
    """How many images go together so that their patches, `nbytes` an image, stay in a core's cache.

    A divisor of their number, unless that would be less than half of what has room: then a remainder comes behind.
    """
    fit = max(CACHE // nbytes, 1)
    if fit >= images:
        return images
    divisor = next(number for number in range(fit, 0, -1) if images % number == 0)
    return divisor if 2 * divisor > fit else fit


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
