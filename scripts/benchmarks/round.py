"""One client's work in a round, one epoch of plain SGD, beside other libraries; with --rules FIPA beside FedAvg.

The same network on the same random uint8 images 32x32x3 everywhere, the pixels made floats inside the epoch. All start
from the same weights, and a peer whose logits then differ from ours ends the measurement. Seconds are user CPU seconds
of one client's epoch, the variants in alternation. Ours: one client's program after another, several clients by
lax.map, and by vmap. PyTorch: its bare training loop. pfl, fedjax and Flower: their own FedAvg simulation of one client
a round, for the CNNs alone; Flower's seconds are those of all its processes. Each runs in an interpreter of its own;
one that is not named is left out.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import rules, setting, timing
from benchmarks.round_workers import serve
from fipa_jax.client.examples import Client

PEERS = ("torch", "pfl", "fedjax", "flower")
RESNET_PEERS = ("torch",)
TOLERANCE = 1e-3  # of the largest logit: float32, and one network's order of sums is not another's


def run(options: list[str]) -> dict:
    """Measures a client's work beside the peers', or with --rules a FIPA round beside a FedAvg round."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py round", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cnn_23k", help="a CNN or ResNet of fipa_jax.models")
    parser.add_argument("--examples", type=int, default=500, help="of a client")
    parser.add_argument("--batch", type=int, default=setting.BATCH)
    parser.add_argument("--clients", type=int, default=5, help="of a round, and of the stacked variants")
    parser.add_argument("--repeats", type=int, default=7, help="of each variant, in turns")
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", default="", help=f"interpreter that can import {peer}")
    rules.add_options(parser)
    args = parser.parse_args(options)
    return rules.measure(args) if args.rules else measure(args)


def measure(args) -> dict:
    """Prints and returns all variants' seconds."""
    module = setting.module(args.model)
    task, params, train = problem(args, module)
    variants, flops = ours(args, task, params, train)
    workers, versions, differences = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        spec = describe(args, module, params, Path(folder) / "weights.npz")
        for peer in PEERS:
            worker, hello = start(peer, getattr(args, f"{peer}_python"), spec)
            if worker is None:
                continue
            workers[peer], versions[peer] = worker, hello["versions"]
            differences[peer] = difference(task, params, train, np.array(hello["logits"]))
            variants |= {name: lambda worker=worker, name=name: ask(worker, name) for name in hello["variants"]}
    try:
        check(differences)
        timing.in_turns(variants, 1)  # compiles and warms up
        seconds = timing.in_turns(variants, args.repeats)
    finally:
        for worker in workers.values():
            worker.communicate("")
    print(
        f"user CPU seconds of one client's epoch: {args.model}, {args.examples} examples in batches of {args.batch}; "
        f"{flops / 1e9:.2f} GFLOP in matrix products\n{', '.join(versions.values())}"
    )
    report(seconds, flops)
    found = {"peers": versions, "differences": differences, "flops": flops, "seconds": seconds}
    return {"setting": vars(args), **found}


def problem(args, module) -> tuple:
    """(task, parameters, {image: [N, 32, 32, 3] uint8, label: [N] int32} of all clients).

    The parameters are drawn here, kernels by their fan-in: a ResNet's own first ones have zeros for scales, which would
    hide the half of its convolutions from the comparison of logits.
    """
    import jax
    import jax.numpy as jnp

    from fipa_jax.tasks import images

    half, rng = np.full(3, 0.5), np.random.default_rng(1)
    task = images.classifier(module, setting.SHAPE, half, half / 2, augmented=False)
    draw = lambda leaf: jnp.float32(rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])))
    params = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
    train = setting.random_images(args.examples * args.clients)
    return task, params, {name: jnp.asarray(field) for name, field in train.items()}


def describe(args, module, params, weights: Path) -> dict:
    """What the workers are to run; writes the weights {path: leaf} for them."""
    from fipa_jax import trees
    from fipa_jax.models import networks as models

    np.savez(weights, **{path: np.asarray(leaf) for path, leaf in trees.paths(params).items()})
    fields = ("widths", "blocks") if isinstance(module, models.ResNet) else ("channels", "hidden")
    spec = {name: getattr(module, name) for name in fields} | {"classes": setting.NUM_CLASSES, "lr": setting.LR}
    return spec | {"examples": args.examples, "batch": args.batch, "weights": str(weights)}


def difference(task, params, train, logits: np.ndarray) -> float:
    """The largest difference of a peer's logits [B, K] of the first batch to ours, relative to our largest."""
    import jax

    batch = {name: field[: len(logits)] for name, field in train.items()}
    ours = np.asarray(jax.jit(task.outputs)(params, batch)[0])
    return float(np.abs(logits - ours).max() / np.abs(ours).max())


def check(differences: dict[str, float]) -> None:
    """Prints how far the peers' logits are from ours; ends where one's network is not ours."""
    for peer, value in differences.items():
        print(f"{peer}: with our weights its logits differ from ours by {value:.0e} of the largest")
        if not value < TOLERANCE:
            raise SystemExit(f"{peer}'s network is not ours: its logits may differ by {TOLERANCE:g}; see its worker")


def ours(args, task, params, train) -> tuple[dict, float]:
    """Our client's work run in several ways.

    Returns:
      {name: () -> user CPU seconds for one client}, and the floating-point operations of one client's matrix products.
    """
    import jax
    import jax.numpy as jnp

    from fipa_jax.client import first_order as client
    from fipa_jax.curvature import products as curvature
    from fipa_jax.federation import parallel as simulate

    clients, examples = args.clients, args.examples
    solve = client.first_order(task.loss, task.augment, batch_size=args.batch, micro_batch=-1, epochs=1)
    owned = Client(
        indices=jnp.arange(examples * clients, dtype=jnp.int32).reshape(clients, examples),
        num_examples=jnp.full(clients, examples),
    )
    keys, hyper = jax.random.split(jax.random.key(0), clients), setting.hyper()

    def local(params, train, owned, key):
        return solve(task.outputs, params, train, owned, key, hyper, (), ()).delta

    def stacked(chunk):
        return lambda params, train, owned, keys: simulate.map_clients(local, (params, train), owned, keys, chunk=chunk)

    each = [(params, train, jax.tree.map(lambda leaf: leaf[c], owned), keys[c]) for c in range(clients)]
    programs = {"ours, client by client": (jax.jit(local), each)}
    if clients > 1:
        programs |= {
            f"ours, {clients} clients by lax.map": (jax.jit(stacked(1)), [(params, train, owned, keys)]),
            f"ours, {clients} clients by vmap": (jax.jit(stacked(0)), [(params, train, owned, keys)]),
        }

    def timer(program, calls):
        def measured():
            start = serve.user_seconds()
            for call in calls:
                jax.block_until_ready(program(*call))
            return (serve.user_seconds() - start) / clients

        return measured

    batch = {name: field[: args.batch] for name, field in train.items()}
    gradient = jax.grad(lambda params, batch: task.loss(task.outputs(params, batch)[0], batch).mean())
    flops = curvature.forward_flops(gradient, params, batch) * examples / args.batch
    return {name: timer(*program) for name, program in programs.items()}, flops


def start(peer: str, python: str, spec: dict):
    """Starts a peer's worker; (process, {versions, variants}), or (None, None) and a line that says why."""
    if "widths" in spec and peer not in RESNET_PEERS:
        print(f"{peer} is left out: its worker has no ResNet, the CNNs alone.")
        return None, None
    if not python:
        print(f"{peer} is left out: name an interpreter that has it with --{peer}-python.")
        return None, None
    worker = subprocess.Popen(
        [python, "-m", f"benchmarks.round_workers.{peer}_worker", json.dumps(spec)],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    hello = worker.stdout.readline()
    if not hello:
        print(f"{peer} is left out: its worker did not start in {python}, see the error above.")
        return None, None
    return worker, json.loads(hello)


def ask(worker: subprocess.Popen, variant: str) -> float:
    """Has a worker train for an epoch and returns its user CPU seconds."""
    worker.stdin.write(variant + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"the worker of {variant!r} has ended; its error is above")
    return float(answer)


def ratio(above: float, below: float) -> float | None:
    """above / below; None where the clock's ticks were too long to see the time below."""
    return above / below if below else None


def report(seconds: dict[str, list[float]], flops: float) -> None:
    """Prints medians, the rate of the matrix products, and the ratios to ours and to plain PyTorch."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baselines = [next(iter(medians)), *(name for name in medians if name.startswith("torch"))]
    timing.table(
        [
            {"": name, "median": median, "min": min(seconds[name]), "max": max(seconds[name])}
            | {"GFLOP/s": ratio(flops / 1e9, median)}
            | {f"/ {baseline}": ratio(median, medians[baseline]) for baseline in baselines}
            for name, median in medians.items()
        ]
    )
