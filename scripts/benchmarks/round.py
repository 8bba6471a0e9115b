"""One client's work in a round, one epoch of plain SGD, beside other libraries; with --rules FIPA beside FedAvg.

The same CNN on the same random uint8 images 32x32x3 everywhere, the pixels made floats inside the epoch. Seconds are
user CPU seconds of one client's epoch, the variants in alternation. Ours: one client's program after another, several
clients by lax.map, and by vmap. PyTorch: its bare training loop. pfl and fedjax: their own FedAvg simulation of one
client a round. Each runs in an interpreter of its own; one that is not named is left out.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from benchmarks import rules, setting, timing
from benchmarks.round_workers import serve

PEERS = ("torch", "pfl", "fedjax")


def run(options: list[str]) -> dict:
    """Measures a client's work beside the peers', or with --rules a FIPA round beside a FedAvg round."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py round", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cnn_23k", help="a CNN of fipa_jax.models with two convolutions")
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
    from fipa_jax import models

    module = models.MODELS[args.model](None, setting.NUM_CLASSES)
    variants, flops = ours(args, module)
    versions, workers = {}, []
    spec = {"channels": list(module.channels), "hidden": module.hidden, "classes": setting.NUM_CLASSES}
    spec |= {"examples": args.examples, "batch": args.batch, "lr": setting.LR}
    for peer in PEERS:
        worker, hello = start(peer, getattr(args, f"{peer}_python"), spec)
        if worker is None:
            continue
        workers.append(worker)
        versions[peer] = hello["versions"]
        variants |= {name: lambda worker=worker, name=name: ask(worker, name) for name in hello["variants"]}
    timing.in_turns(variants, 1)  # compiles and warms up
    seconds = timing.in_turns(variants, args.repeats)
    for worker in workers:
        worker.communicate("")
    print(
        f"user CPU seconds of one client's epoch: {args.model}, {args.examples} examples in batches of {args.batch}; "
        f"{flops / 1e9:.2f} GFLOP in matrix products\n{', '.join(versions.values())}"
    )
    report(seconds, flops)
    return {"setting": vars(args), "peers": versions, "flops": flops, "seconds": seconds}


def ours(args, module) -> tuple[dict, float]:
    """Our client's work run in several ways.

    Returns:
      {name: () -> user CPU seconds for one client}, and the floating-point operations of one client's matrix products.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fipa_jax import client, curvature, simulate
    from fipa_jax.tasks import images

    clients, examples = args.clients, args.examples
    train = {name: jnp.asarray(field) for name, field in setting.random_images(examples * clients).items()}
    half = np.full(3, 0.5)
    task = images.classifier(module, setting.SHAPE, half, half / 2, augmented=False)
    solve = client.first_order(task.loss, task.augment, batch_size=args.batch, epochs=1)
    owned = simulate.Client(
        indices=jnp.arange(examples * clients, dtype=jnp.int32).reshape(clients, examples),
        num_examples=jnp.full(clients, examples),
    )
    keys, params, hyper = jax.random.split(jax.random.key(0), clients), task.init(jax.random.key(1)), setting.hyper()

    def local(params, train, owned, key):
        return solve(task.outputs, params, train, owned, key, hyper, (), ()).delta

    def stacked(chunk):
        return lambda params, train, owned, keys: simulate.map_clients(local, (params, train), owned, keys, chunk=chunk)

    each = [(params, train, jax.tree.map(lambda leaf: leaf[c], owned), keys[c]) for c in range(clients)]
    programs = {
        "ours, client by client": (jax.jit(local), each),
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


def report(seconds: dict[str, list[float]], flops: float) -> None:
    """Prints medians, the rate of the matrix products, and the ratios to ours and to plain PyTorch."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baselines = [next(iter(medians)), *(name for name in medians if name.startswith("torch"))]
    timing.table(
        [
            {"": name, "median": median, "min": min(seconds[name]), "max": max(seconds[name])}
            | {"GFLOP/s": flops / median / 1e9}
            | {f"/ {baseline}": median / medians[baseline] for baseline in baselines}
            for name, median in medians.items()
        ]
    )
