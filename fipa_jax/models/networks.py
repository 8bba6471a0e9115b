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
    """What a network computes on its way to the outputs; a sequence model's have a further axis, of positions."""

    levels: tuple  # of [B, ...]: hidden values, of convolutions globally averaged before their ReLU
    body: jax.Array  # [B, F], the input of the head, or [B, T, F]
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


class Transformer(nn.Module):
    """A causal transformer, with normalisation before each part (Radford et al. 2019) and learned positions.

    It predicts the next of K symbols at every position, from the symbols up to it. Parameter names are those of the
    blocks, and `head`. With a positive `lora_rank` r every dense layer of the blocks has an adapter (LoRA, Hu et al.
    2022): x W becomes x W + x A B, with A [in, r] drawn and B [r, out] zero at first, so that the model starts as the
    one without. Their paths, and no others, contain `lora`. The scale alpha / r of that paper is one here.
    """

    num_symbols: int  # K
    width: int
    layers: int
    heads: int
    lora_rank: int = 0

    @nn.compact
    def __call__(self, x):
        """Maps symbols [B, T], whole numbers below K, to outputs [B, T, K] and features."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            shape = "x".join(map(str, x.shape[1:]))
            raise ValueError(
                f"config.model.name: 'transformer' needs whole numbers [B, T], got {x.dtype} of {shape} for an "
                "example; take config.task.name = 'text', or another model"
            )
        place = self.param("positions", nn.initializers.normal(0.02), (x.shape[1], self.width))
        x = nn.Embed(self.num_symbols, self.width, name="embedding")(x) + place[None]
        for i in range(self.layers):
            x = _TransformerBlock(self.heads, self.lora_rank, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.num_symbols, name="head")(x), Features((), x, x)

    head_layers = ("head",)


def apply_head(layers: Sequence[str], params, body):
    """The head alone: dense layers with ReLU between them, from the body's features [B, F] to (outputs, features)."""
    *hidden, final = layers
    last = body
    for name in hidden:
        last = nn.relu(_dense(params[name], last))
    return _dense(params[final], last), Features((), body, last)


def _dense(layer: dict, x: jax.Array) -> jax.Array:
    """[B, ..., F'], a dense layer's values for inputs [B, ..., F], by its parameters."""
    return nn.Dense(layer["kernel"].shape[1], use_bias="bias" in layer).apply({"params": layer}, x)


class _TransformerBlock(nn.Module):
    """Causal attention and a network with one hidden layer of four times the width, each added to what it is given."""

    heads: int
    lora_rank: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]

        def dense(name, x, features=width):
            y = nn.Dense(features, name=name)(x)
            if not self.lora_rank:
                return y
            low = nn.Dense(self.lora_rank, use_bias=False, name=f"{name}_lora_a")(x)
            zeros = nn.initializers.zeros
            return y + nn.Dense(features, use_bias=False, kernel_init=zeros, name=f"{name}_lora_b")(low)

        def split(values):  # [B, T, F] -> [B, T, heads, F / heads]
            return values.reshape(*values.shape[:2], self.heads, -1)

        y = nn.LayerNorm(name="norm1")(x)
        mixed = _causal_attention(*(split(dense(name, y)) for name in ("query", "key", "value")))
        x = x + dense("out", mixed.reshape(x.shape))
        y = nn.LayerNorm(name="norm2")(x)
        return x + dense("down", nn.gelu(dense("up", y, 4 * width)))


def _causal_attention(query, key, value):
    """[B, T, H, F], each position's mean of the values [B, S, H, F] up to it, weighed by softmax(query key / sqrt(F)).

    As `jax.nn.dot_product_attention`, whose softmax is float32 whatever it is given; ours is the inputs'.
    """
    scores = jnp.einsum("bthf,bshf->bhts", query, key) / query.shape[-1] ** 0.5
    past = jnp.tri(scores.shape[-1], dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshf->bthf", weights, value)


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


def _transformer(config_model, num_outputs: int) -> Transformer:
    """The transformer of `config.model.width`, `layers`, `heads` and `lora_rank`."""
    width, layers, heads = config_model.width, config_model.layers, config_model.heads
    if width % heads:
        raise ValueError(f"config.model.heads: needs to divide config.model.width = {width}, got {heads}")
    return Transformer(num_outputs, width, layers, heads, config_model.lora_rank)


# The CNNs are named after their numbers of parameters with images 32x32x3 and ten outputs: 5,956, 23,711 and 197,984.
MODELS: dict[str, Maker] = {
    "mlp": _mlp,
    "cnn_6k": _cnn((12, 8), hidden=16),
    "cnn_23k": _cnn((29, 16), hidden=32),
    "cnn_200k": _cnn((32, 40), hidden=128),
    "resnet20": _resnet((16, 32, 64), blocks=3),
    "resnet18": _resnet((64, 128, 256, 512), blocks=2),
    "transformer": _transformer,
}


def build(config_model, num_outputs: int) -> nn.Module:
    """Builds the network `config_model.name`.

    Args:
      config_model: the fields `name`, for the MLP `widths` and `activation`, for a ResNet `head_width` and
        `compute_dtype`, for the transformer `width`, `layers`, `heads` and `lora_rank`.
      num_outputs: K, and for the transformer the number of symbols.

    Returns:
      A module that maps inputs [B, ...] to (outputs [B, K], `Features`); the transformer, symbols [B, T] to [B, T, K].

    Raises:
      ValueError: the name of the model or of the activation is not known, or heads do not divide the width.
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
