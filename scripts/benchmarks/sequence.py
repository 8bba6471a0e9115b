"""A sequence model's sketch: seconds, memory and products, by what is trained and how it is made.

A small causal transformer, trained for --steps on windows of a random text in which each symbol is followed by one of
four. What is trained: the whole model, adapters (LoRA), or the last layer. `temporary MiB` is what XLA sets aside for
the program beside its arguments and results. `rows GiB` is what the explicit rows [N T K, P] would be; they are not
made. `captured` is the share of the trace that the pairs have.

lanczos       block Lanczos on matrix-free products, all windows at a time or some; by `auto`, but for the last layer
subspace      the published iteration on the same products
head          block Lanczos on the last layer's closed form over the features of all positions; by `auto` for it
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from fipa_jax import trees
from fipa_jax.curvature import sketch
from fipa_jax.models import networks
from fipa_jax.tasks import text

TRAINED = {"whole model": "^(?!.*lora)", "adapters": "lora", "last layer": "^head/"}


def run(options: list[str]) -> dict:
    """Prints and returns seconds and memory of every way."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py sequence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--symbols", type=int, default=65, help="K")
    parser.add_argument("--window", type=int, default=32, help="T")
    parser.add_argument("--examples", type=int, default=32, help="N")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lora-rank", type=int, default=2)
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=4, help="windows at a time, where not all are")
    parser.add_argument("--steps", type=int, default=200, help="of Adam, before")
    parser.add_argument("--repeats", type=int, default=2, help="of each method, in turns")
    args = parser.parse_args(options)

    task, params, batch = problem(args)
    rows, found, runs = [], {}, {}
    for trained, pattern in TRAINED.items():
        part = trees.select(params, pattern)
        size = trees.ravel(part).size
        full = args.examples * args.window * args.symbols * size * 4 / 2**30
        for name, chosen in ways(args, trained).items():
            key = f"{trained}: {name}"
            program = jax.jit(method(task, params, args.rank, chosen)).lower(jax.random.key(3), part, batch).compile()
            runs[key] = lambda program=program, part=part: program(jax.random.key(3), part, batch)
            found[key] = runs[key]()
            temporary = program.memory_analysis().temp_size_in_bytes / 2**20
            rows.append({"": key, "P": size, "rows GiB": full, "temporary MiB": temporary})
    turns = {key: lambda run=run: cpu_seconds(run) for key, run in runs.items()}
    seconds = timing.in_turns(turns, args.repeats)
    for row in rows:
        made = found[row[""]]
        row["CPU seconds"] = statistics.median(seconds[row[""]])
        row["products"] = int(made.report.products)
        row["converged"] = str(bool(made.report.converged))
        row["captured"] = float(jnp.sum(made.eigenvalues) / made.report.trace)
    timing.table(rows)
    return {"setting": vars(args), "methods": rows, "seconds": seconds}


def problem(args):
    """(task, params, batch) of a transformer that has learned something."""
    rng = np.random.default_rng(0)
    follow = rng.integers(0, args.symbols, (args.symbols, 4))
    words = np.zeros((args.examples, args.window + 1), np.int32)
    words[:, 0] = rng.integers(0, args.symbols, args.examples)
    for t in range(args.window):
        words[:, t + 1] = follow[words[:, t], rng.integers(0, 4, args.examples)]
    batch = {"x": jnp.asarray(words[:, :-1]), "y": jnp.asarray(words[:, 1:])}
    module = networks.Transformer(args.symbols, args.width, args.layers, heads=4, lora_rank=args.lora_rank)
    task, optimizer = text.next_symbol(module, args.window), optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        mean_loss = lambda params: jnp.mean(task.loss(task.outputs(params, batch)[0], batch))
        change, state = optimizer.update(jax.grad(mean_loss)(params), state)
        return (optax.apply_updates(params, change), state), None

    params = jax.jit(task.init)(jax.random.key(0))
    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=args.steps)[0][0])
    return task, train(params), batch


def ways(args, trained: str) -> dict:
    """{name: options of `make_sketch`}."""
    if trained == "last layer":
        return {"lanczos": {"solver": "lanczos"}, "head": {"solver": "head"}}
    small = {"solver": "lanczos", "micro_batch": args.micro_batch}
    return {
        "lanczos": {"solver": "lanczos"},
        f"lanczos, {args.micro_batch} at a time": small,
        "subspace": {"solver": "subspace"},
    }


def cpu_seconds(run) -> float:
    """Seconds of all cores that a call takes, which what else the machine does hardly changes."""
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def method(task, params, rank: int, chosen: dict):
    """(key, what is trained, batch) -> Sketch."""

    def outputs(part, batch):
        return task.outputs(trees.replace(params, part), batch)

    return sketch.make_sketch(
        lambda part, batch: outputs(part, batch)[0],
        task.loss,
        rank=rank,
        features=lambda part, batch: outputs(part, batch)[1].last,
        **chosen,
    )
