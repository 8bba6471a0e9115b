"""Which layers does a flax module run, on what inputs? They are found while it runs, whatever module it is.

Seen are `nn.Dense`, `nn.DenseGeneral` that gives one axis, and `nn.Conv` over two axes without groups or dilation.
Other modules, such as embeddings and normalisations, are passed over.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import lax

from fipa_jax import trees
from fipa_jax.models.convolution import patches

Key = tuple[str, int]  # (path of a layer's kernel, which call of the layer it is, from 0)
Outputs = Callable[[Any, Any], Any]  # (params, batch) -> out
# (params, batch, taps {key: [B, T, g]}) -> (out, {key: (inputs [B, T, a], values [B, T, g])}), at T positions
Tapped = Callable[[Any, Any, dict[Key, jax.Array]], tuple[Any, dict[Key, tuple[jax.Array, jax.Array]]]]


def tapped(outputs: Outputs) -> Tapped:
    """The model with its layers in sight: `run(params, batch, taps) -> (out, {(kernel's path, call): what it saw})`.

    A layer that is called several times has as many entries. What a tap holds is added to the layer's values, so that a
    derivative in a tap of zeros is one in those values. A kernel is found by being the very array of `params`: layers
    under a `jax.jit` or a lifted transform of flax (`nn.scan`, `nn.remat`) get another one, and are passed over.

    Example:
      out, seen = tapped(outputs)(params, batch, {})
      inputs, values = seen["Dense_0/kernel", 0]   # [B, T, a] and [B, T, g], with T positions of an example

    Args:
      outputs: (params, batch) -> out, by flax modules.
    """

    def run(params, batch, taps):
        kernels = {id(leaf): path for path, leaf in trees.paths(params).items()}
        examples = jax.tree.leaves(batch)[0].shape[0]
        seen, calls = {}, Counter()

        def look(call, args, kwargs, context):
            values, module = call(*args, **kwargs), context.module
            path = kernels.get(_kernel(module)) if context.method_name == "__call__" else None
            inputs = INPUTS[type(module)](module, args[0]) if path else None
            if inputs is None:
                return values
            key = path, calls[path]
            calls[path] += 1
            values = values + taps[key].reshape(values.shape) if key in taps else values
            rows = inputs.reshape(examples, -1, inputs.shape[-1])
            seen[key] = rows, values.reshape(examples, -1, values.shape[-1])
            return values

        with nn.intercept_methods(look):
            return outputs(params, batch), seen

    return run


def _kernel(module: nn.Module) -> int:
    """The identity of a layer's kernel; 0 where it is no layer of `INPUTS`."""
    known = type(module) in INPUTS and module.has_variable("params", "kernel")
    return id(module.get_variable("params", "kernel")) if known else 0


def _of_dense(module: nn.Dense, x: jax.Array) -> jax.Array:
    return x


def _of_general(module: nn.DenseGeneral, x: jax.Array) -> jax.Array | None:
    """The contracted axes as one; None unless they are the last ones, and one axis comes out."""
    axes, features = (
        value if isinstance(value, tuple | list) else (value,) for value in (module.axis, module.features)
    )
    last = [axis % x.ndim for axis in axes] == list(range(x.ndim - len(axes), x.ndim))
    if not last or len(features) > 1 or module.batch_dims:
        return None
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


def _of_convolution(module: nn.Conv, x: jax.Array) -> jax.Array | None:
    """[B, H', W', h w C], the patches under the kernel; None for what is no plain convolution over two axes."""
    kernel = tuple(module.kernel_size) if isinstance(module.kernel_size, tuple | list) else (module.kernel_size,)
    strides, padding = _pair(module.strides), module.padding
    dilated = any(math.prod(_pair(value)) > 1 for value in (module.input_dilation, module.kernel_dilation))
    if len(kernel) != 2 or x.ndim != 4 or dilated or module.feature_group_count > 1:
        return None
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            return None
        padding = lax.padtype_to_pads(x.shape[1:3], kernel, strides, padding)
    else:
        padding = [_pair(side) for side in _pair(padding)]
    return patches(x, kernel, strides, padding)


def _pair(value: Any) -> tuple:
    """The two values; None is one, a single value counts twice."""
    return tuple(value) if isinstance(value, tuple | list) else (1 if value is None else value,) * 2


INPUTS = {nn.Dense: _of_dense, nn.DenseGeneral: _of_general, nn.Conv: _of_convolution}
