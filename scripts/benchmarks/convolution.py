"""How fast is a convolution of 3 x 3 within a loop, as local training is one? `benchmark.py convolution --cpus=0`.

For layers of ResNet-20 and ResNet-18: the result (forward), the images' cotangent and the kernel's. `ours` is
`models.convolution.conv`, patches and one matrix product; `XLA's` is `lax.conv_general_dilated` with the transposes
that JAX derives; `in forward form` is XLA's with the transposes written by hand as plain convolutions.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import timing
from fipa_jax.models.convolution import LAYOUT, conv

ONES, SAME = (1, 1), ((1, 1), (1, 1))
STEPS = 3  # of the loop
BUDGET = 2.0  # seconds, after which a way takes no further turn: some are slow
LAYERS = ((32, 16), (16, 32), (8, 64), (32, 64), (16, 128), (8, 256), (4, 512))  # side, channels in and out


def run(options: list[str]) -> dict:
    """Prints and returns GFLOP/s by layer, part and way."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py convolution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="the first so many of the layers")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(options)
    rows = [row for layer in LAYERS[: args.layers] for row in measure(args, *layer)]
    print(f"GFLOP/s of a convolution of 3 x 3 within a loop, {args.batch} images, on {jax.devices()[0]}")
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(args, side: int, channels: int) -> list[dict]:
    """The lines of the table for a layer, one for each part."""
    shapes = {"images": (args.batch, side, side, channels), "kernel": (3, 3, channels, channels)}
    images, kernel = (jax.random.normal(jax.random.key(0), shape) for shape in shapes.values())
    operands = images, kernel, images  # the result is as large as the images
    flops = 2 * images.size * kernel.size // channels
    rows = []
    for part, ways in PARTS.items():
        programs = {way: in_a_loop(one).lower(*operands).compile() for way, one in ways.items()}
        calls = {way: functools.partial(timing.wall_seconds, program, *operands) for way, program in programs.items()}
        seconds = timing.in_turns(calls, args.repeats, budget=BUDGET)
        rates = {way: flops * STEPS / statistics.median(seconds[way]) / 1e9 if way in seconds else "" for way in WAYS}
        rows.append({"side": side, "channels": channels, "part": part} | rates)
    return rows


def in_a_loop(one: Callable):
    """A jitted (images, kernel, cotangent) -> the same after some steps; no step can be moved out of the loop."""

    def step(operands, _):
        made = one(*operands)
        small = 1 + 1e-9 * made.reshape(-1)[0]
        return tuple(operand * small for operand in operands), jnp.sum(made)

    return jax.jit(lambda *operands: lax.scan(step, operands, None, length=STEPS))


def _ours(images, kernel):
    return conv(images, kernel, ONES, SAME)


def _xla(images, kernel):
    return lax.conv_general_dilated(images, kernel, ONES, SAME, dimension_numbers=LAYOUT)


def _forward(convolve):
    return lambda images, kernel, cotangent: convolve(images, kernel)


def _of_images(convolve):
    return lambda images, kernel, cotangent: jax.vjp(lambda x: convolve(x, kernel), images)[1](cotangent)[0]


def _of_kernel(convolve):
    return lambda images, kernel, cotangent: jax.vjp(lambda w: convolve(images, w), kernel)[1](cotangent)[0]


def _images_by_hand(images, kernel, cotangent):
    return _xla(cotangent, lax.optimization_barrier(jnp.swapaxes(kernel[::-1, ::-1], 2, 3)))


def _kernel_by_hand(images, kernel, cotangent):
    """Channels are the batch, and the cotangent is a kernel as large as the images."""
    images = lax.optimization_barrier(images.transpose(3, 1, 2, 0))
    cotangent = lax.optimization_barrier(cotangent.transpose(1, 2, 0, 3))
    return _xla(images, cotangent).transpose(1, 2, 0, 3)


OURS, XLA, BY_HAND = WAYS = "ours", "XLA's", "in forward form"
PARTS = {  # part -> way -> (images, kernel, cotangent) -> what it gives
    "forward": {OURS: _forward(_ours), XLA: _forward(_xla)},
    "images": {OURS: _of_images(_ours), XLA: _of_images(_xla), BY_HAND: _images_by_hand},
    "kernel": {OURS: _of_kernel(_ours), XLA: _of_kernel(_xla), BY_HAND: _kernel_by_hand},
}
