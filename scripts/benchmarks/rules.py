"""A FIPA round beside a FedAvg round: `benchmark.py round --rules`.

The published setting: 5 clients of 500 examples, 5 local epochs in batches of 50. A round's stages are timed apart, and

    ratio = (train + sketch + aggregate by fipa) / (train + aggregate by mean)

with the same local training. Sketches: `published`, the whole model by subspace iteration on matrix-free products with
oversample 50 and 5 power steps; `auto`, what the package picks for the whole model; `head`, the last layer alone. The
floors are the floating-point operations of all clients' matrix products, those of a sketch by its own count of products
with the curvature. A sketch's captured share of the trace and largest residual say how good it is.
"""

import argparse
import functools
import inspect
import statistics
import time

from benchmarks import setting, timing
from fipa_jax.client.examples import Client

SKETCHES = {
    "published": {"solver": "subspace", "oversample": 50, "power_steps": 5},
    "auto": {"solver": "auto"},
    "head": {"solver": "head"},
}
HEAD_RANK = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this measurement reads."""
    parser.add_argument("--rules", action="store_true", help="a FIPA round beside a FedAvg round instead")
    parser.add_argument("--ranks", default="50,200", help="of the whole model's sketches")
    parser.add_argument("--sketches", default=",".join(SKETCHES), help="those to measure")
    parser.add_argument("--epochs", type=int, default=5, help="of local training")
    parser.add_argument("--micro-batch", type=int, default=5, help="examples whose curvature is seen at a time")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which a stage is not run again")
    parser.add_argument("--data-dir", default="", help="where TFDS has CIFAR-10; empty for random images")
    parser.add_argument("--init-from", default="", help="a saved model to start from; empty to train one first")


def measure(args) -> dict:
    """Prints and returns the stages' seconds for every sketch."""
    import jax
    import jax.numpy as jnp

    from fipa_jax import aggregate, trees

    examples = args.clients * args.examples
    task, params, data = setting.cifar(args.model, examples, args.data_dir, args.init_from, args.epochs)
    owned = Client(
        jnp.arange(examples, dtype=jnp.int32).reshape(args.clients, -1), jnp.full(args.clients, args.examples)
    )
    own = {name: field[: args.examples] for name, field in data.items()}
    timers, first, rows = {}, {}, []
    for trainable in (".*", "Dense_1/"):
        chosen = [settings for settings in requested(args) if settings["trainable"] == trainable]
        if not chosen:
            continue
        base = parts_of(args, task, trainable, None, aggregate.mean())
        trained = add_stages(timers, first, f"mean {trainable}", base, params, data, owned)[0]
        restricted = restrict(task, params, trainable)
        train_flops = args.clients * training_flops(args, task, own, *restricted)
        for settings in chosen:
            parts = parts_of(args, task, trainable, settings["options"], aggregate.fipa())
            _, sketch, info = add_stages(timers, first, settings["name"], parts, params, data, owned, trained)
            seen = how_seen(settings["options"], own, *restricted)
            products = float(jnp.mean(sketch.report.products))
            rows.append(
                {"sketch": settings["name"], "by": " ".join(seen), "base": f"mean {trainable}"}
                | {"train GFLOP": train_flops / 1e9}
                | {"sketch GFLOP": args.clients * sketch_flops(seen, products, own, *restricted) / 1e9}
                | {"captured": float(info["captured"]), "residual": float(info["sketch_residual"])}
            )
    slow = {name: [value] for name, value in first.items() if value > args.budget}
    seconds = slow | timing.in_turns({n: t for n, t in timers.items() if n not in slow}, args.repeats, args.budget)
    print(
        f"seconds of a round's stages, medians: {args.model} with {trees.ravel(params).size:,} parameters, "
        f"{args.clients} clients x {args.examples} examples, {args.epochs} local epochs, on {jax.devices()[0]}"
    )
    rows = [finish(row, {name: statistics.median(values) for name, values in seconds.items()}) for row in rows]
    timing.table(rows)
    seconds = {" ".join(name): values for name, values in seconds.items()}
    return {"setting": vars(args), "rows": rows, "seconds": seconds}


def requested(args) -> list[dict]:
    """The sketches to measure: name, trainable and the options of `sketch.make_sketch`."""
    found = []
    for name in args.sketches.split(","):
        if name not in SKETCHES:
            raise SystemExit(f"--sketches: unknown {name!r}; known: {', '.join(SKETCHES)}")
        for rank in [HEAD_RANK] if name == "head" else [int(rank) for rank in args.ranks.split(",")]:
            options = {**SKETCHES[name], "rank": rank, "micro_batch": args.micro_batch}
            trainable = "Dense_1/" if name == "head" else ".*"
            found.append({"name": f"{name}, rank {rank}", "trainable": trainable, "options": options})
    return found


def parts_of(args, task, trainable: str, options: dict | None, rule):
    """A round's parts: plain SGD at the clients, the sketch and the rule."""
    import optax

    from fipa_jax.client import first_order as client
    from fipa_jax.client import terms
    from fipa_jax.curvature import sketch
    from fipa_jax.federation.parts import Parts

    def make(outputs, features):
        return sketch.make_sketch(outputs, task.loss, features=features, **options)

    return Parts(
        task=task,
        local=client.first_order(task.loss, task.augment, batch_size=args.batch, micro_batch=-1, epochs=args.epochs),
        term=terms.none(),
        sketcher=None if options is None else sketch.plain(make),
        aggregator=rule,
        server=optax.identity(),
        num_clients=args.clients,
        cohort=args.clients,
        trainable=trainable,
    )


def add_stages(timers: dict, first: dict, name: str, parts, params, data, owned, trained=None) -> tuple:
    """Compiles a round's stages, and adds a timer for each and the seconds of a first run, but for a training given.

    Returns:
      (what training gave, the sketches, the rule's info).
    """
    import jax
    import jax.numpy as jnp

    from fipa_jax.federation import round as rounds
    from fipa_jax.federation.parts import Rates, init
    from fipa_jax.federation.population import Cohort
    from fipa_jax.federation.server import serve

    root, rates = jax.random.key(2), Rates(setting.hyper(), jnp.float32(1), jnp.float32(1))
    state = init(parts, params)

    def add(stage: str, function, *arguments):
        program = jax.jit(functools.partial(function, parts)).lower(*arguments).compile()
        timers[name, stage] = lambda: timing.wall_seconds(program, *arguments)
        start = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        first[name, stage] = time.perf_counter() - start
        return result

    cohort = Cohort(jnp.arange(parts.num_clients), owned, data)
    trained = trained or add("train", rounds.train, state, rates, cohort, root)
    sketches = None
    if parts.sketcher is not None:
        sketches = add("sketch", rounds.sketch, state, rates, cohort, trained, root)
    _, info = add("aggregate", serve, state, rates, cohort, trained, sketches)
    return trained, sketches, info


def finish(row: dict, medians: dict) -> dict:
    """A row with its seconds and the ratio of the two rounds."""
    base = row.pop("base")
    train, mean = medians[base, "train"], medians[base, "aggregate"]
    sketch, fipa = medians[row["sketch"], "sketch"], medians[row["sketch"], "aggregate"]
    found = {
        "train": train,
        "sketch s": sketch,
        "fipa": fipa,
        "mean": mean,
        "ratio": (train + sketch + fipa) / (train + mean),
    }
    return row | found


def restrict(task, params, trainable: str) -> tuple:
    """(the trainable subset, outputs as a function of it and a batch, the last layer's inputs likewise)."""
    from fipa_jax import trees

    outputs = lambda theta, batch: task.outputs(trees.replace(params, theta), batch)
    chosen = trees.select(params, trainable)
    return chosen, lambda theta, batch: outputs(theta, batch)[0], lambda theta, batch: outputs(theta, batch)[1].last


def training_flops(args, task, own, chosen, outputs, features) -> float:
    """Floating-point operations of one client's local training."""
    import jax

    from fipa_jax.curvature import products as curvature

    gradient = jax.grad(lambda theta, batch: task.loss(outputs(theta, batch), batch).mean())
    return args.epochs * curvature.forward_flops(gradient, chosen, own)


def how_seen(options, own, chosen, outputs, features) -> tuple[str, str]:
    """(solver, jacobian) that a sketch comes to."""
    from fipa_jax.curvature import sketch, solver_choice

    bound = inspect.signature(sketch.make_sketch).bind(outputs, None, features=features, **options)
    bound.apply_defaults()
    search, view = (
        kind(**{name: bound.arguments[name] for name in kind._fields})
        for kind in (solver_choice.Search, solver_choice.View)
    )
    search, view = solver_choice.resolve(outputs, chosen, own, search, view)
    return search.solver, view.jacobian


def sketch_flops(seen, products: float, own, chosen, outputs, features, loss_rank: int = 0) -> float:
    """Floating-point operations of a client's sketch of its examples `own`, by the counts of `solver_choice.choose`."""
    import jax

    from fipa_jax import trees
    from fipa_jax.curvature import products as curvature

    out = jax.tree.leaves(jax.eval_shape(outputs, chosen, own))
    examples, classes = out[0].shape[0], loss_rank or sum(leaf.size // leaf.shape[0] for leaf in out)
    rows, size = examples * classes, trees.ravel(chosen).size
    forward = curvature.forward_flops(outputs, chosen, own)
    if seen[1] == "matrix_free":
        return 4 * forward * products
    if seen[1] == "head":
        return forward + 4 * examples * size * products
    narrow, wide = sorted((rows, size))
    pullbacks = 2 * forward * classes
    return pullbacks + (4 * rows * size * products if seen[0] != "exact" else 2 * narrow**2 * wide + 25 * narrow**3)
