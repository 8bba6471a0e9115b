"""A round's client work with ragged clients, beside the sum of the clients' own work: `benchmark.py ragged`.

The clients of a by-class Dirichlet split, all of one cohort, are run together by `parallel.map_clients`, padded to the
largest of them; and each alone, by a program of its own that is padded to nothing. What the first takes beyond the
second is spent on padding. Local training and sketches are those of the FIPA phase of `recipes.whole_model`. User CPU
seconds, medians, the variants in alternation.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setting, timing
from benchmarks.round_workers import serve
from fipa_jax.client import first_order as client
from fipa_jax.client.examples import Client, gather, present, subsample
from fipa_jax.config import recipes
from fipa_jax.curvature import sketch
from fipa_jax.data import partition
from fipa_jax.federation import parallel
from fipa_jax.models import networks as models
from fipa_jax.run import phase_parts as phase
from fipa_jax.tasks import images


def run(options: list[str]) -> dict:
    """Prints and returns the seconds of training and sketches in every way to run the clients."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cnn_23k", help="a CNN of fipa_jax.models")
    parser.add_argument("--examples", type=int, default=4000, help="of all clients together")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=0.1, help="of the by-class Dirichlet split")
    parser.add_argument("--epochs", type=int, default=5, help="of local training")
    parser.add_argument("--rank", type=int, default=50, help="of the sketches")
    parser.add_argument("--sketch-examples", type=int, default=250, help="of a client, that its sketch sees; 0 for all")
    parser.add_argument("--micro-batch", type=int, default=5, help="examples whose curvature is seen at a time")
    parser.add_argument("--solver", default="auto", help="of the sketches")
    parser.add_argument("--chunk", type=int, default=4, help="clients side by side, beside one after another")
    parser.add_argument("--repeats", type=int, default=3, help="of each variant, in turns")
    args = parser.parse_args(options)
    data = setting.random_images(args.examples)
    split = partition.dirichlet_by_class(np.random.default_rng(0), data["label"], args.clients, args.alpha)
    variants = variants_of(args, {name: jnp.asarray(field) for name, field in data.items()}, split)
    timing.in_turns(variants, 1)  # compiles and warms up
    seconds = timing.in_turns(variants, args.repeats)
    sizes = sorted(map(len, split), reverse=True)
    print(
        f"user CPU seconds of a cohort's work: {args.model}, {args.clients} clients of {', '.join(map(str, sizes))} "
        f"examples, {args.epochs} local epochs, sketches of rank {args.rank}, on {jax.devices()[0]}"
    )
    rows = report({name: statistics.median(values) for name, values in seconds.items()})
    seconds = {" ".join(name): values for name, values in seconds.items()}
    return {"setting": vars(args), "sizes": sizes, "rows": rows, "seconds": seconds}


def variants_of(args, data: dict, split: list[np.ndarray]) -> dict:
    """{(way to run the clients, stage): () -> user CPU seconds of the cohort}."""
    own = [Client(jnp.asarray(indices, jnp.int32), jnp.int32(len(indices))) for indices in split]
    cohort = Client(*map(jnp.asarray, partition.pad(split)))
    keys = jax.random.split(jax.random.key(0), len(split))
    variants = {}
    for stage, (work, params) in work_of(args).items():
        together = lambda chunk, sort, work=work: jax.jit(
            lambda params, data, cohort, keys: parallel.map_clients(
                work, (params, data), cohort, keys, sizes=cohort.num_examples if sort else None, chunk=chunk
            )
        )
        whole = (params, data, cohort, keys)
        each = [(params, data, one, key) for one, key in zip(own, keys, strict=True)]
        variants["each alone", stage] = timer(jax.jit(work), each)
        variants["one after another", stage] = timer(together(1, True), [whole])
        variants[f"chunks of {args.chunk}", stage] = timer(together(args.chunk, True), [whole])
        variants[f"chunks of {args.chunk}, unsorted", stage] = timer(together(args.chunk, False), [whole])
    return variants


def work_of(args) -> dict:
    """{stage: (a client's work (params, data, client, key) -> arrays, the parameters)}."""
    config = recipes.images("cifar10", args.model)
    recipes.whole_model(config)
    local, seen = config.fipa.local, config.fipa.sketch
    local.epochs, seen.rank, seen.micro_batch, seen.solver = args.epochs, args.rank, args.micro_batch, args.solver
    half = np.full(3, 0.5)
    module = models.MODELS[args.model](None, setting.NUM_CLASSES)
    task = images.classifier(module, setting.SHAPE, half, half / 2, augmented=False)
    solve = client.first_order(task.loss, task.augment, **phase.fields_for(client.first_order, local))
    outputs = lambda params, batch: task.outputs(params, batch)[0]
    find = sketch.make_sketch(outputs, task.loss, **phase.fields_for(sketch.make_sketch, seen))

    def train(params, data, owned, key):
        return solve(task.outputs, params, data, owned, key, setting.hyper(local.lr), (), ()).delta

    def see(params, data, owned, key):
        draw_key, solve_key = jax.random.split(key)
        owned = subsample(draw_key, owned, args.sketch_examples)
        return find(solve_key, params, gather(data, owned.indices), present(owned))

    params = task.init(jax.random.key(1))
    return {"train": (train, params), "sketch": (see, params)}


def timer(program, calls: list[tuple]):
    """() -> user CPU seconds of all the calls."""

    def measured():
        start = serve.user_seconds()
        for call in calls:
            jax.block_until_ready(program(*call))
        return serve.user_seconds() - start

    return measured


def report(medians: dict) -> list[dict]:
    """Prints and returns a line for every way: seconds, and their ratios to the clients' own work."""
    ways = list(dict.fromkeys(way for way, _ in medians))
    seconds = {way: {"train": medians[way, "train"], "sketch": medians[way, "sketch"]} for way in ways}
    for stages in seconds.values():
        stages["both"] = stages["train"] + stages["sketch"]
    own = seconds["each alone"]
    ratio = lambda stages: {f"{stage} / alone": stages[stage] / max(own[stage], 1e-9) for stage in stages}
    rows = [{"": way} | stages | ratio(stages) for way, stages in seconds.items()]
    timing.table(rows)
    return rows
