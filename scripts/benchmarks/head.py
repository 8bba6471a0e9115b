"""The last layer's sketch: in closed form over the features, beside the same through the network and local training.

A CNN with random weights below its last layer, on noisy images of as many prototypes as it has classes. The last layer
is trained for the local epochs first, so that its predictions differ. Only its kernel is trainable.

head                           block Lanczos on the closed form; one pass of the network for the features
head, features at hand         the same without that pass, as the features are those that training has used
subspace, closed form          the published iteration on the same products
subspace, through the network  the published iteration, the network's forward pass in every product
training                       the local epochs of plain SGD on the last layer, over features at hand

Errors are against numpy's products with scipy's eigsh, all in float64.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import linalg

from benchmarks import setting, timing
from benchmarks.sketch import Found, Reference, quality
from fipa_jax import trees
from fipa_jax.curvature import products as curvature
from fipa_jax.curvature import sketch
from fipa_jax.models import networks as models
from fipa_jax.tasks import Task, classification, images

KERNEL = "Dense_1/kernel"  # the last layer's


def run(options: list[str]) -> dict:
    """Prints and returns seconds and errors at every rank."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=512, help="F, the last layer's inputs")
    parser.add_argument("--classes", type=int, default=200, help="K")
    parser.add_argument("--examples", type=int, default=1000, help="N")
    parser.add_argument("--pixels", type=int, default=64, help="of an image's side")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 40], help="of the convolutions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--epochs", type=int, default=5, help="of local training")
    parser.add_argument("--micro-batch", type=int, default=50, help="examples at a time in the network")
    parser.add_argument("--repeats", type=int, default=5, help="of each method, in turns")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; a method that took more is not repeated")
    args = parser.parse_args(options)

    task, params, batch = network(args)
    cached = {"features": features_of(task, params, batch, args.micro_batch), "label": batch["label"]}
    train = jax.jit(setting.local_training(head_task(), args.examples, args.epochs))
    head = trees.select(params, KERNEL)
    head = jax.tree.map(jnp.add, head, train(head, cached, jax.random.key(1)))
    params = trees.replace(params, head)
    flops = curvature.forward_flops(lambda p, b: task.outputs(p, b)[0], params, batch)
    share = head[KERNEL].size / trees.ravel(params).size
    print(f"P = {head[KERNEL].size}, {share:.1%} of the network; a forward pass is {flops / 1e9:.1f} GFLOP")
    exact = reference(task, params, batch, max(args.ranks), args.micro_batch)
    result = {"setting": vars(args), "flops": flops, "ranks": {}}
    for rank in args.ranks:
        methods = sketches(task, params, batch, cached, rank, args.micro_batch)
        methods["training"] = lambda: train(head, cached, jax.random.key(2))
        result["ranks"][rank] = measure(methods, rank, exact, args)
    return result


def network(args):
    """(task, params, batch): the classifier, and noisy images of its classes' prototypes."""
    rng, shape = np.random.default_rng(0), (args.pixels, args.pixels, 3)
    labels = rng.integers(0, args.classes, args.examples, dtype=np.int32)
    prototypes = rng.normal(0, 40, (args.classes, *shape)).astype(np.float32)
    noisy = 128 + prototypes[labels] + rng.normal(0, 40, (args.examples, *shape)).astype(np.float32)
    batch = {"image": jnp.asarray(np.uint8(np.clip(noisy, 0, 255))), "label": jnp.asarray(labels)}
    module = models.CNN(tuple(args.channels), args.classes, hidden=args.features)
    task = images.classifier(module, shape, np.full(3, 0.5), np.full(3, 0.25), augmented=False)
    return task, task.init(jax.random.key(0)), batch


def head_task() -> Task:
    """The last layer alone, on a batch that holds its inputs."""

    def outputs(params, batch):
        features = batch["features"]
        return features @ params[KERNEL], models.Features((), features, features)

    return Task(None, outputs, classification.loss, images.metrics)


def features_of(task, params, batch, chunk: int) -> jax.Array:
    """[N, F], the last layer's inputs."""
    single = lambda image: task.outputs(params, {"image": image[None]})[1].last[0]
    return jax.lax.map(single, batch["image"], batch_size=chunk)


def sketches(task, params, batch, cached, rank: int, micro_batch: int) -> dict:
    """{name: () -> Found}, each a program of its own."""
    head = trees.select(params, KERNEL)
    through = {"solver": "subspace", "jacobian": "matrix_free", "oversample": 10}
    closed = {"solver": "subspace", "jacobian": "head", "oversample": 10}

    def method(task, batch, whole, **chosen):
        @jax.jit
        def run(key, whole, head, batch):
            outputs = lambda head, batch: task.outputs(trees.replace(whole, head), batch)
            solve = sketch.make_sketch(
                lambda head, batch: outputs(head, batch)[0],
                task.loss,
                features=lambda head, batch: outputs(head, batch)[1].last,
                rank=rank,
                **chosen,
            )
            found = solve(key, head, batch)
            return Found(found.eigenvalues, found.basis, found.report.products)

        return lambda: run(jax.random.key(3), whole, head, batch)

    networks = {
        "head": {"solver": "head"},
        "subspace s=10 q=2, closed form": {**closed, "power_steps": 2},
        "subspace s=10 q=1, through the network": {**through, "power_steps": 1},
        "subspace s=10 q=2, through the network": {**through, "power_steps": 2},
    }
    methods = {
        name: method(task, batch, params, micro_batch=micro_batch, **chosen) for name, chosen in networks.items()
    }
    return methods | {"head, features at hand": method(head_task(), cached, head, solver="head")}


def measure(methods: dict, rank: int, exact: Reference, args) -> dict:
    """Seconds of all methods in turns, and the errors of those that are sketches."""
    first, found = {}, {}
    for name, method in methods.items():
        first[name] = timing.wall_seconds(lambda: found.update({name: method()}) or found[name])
    turns = {name: lambda method=method: timing.wall_seconds(method) for name, method in methods.items()}
    seconds = timing.in_turns(turns, args.repeats, args.budget)
    steady = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, made in found.items():
        row = {"": name, "R": rank, "first call s": first[name], "steady s": steady[name]}
        row |= {f"to {other}": steady[name] / steady[other] for other in ("head", "training")}
        if isinstance(made, Found):
            row |= {"products": int(made.products)} | quality(made, exact)
        rows.append(row)
    timing.table(rows)
    return {"methods": rows, "seconds": seconds}


def reference(task, params, batch, top: int, chunk: int) -> Reference:
    """The exact eigenpairs of 1/N sum_n (phi_n phi_n^T) kron (diag(p_n) - p_n p_n^T), in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), params)
        phi = np.asarray(features_of(task, params, batch, chunk))
        logits = phi @ np.asarray(trees.paths(params)[KERNEL])
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    examples, shape = len(phi), (phi.shape[1], p.shape[1])

    def product(vector):
        pushed = p * (phi @ vector.reshape(shape))
        curved = pushed - p * pushed.sum(1, keepdims=True)
        return (phi.T @ curved / examples).reshape(-1)

    size = shape[0] * shape[1]
    matrix = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    eigenvalues, vectors = linalg.eigsh(matrix, top, which="LA", ncv=4 * top, tol=1e-12, v0=start)
    trace = np.sum((phi**2).sum(1) * (p - p**2).sum(1)) / examples
    order = np.argsort(-eigenvalues)
    return Reference(eigenvalues[order], vectors[:, order], trace)
