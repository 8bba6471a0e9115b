"""One training step of a network, forward, backward and plain SGD, beside its floor: `benchmark.py step`.

The floor is what the step's matrix products and convolutions would take at the rate of a large matrix product in the
same precision, measured beside it. A published round is 5 clients, 5 epochs of 1000 images in batches of 50: 500 steps.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import products, timing
from fipa_jax import trees
from fipa_jax.curvature import products as curvature
from fipa_jax.models import networks as models
from fipa_jax.tasks import images

STEPS = 500  # of a published round


def run(options: list[str]) -> dict:
    """Prints and returns the seconds, the operations and the memory of a step in every asked-for precision."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a network of fipa_jax.models")
    parser.add_argument("--head-width", type=int, default=720, help="of a ResNet's hidden layer")
    parser.add_argument("--side", type=int, default=64, help="of the images")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="of the computation: float32, bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(options)
    rows = [measure(args, dtype) for dtype in args.dtypes]
    print(f"a training step of {args.model}, {args.batch} images {args.side} x {args.side}, on {jax.devices()[0]}")
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(args, dtype: str) -> dict:
    """A line of the table."""
    compute = "" if dtype == "float32" else dtype
    fields = {"name": args.model, "head_width": args.head_width, "compute_dtype": compute}
    module = models.build(ConfigDict(fields | {"widths": (16, 16), "activation": "tanh"}), args.classes)
    half = np.full(3, 0.5)
    task = images.classifier(module, (args.side, args.side, 3), half, half / 2, augmented=False)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, [args.batch, args.side, args.side, 3], dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, args.classes, args.batch, dtype=np.int32)),
    }
    params = jax.jit(task.init)(jax.random.key(0))
    gradient = jax.grad(lambda params, batch: jnp.mean(task.loss(task.outputs(params, batch)[0], batch)))
    step = lambda params, batch: jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params, batch))
    program = jax.jit(step).lower(params, batch).compile()
    _, seconds = timing.steady(program, params, batch, repeats=args.repeats)
    flops = curvature.forward_flops(gradient, params, batch)
    peak = products.measure_peaks(jnp.dtype(dtype))["flops"]
    return {
        "compute": dtype,
        "parameters": f"{trees.ravel(params).size:,}",
        "seconds": seconds,
        "GFLOP": flops / 1e9,
        "GFLOP/s": flops / seconds / 1e9,
        "peak": peak / 1e9,
        "floor s": flops / peak,
        "of floor": seconds * peak / flops,
        "temporary GiB": program.memory_analysis().temp_size_in_bytes / 2**30,
        "min a round": STEPS * seconds / 60,
    }
