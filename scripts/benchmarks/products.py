"""Seconds of a product H V with the curvature of a trained CNN, by the ways to see it, beside the machine's peaks.

rows          A [N K, P] is held, H = A^T A: two large matrix products; what A itself takes is measured apart
matrix_free   one linearisation of the network for some examples at a time, all columns at once
one by one    the naive form: jvp, then vjp, on all examples, a column after another
vmap          the same under vmap, all columns at once
curvlinops    its GGNLinearOperator on PyTorch, at its best memory layout and examples a pass

FLOP are those of the matrix products in the program, 2 for a multiplication and addition. `of peak` is the share of a
large matrix product's rate, `of read` what a form must move to and from memory at least as a share of a read's rate.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import curvlinops_worker, setting, timing
from fipa_jax import trees
from fipa_jax.curvature import products as curvature
from fipa_jax.data import loading as data


def run(options: list[str]) -> dict:
    """Prints and returns the seconds of every form at every width."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py products", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 5, 20, 50], help="columns of V")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[5, 50, 0], help="examples at a time; 0 all")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB; a form that needs more is left out")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(options)

    task, params, batch = setting.cifar(args.model, args.examples, args.data_dir, args.init_from)
    peaks = measure_peaks()
    describe(task, params, batch)
    print(f"peaks: {peaks['flops'] / 1e9:.1f} GFLOP/s in a matrix product, {peaks['bytes'] / 1e9:.1f} GB/s in a read")
    measure = Measure(args.repeats, args.memory, peaks)
    time_rows(measure, task, params, batch, args)
    for width in args.widths:
        vectors = jax.random.normal(jax.random.key(width), [trees.ravel(params).size, width])
        for name, product in network_products(task, args.micro_batches).items():
            measure(name, width, product, params, batch, vectors)
    peer = curvlinops_worker.start(args.torch_python, *exported(params, batch))
    for width in args.widths if peer else []:
        measure.add("curvlinops", width, *timing.steady(peer.product, width, repeats=args.repeats))
    timing.table(measure.table)
    if peer:
        peer.close()
    return {"setting": vars(args), "peaks": peaks, "peer": peer and peer.about, "products": measure.table}


def add_setting(parser) -> None:
    """The options that say which curvature is measured, and where the peer is."""
    parser.add_argument("--model", default="cnn_23k", help="a CNN of fipa_jax.models")
    parser.add_argument("--examples", type=int, default=500, help="N")
    parser.add_argument("--data-dir", default="", help="where TFDS has prepared CIFAR-10; empty for random images")
    parser.add_argument("--init-from", default="", help="a saved model; empty to train one for five epochs")
    parser.add_argument("--torch-python", default="", help="interpreter that can import torch and curvlinops")


def describe(task, params, batch) -> None:
    """Prints the sizes and how well the network fits the examples: a curvature depends on it."""
    out = task.outputs(params, batch)[0]
    mean = {name: float(value.mean()) for name, value in task.metrics(out, batch).items()}
    size = trees.ravel(params).size
    print(f"P = {size}, N = {out.shape[0]}, K = {out.shape[1]}; {', '.join(f'{k} {v:.3f}' for k, v in mean.items())}")


def exported(params, batch):
    """(weights, normalised images, labels) for a library outside of JAX."""
    weights = {path: np.asarray(leaf) for path, leaf in trees.paths(params).items()}
    mean, std = data.standardise("cifar10", np.asarray(batch["image"]))
    images = np.float32(np.asarray(batch["image"])) * np.float32(1 / (255 * std)) + np.float32(-mean / std)
    return weights, images, np.asarray(batch["label"])


def measure_peaks(dtype=jnp.float32) -> dict:
    """{flops: a second, of a large matrix product; bytes: a second, of the fastest read of a large array}."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square, large = jnp.ones([side, side], dtype), jnp.ones([2**14, 2**13])
    product = timing.steady(jax.jit(jnp.matmul), square, square)[1]
    reads = [timing.steady(jax.jit(read), large)[1] for read in (jnp.sum, jnp.max, lambda x: jnp.sum(x, 1))]
    return {"flops": 2 * square.size * len(square) / product, "bytes": large.nbytes / min(reads)}


def time_rows(measure, task, params, batch, args) -> None:
    """The rows' own time, then their products with A as an argument of the program."""
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    for size in args.micro_batches:
        ggn = curvature.make_ggn(outputs, task.loss, micro_batch=size, jacobian="rows")
        rows = lambda params, batch, ggn=ggn: ggn(params, batch).rows
        written = jax.eval_shape(rows, params, batch)
        measure(f"A itself, {some(size)} at a time", 0, rows, params, batch, nbytes=4 * written.size)
    ggn = curvature.make_ggn(outputs, task.loss, micro_batch=args.micro_batches[0], jacobian="rows")
    matrix = ggn(params, batch)
    for width in args.widths:
        vectors = jax.random.normal(jax.random.key(width), [matrix.size, width])
        product = jax.make_jaxpr(matrix.product)(vectors)  # its constant is A
        held = lambda consts, vectors, product=product: jax.core.eval_jaxpr(product.jaxpr, consts, vectors)
        measure("rows", width, held, product.consts, vectors, nbytes=2 * matrix.rows.nbytes)


def network_products(task, micro_batches) -> dict:
    """{name: (params, batch, V [P, B]) -> H V}, all that go through the network."""
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    product = plain_product(task)

    def matrix_free(size):
        ggn = curvature.make_ggn(outputs, task.loss, micro_batch=size)
        return lambda params, batch, vectors: ggn(params, batch).product(vectors)

    def one_by_one(params, batch, vectors):
        return jax.lax.map(lambda vector: product(params, batch, vector), vectors.T).T

    def side_by_side(params, batch, vectors):
        return jax.vmap(lambda vector: product(params, batch, vector), in_axes=1, out_axes=1)(vectors)

    ours = {f"matrix_free, {some(size)} at a time": matrix_free(size) for size in micro_batches}
    return ours | {"one by one": one_by_one, "vmap": side_by_side}


def plain_product(task):
    """(params, batch, v [P]) -> H v, as one would write it down: J by jvp, L by jvp of the gradient, J^T by vjp."""

    def product(params, batch, vector):
        _, unravel = ravel_pytree(params)
        outputs = lambda p: task.outputs(p, batch)[0]
        gradient = jax.grad(lambda out: jnp.mean(task.loss(out, batch)))
        out, pushed = jax.jvp(outputs, [params], [unravel(vector)])
        curved = jax.jvp(gradient, [out], [pushed])[1]
        return ravel_pytree(jax.vjp(outputs, params)[1](curved)[0])[0]

    return product


def floors(problem, rank: int, peaks: dict) -> list[dict]:
    """Prints the operations and the bytes to and from memory that parts of the work take, and the time at the peaks."""
    task, params, batch = problem
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    forward, out = curvature.forward_flops(outputs, params, batch), outputs(params, batch)
    size, entries = trees.ravel(params).size, out.size * trees.ravel(params).size
    narrow, wide = sorted((out.size, size))
    work = {
        "a forward pass": (forward, 0),
        "A: a forward pass and K pullbacks": (forward + 2 * forward * out.shape[1], 4 * entries),
        "one pass over A": (0, 4 * entries),
        "H V by A, R columns": (4 * entries * rank, 8 * entries),
        "H V through the network, R columns": (forward + 4 * forward * rank, 0),
        "the Gram matrix A A^T": (2 * narrow**2 * wide, 4 * entries),
        "making 3 R columns orthonormal, once": (2 * size * (3 * rank) ** 2, 4 * size * 3 * rank),
    }
    rows = []
    for name, (flops, nbytes) in work.items():
        at_peak = {"s at peak": flops / peaks["flops"] or None, "s to read": nbytes / peaks["bytes"] or None}
        rows.append({"floor": name, "R": rank, "GFLOP": flops / 1e9 or None, "GB": nbytes / 1e9 or None} | at_peak)
    timing.table(rows)
    return rows


def some(size: int) -> str:
    return str(size or "all")


class Measure:
    """Times programs, counts their operations and gathers the table."""

    def __init__(self, repeats: int, memory: float, peaks: dict):
        self.repeats, self.memory, self.peaks, self.table = repeats, memory, peaks, []

    def __call__(self, name: str, width: int, program, *args, nbytes: int = 0) -> None:
        """A program of arrays; `nbytes` is what it must move to and from memory at least, where that is known."""
        compiled = jax.jit(program).lower(*args).compile()
        gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
        if gib > self.memory:
            print(f"{name}, {width} columns, is left out: it needs {gib:.1f} GiB beside its arguments")
            return
        flops = curvature.forward_flops(lambda first, rest: program(first, *rest), args[0], args[1:])
        self.add(name, width, *timing.steady(compiled, *args, repeats=self.repeats), flops, nbytes, gib)

    def add(self, name: str, width: int, first: float, steady: float, flops=0.0, nbytes=0, gib=None) -> None:
        """A line of the table; operations and bytes of 0 are not known."""
        row = {"": name, "columns": width, "seconds": steady, "each": steady / width if width else None}
        row |= {"temporary GiB": gib, "GFLOP": flops / 1e9 or None}
        for label, share, amount, kind in (
            ("GFLOP/s", "of peak", flops, "flops"),
            ("GB/s", "of read", nbytes, "bytes"),
        ):
            row |= {label: amount / steady / 1e9 or None, share: amount / steady / self.peaks[kind] or None}
        self.table.append(row)
