"""Where does a config's round spend its time and memory? `benchmark.py profile --config=configs/sine.py --method=fipa`.

Seconds are medians over rounds, each stage waited for. Operations are those of matrix products and convolutions: of
local training by its steps, of a sketch by the products it took, of the merge and an evaluation by their programs; "-"
where a local solver chooses its own number of steps. MiB are of a stage's arguments, results and temporaries on the
device; `sent` is what clients and server exchange. With --trace=DIR the last round is recorded for TensorBoard or
Perfetto (`jax.profiler`).
"""

import argparse
import ast
import contextlib
import runpy
import statistics
from pathlib import Path

from benchmarks import rules, timing
from fipa_jax.client.examples import gather

STAGES = ("fetch", "train", "sketch", "aggregate", "evaluate")
DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "sine.py"


def run(options: list[str]) -> dict:
    """Prints and returns a line for each stage."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(DEFAULT), help="a config file, FILE or FILE:VARIANT")
    parser.add_argument("--set", nargs="*", default=[], help="of its fields: PATH=VALUE, as data.dir=DIR")
    parser.add_argument("--method", default="fipa", help="as in config.compare")
    parser.add_argument("--rounds", type=int, default=5, help="after the first, in which programs are compiled")
    parser.add_argument("--trace", default="", help="a folder for the profiler's trace")
    args = parser.parse_args(options)

    import jax

    config = configured(args)
    with jax.enable_x64(config.precision == "float64"):
        rows, sent = measure(config, args)
    print(f"a round of {args.method} by {args.config}, {sent} sent, on {jax.devices()[0]}")
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def configured(args):
    """The config, with a round's stages apart and a figure of the test set in every round."""
    file, _, variant = args.config.partition(":")
    config = runpy.run_path(file)["get_config"](*([variant] if variant else []))
    config.compare, config.warmup.rounds, config.fipa.rounds = (args.method,), 0, 1 + args.rounds
    config.rounds_per_call, config.stage_seconds, config.eval.every, config.eval.clients_every = 1, True, 1, 0
    for given in args.set:
        path, _, value = given.partition("=")
        with contextlib.suppress(SyntaxError, ValueError):  # then it is a string
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({path: value})
    return config


def measure(config, args) -> tuple[list[dict], str]:
    """(a line for each stage, bytes sent in words)."""
    import jax

    from fipa_jax.config import methods as compared
    from fipa_jax.federation import parts as parts_lib
    from fipa_jax.federation.round import by_clients
    from fipa_jax.federation.state import fetch
    from fipa_jax.run import experiment, loop, programs
    from fipa_jax.run.phase_parts import make_rates
    from fipa_jax.saving.journal import Rows

    built, settings = experiment.build(config), compared.method(config, args.method)
    rows = Rows()
    first, last = settings.copy_and_resolve_references(), settings.copy_and_resolve_references()
    first.rounds, last.rounds = args.rounds, 1
    params = loop.run_phase(built, first, args.method, built.params, 0, rows)
    with jax.profiler.trace(args.trace) if args.trace else contextlib.nullcontext():
        loop.run_phase(built, last, args.method, params, args.rounds, rows)

    parts, rates = experiment.parts_of(built, settings), make_rates(settings, config.precision)
    state = parts_lib.init(parts, params)
    stages = programs.compiled(built.compiled, settings, parts)
    ids, orders = stages.draw(state.round, rates, built.root)
    cohort, seen = built.population.cohort(ids)._replace(orders=orders), fetch(state, ids)
    results, sketches = by_clients(parts, stages.train, stages.sketch)(seen, rates, cohort, built.root)
    arguments = {
        "train": (stages.train, seen, rates, cohort, built.root, sketches if parts.sketch_first else None),
        "sketch": (stages.sketch, seen, rates, cohort, results, built.root),
        "aggregate": (stages.serve, seen, rates, cohort, results, sketches),
        "evaluate": (built.evaluate, params, built.held["test"]),
    }
    if sketches is None:
        del arguments["sketch"]
    flops = operations(settings, parts, state, cohort, sketches, arguments)
    found = [line(stage, rows[1:], flops.get(stage), arguments.get(stage)) for stage in STAGES]
    total = sum(row["seconds"] for row in found)
    rate = lambda row: row["GFLOP"] / row["seconds"] if row["GFLOP"] and row["seconds"] else None
    sent = " MB down, ".join(f"{rows[-1][f'bytes_{way}'] / 1e6:.3g}" for way in ("down", "up")) + " MB up"
    return [row | {"share": row["seconds"] / total, "GFLOP/s": rate(row)} for row in found], sent


def line(stage: str, rows: list[dict], flops: float | None, arguments: tuple | None) -> dict:
    """A line of the table."""
    seconds = statistics.median(row.get(f"seconds_{stage}", 0.0) for row in rows)
    found = {"stage": stage, "seconds": seconds, "GFLOP": None if flops is None else flops / 1e9}
    if arguments is None:
        return found
    program, *given = arguments
    memory = program.lower(*given).compile().memory_analysis()
    sizes = {part: getattr(memory, f"{part}_size_in_bytes") / 2**20 for part in ("argument", "output", "temp")}
    return found | {f"{part} MiB": size for part, size in sizes.items()}


def operations(settings, parts, state, cohort, sketches, arguments: dict) -> dict:
    """{stage: floating-point operations of its matrix products and convolutions}."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fipa_jax.client import first_order as client
    from fipa_jax.curvature import products as curvature
    from fipa_jax.curvature.sketch import Sketch, make_sketch
    from fipa_jax.run.phase_parts import fields_for

    own = gather(cohort.data, cohort.clients.indices[0])
    restricted = chosen, outputs, _ = rules.restrict(parts.task, state.params, parts.trainable)
    evaluate, *given = arguments["evaluate"]
    found = {"evaluate": curvature.forward_flops(evaluate, *given)}
    aggregate, *given = arguments["aggregate"]
    found["aggregate"] = curvature.forward_flops(aggregate, *given)
    local, counts = settings.local, np.asarray(cohort.clients.num_examples)
    if local.optimizer in client.LOCAL_SOLVERS and not settings.local.adaptive.scale:
        size = min(local.batch_size or own_size(own), own_size(own))
        steps = local.steps * np.ones_like(counts) if local.steps else local.epochs * -(-counts // size)
        batch = jax.tree.map(lambda field: field[:size], own)
        gradient = jax.grad(lambda theta, batch: jnp.mean(parts.task.loss(outputs(theta, batch), batch)))
        found["train"] = curvature.forward_flops(gradient, chosen, batch) * int(steps.sum())
    if isinstance(sketches, Sketch):
        mine = jax.tree.map(lambda field: field[: settings.sketch.examples or None], own)
        seen = rules.how_seen(fields_for(make_sketch, settings.sketch), mine, *restricted)
        products = float(jnp.mean(sketches.report.products))
        each = rules.sketch_flops(seen, products, mine, *restricted, loss_rank=settings.sketch.loss_rank)
        found["sketch"] = each * len(counts)
    return found


def own_size(own: dict) -> int:
    """The number of examples."""
    return len(next(iter(own.values())))
