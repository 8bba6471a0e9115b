"""The networks, each giving its outputs and its features in one pass. A new one is an entry of `MODELS`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fipa_jax.lookup import lookup
from fipa_jax.models.convolution import conv, max_pool

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "sigmoid": nn.sigmoid, "silu": nn.silu, "tanh": nn.tanh}
Maker = Callable[[Any, int], nn.Module]  # (config.model, K) -> the network


class Features(NamedTuple):
    """What a network computes on its way to the outputs."""

    levels: tuple  # of [B, ...]: hidden values, of convolutions globally averaged before their ReLU
    body: jax.Array  # [B, F], the input of the head
    last: jax.Array  # [B, F'], the input of the last layer; the body's where the head is one layer


class MLP(nn.Module):
    """A fully connected network; its levels are the hidden layers' values, its head is the last layer.

    Parameters take the dtype of the inputs they are initialised with, here and below: float64 in, float64 throughout.
    """

    widths: Sequence[int]
    num_outputs: int
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x):
        """Maps inputs [B, ...], flattened, to outputs [B, K] and features."""
        x = x.reshape(x.shape[0], -1)
        levels = ()
        for width in self.widths:
            x = ACTIVATIONS[self.activation](nn.Dense(width, param_dtype=x.dtype)(x))
            levels += (x,)
        return nn.Dense(self.num_outputs, param_dtype=x.dtype)(x), Features(levels, x, x)

    @property
    def head_layers(self) -> tuple[str, ...]:
        """The names of the head's dense layers, for `apply_head`."""
        return (f"Dense_{len(self.widths)}",)


class CNN(nn.Module):
    """3x3 convolutions, each with 2x2 max-pooling and ReLU, then one hidden layer; no biases."""

    channels: Sequence[int]
    num_outputs: int
    hidden: int = 32

    @nn.compact
    def __call__(self, x):
        """Maps images [B, H, W, C] to outputs [B, K] and features; the levels are those of the convolutions."""
        least = 1
        for _ in self.channels:
            least = 2 * least + 2
        _check_images(x, least)
        levels = ()
        for channels in self.channels:
            x = nn.Conv(
                channels, (3, 3), padding="VALID", use_bias=False, param_dtype=x.dtype, conv_general_dilated=conv
            )(x)
            x = max_pool(x)
            levels += (x.mean((1, 2)),)
            x = nn.relu(x)  # after the pooling, with which it commutes: a quarter of the work
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, use_bias=False, param_dtype=x.dtype)(x))
        return nn.Dense(self.num_outputs, use_bias=False, param_dtype=x.dtype)(x), Features(levels, x, x)

    head_layers = ("Dense_1",)


class ResNet(nn.Module):
    """A residual network with group normalisation (2 groups) in place of batch normalisation (He et al. 2016).

    A 3x3 stem without pooling, then stages of basic blocks, all but the first starting with stride 2; global average
    pooling; the head is one dense layer, or two with `hidden` units between. Parameter names are those of the stages,
    and `head`: the last layer alone is `head/`, the whole head with a hidden layer `(hidden|head)/`.

    Every block starts as its shortcut: its last scale is zero at first (Goyal et al. 2017, section 5.1). With scales of
    one, group normalisation leaves pooled features that hardly differ between images, and plain SGD stays on the
    plateau of equal probabilities for hundreds of steps at least.
    """

    widths: Sequence[int]  # channels of each stage
    blocks: int  # a stage
    num_outputs: int
    hidden: int = 0
    dtype: str = ""  # of the computation, e.g. bfloat16; empty for the parameters' own

    @nn.compact
    def __call__(self, x):
        """Maps images [B, H, W, C] to outputs [B, K] and features; the levels are the stem's and each stage's."""
        _check_images(x, 1)
        param_dtype = x.dtype
        x = x.astype(self.dtype or param_dtype)
        x, before = _ConvNorm(self.widths[0], param_dtype=param_dtype, name="stem")(x, activate=True)
        levels = (before.mean((1, 2)),)
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x, before = _Block(width, stride, param_dtype, name=f"stage{i + 1}_block{j + 1}")(x)
            levels += (before.mean((1, 2)),)
        # The head in full precision: it is cheap, and so are its sketches.
        levels, body = jax.tree.map(lambda level: level.astype(param_dtype), (levels, x.mean((1, 2))))
        last = body
        if self.hidden:
            last = nn.relu(nn.Dense(self.hidden, param_dtype=param_dtype, name="hidden")(body))
        return nn.Dense(self.num_outputs, param_dtype=param_dtype, name="head")(last), Features(levels, body, last)

    @property
    def head_layers(self) -> tuple[str, ...]:
        """The names of the head's dense layers, for `apply_head`."""
        return ("hidden", "head") if self.hidden else ("head",)


def apply_head(layers: Sequence[str], params, body):
    """The head alone: dense layers with ReLU between them, from the body's features [B, F] to (outputs, features)."""
    *hidden, final = layers
    last = body
    for name in hidden:
        last = nn.relu(_dense(params[name], last))
    return _dense(params[final], last), Features((), body, last)


def _dense(layer: dict, x: jax.Array) -> jax.Array:
    """[B, F'], a dense layer's values for inputs [B, F], by its parameters."""
    return x @ layer["kernel"] + (layer["bias"][None] if "bias" in layer else 0)


class _ConvNorm(nn.Module):
    """A convolution without bias and its group normalisation; returns the values after and before the ReLU."""

    width: int
    kernel: int = 3
    stride: int = 1
    scale: float = 1.0  # of the normalised values, at first
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, activate: bool):
        pad = self.kernel // 2
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            param_dtype=self.param_dtype,
            dtype=x.dtype,
            conv_general_dilated=conv,
        )(x)
        first = nn.initializers.constant(self.scale)
        x = nn.GroupNorm(2, epsilon=1e-5, scale_init=first, param_dtype=self.param_dtype, dtype=x.dtype)(x)
        return (nn.relu(x) if activate else x), x


class _Block(nn.Module):
    """Two convolutions and a shortcut, by a 1x1 convolution where the shape changes."""

    width: int
    stride: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(_ConvNorm, self.width, param_dtype=self.param_dtype)
        y, _ = layer(3, self.stride, name="conv1")(x, activate=True)
        y, _ = layer(3, 1, 0.0, name="conv2")(y, activate=False)
        if self.stride > 1 or x.shape[-1] != self.width:
            x, _ = layer(1, self.stride, name="shortcut")(x, activate=False)
        return nn.relu(x + y), x + y


def _mlp(config_model, num_outputs: int) -> MLP:
    """The network of `config.model.widths`."""
    lookup(ACTIVATIONS, config_model.activation, "config.model.activation")
    return MLP(tuple(config_model.widths), num_outputs, config_model.activation)


def _cnn(channels: Sequence[int], hidden: int) -> Maker:
    """Builds the maker of a CNN, which reads no further fields."""
    return lambda config_model, num_outputs: CNN(channels, num_outputs, hidden)


def _resnet(widths: Sequence[int], blocks: int) -> Maker:
    """Builds the maker of a ResNet."""

    def make(config_model, num_outputs):
        return ResNet(widths, blocks, num_outputs, config_model.head_width, config_model.compute_dtype)

    return make


# The CNNs are named after their numbers of parameters with images 32x32x3 and ten outputs: 5,956, 23,711 and 197,984.
MODELS: dict[str, Maker] = {
    "mlp": _mlp,
    "cnn_6k": _cnn((12, 8), hidden=16),
    "cnn_23k": _cnn((29, 16), hidden=32),
    "cnn_200k": _cnn((32, 40), hidden=128),
    "resnet20": _resnet((16, 32, 64), blocks=3),
    "resnet18": _resnet((64, 128, 256, 512), blocks=2),
}


def build(config_model, num_outputs: int) -> nn.Module:
    """Builds the network `config_model.name`.

    Args:
      config_model: the fields `name`, for the MLP `widths` and `activation`, for a ResNet `head_width` and
        `compute_dtype`.
      num_outputs: K.

    Returns:
      A module that maps inputs [B, ...] to (outputs [B, K], `Features`).

    Raises:
      ValueError: the name of the model or of the activation is not known.
    """
    return lookup(MODELS, config_model.name, "config.model.name")(config_model, num_outputs)


def _check_images(x: jax.Array, least: int) -> None:
    """Refuses what is no batch of images of `least` x `least` pixels or more."""
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        shape = "x".join(map(str, x.shape[1:]))
        raise ValueError(
            f"config.model.name: this model needs images of {least} x {least} pixels or more, got inputs {shape}; take "
            f"'mlp' for what is no image, and see config.data.side"
        )
