"""FIPA from sums beside FIPA from eigenpairs: errors and seconds of runs, the server's work, a client's work, bits.

runs    a config's rounds by eigenpairs and from sums: the figure after some rounds, seconds of the clients and server
bits    the same run from sums in fixed point of 16, 24, 32 bits, beside floating point
server  seconds and temporary memory of the server's step for ever more clients; from sums it sees one row of totals
client  seconds and products of one client's message: eigenpairs at rank R, beside s + 1 products
"""

import argparse
import importlib.util
import statistics
import tempfile
from pathlib import Path

from benchmarks import timing

PARTS = ("runs", "bits", "server", "client")
GRADIENTS, TRAINED = "fipa_sums_of_gradients", "fipa_sums"


def run(options: list[str]) -> dict:
    """Measures the parts asked for."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py sums", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--config", default=str(Path(__file__).resolve().parents[2] / "configs" / "sine.py"))
    parser.add_argument("--method", default=GRADIENTS, choices=(GRADIENTS, TRAINED), help="the one from sums")
    parser.add_argument("--columns", type=int, nargs="+", default=[20], help="s of runs; of all else the last")
    parser.add_argument("--rounds", type=int, nargs="+", default=[50, 100, 200], help="after which a figure is shown")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], help="fields of the config, PATH=VALUE")
    parser.add_argument("--size", type=int, default=23_711, help="P of server and client")
    parser.add_argument("--rank", type=int, default=50, help="R of server and client")
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 20, 100, 500], help="C of server")
    parser.add_argument("--most-width", type=int, default=2500, help="server: no merge of more eigenpairs than this")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(options)
    measures = {"runs": measure_runs, "bits": measure_bits, "server": measure_server, "client": measure_client}
    unknown = set(args.parts.split(",")) - set(measures)
    if unknown:
        raise SystemExit(f"--parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(measures)}")
    return {"setting": vars(args)} | {part: measures[part](args) for part in args.parts.split(",")}


def measure_runs(args) -> list[dict]:
    """Prints and returns a row for each method and seed."""
    specs = {"eigenpairs": "fipa"} | {
        f"sums, s = {columns}": f"{args.method}:aggregator.sums.columns={columns}" for columns in args.columns
    }
    return _compared(args, specs, "runs")


def measure_bits(args) -> list[dict]:
    """Prints and returns a row for each width of the words and seed."""
    start = f"{args.method}:aggregator.sums.columns={args.columns[-1]}"
    words = {f"{bits} bits": f"{start}:aggregator.sums.bits={bits}" for bits in (32, 24, 16)}
    return _compared(args, {"floating point": start} | words, "bits")


def _compared(args, specs: dict, title: str) -> list[dict]:
    rows = [row for seed in args.seeds for row in _rows_of(args, specs, seed)]
    print(f"\n{title}: {Path(args.config).name}, the figure after so many rounds; seconds of a round are medians")
    timing.table(rows)
    return rows


def _rows_of(args, specs: dict, seed: int) -> list[dict]:
    """A row for each method, of one run that compares all of them."""
    import jax

    from fipa_jax.config import fields
    from fipa_jax.reporting import metrics
    from fipa_jax.run import whole_run

    spec = importlib.util.spec_from_file_location("measured", args.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.compare, config.fipa.rounds, config.seed = tuple(specs.values()), max(args.rounds), seed
    config.rounds_per_call, config.eval.every, config.eval.clients_every = 1, 1, 0
    for change in args.set:
        path, _, text = change.partition("=")
        group, name = fields.find(config, path)
        group[name] = fields.parse(text, group[name])
    with tempfile.TemporaryDirectory() as folder, jax.enable_x64(config.precision == "float64"):
        whole_run.run(config, folder)
        found = metrics.read(Path(folder) / "metrics.jsonl")
    return [_row(name, seed, [row for row in found if row["run"] == spec], args.rounds) for name, spec in specs.items()]


def _row(name: str, seed: int, rows: list[dict], rounds: list[int]) -> dict:
    first = rows[0]["round"] - 1
    figure = next(key for key in rows[-1] if key.startswith("test_"))
    of_round = {row["round"] - first: row[figure] for row in rows}
    stages = {
        stage: [row.get(f"seconds_{stage}", 0.0) for row in rows[2:]] for stage in ("train", "sketch", "aggregate")
    }
    seconds = {f"{stage} s": statistics.median(values) for stage, values in stages.items()}
    whole = sum(sum(values) for values in stages.values())
    return (
        {"method": name, "seed": seed}
        | {f"{figure} @{k}": of_round[k] for k in rounds if k in of_round}
        | seconds
        | {"all rounds s": whole, "MB up": rows[-1]["bytes_up"] / 1e6}
        | ({"s": rows[-1]["columns"], "tail": rows[-1]["tail"]} if "columns" in rows[-1] else {})
    )


def measure_server(args) -> list[dict]:
    """Prints and returns the server's seconds and temporary memory, a row for each number of clients."""
    rows = []
    for clients in args.clients:
        row = {"clients": clients, "P": args.size}
        if clients * args.rank <= args.most_width:
            row |= _measured("eigenpairs", *_eigenpairs(args, clients), args.repeats)
        rows.append(row | _measured("sums", *_of_sums(args), args.repeats))
    print(
        f"\nserver: R = s = {args.rank}; MiB of the messages and of the step's temporaries; '-': not measured, as "
        f"the merged rank is above {args.most_width}"
    )
    timing.table(rows)
    return rows


def _measured(name: str, program, given: tuple, repeats: int) -> dict:
    compiled = program.lower(*given).compile()
    memory, mib = compiled.memory_analysis(), 2**20
    seconds = timing.steady(compiled, *given, repeats=repeats)[1]
    held = {"messages MiB": memory.argument_size_in_bytes / mib, "temporaries MiB": memory.temp_size_in_bytes / mib}
    return {f"{name} s": seconds} | {f"{name} {what}": value for what, value in held.items()}


def _eigenpairs(args, clients: int) -> tuple:
    """(the jitted merge, what it is given) of so many clients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fipa_jax import aggregate
    from fipa_jax.curvature import Sketch

    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(args.size, args.rank)).astype(np.float32))[0]
    basis = jnp.asarray(np.stack([basis[draw.permutation(args.size)] for _ in range(clients)]))
    values = jnp.asarray(np.float32(10.0 ** -np.linspace(0, 3, args.rank)) * np.ones([clients, 1], np.float32))
    rule, params = aggregate.fipa(limits=aggregate.Limits(max_step=0.0)), jnp.zeros(args.size)

    @jax.jit
    def step(delta, counts, values, basis):
        received, info = aggregate.receive(aggregate.Uploads(delta, counts, Sketch(values, basis)), params)
        return aggregate.step_of(rule, received, rule.init(params), params, info)[0]

    delta = jnp.asarray(draw.normal(size=(clients, args.size)), jnp.float32)
    return step, (delta, jnp.full(clients, 500.0), values, basis)


def _of_sums(args) -> tuple:
    """(the jitted step from a row of totals, what it is given): the same whatever the number of clients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fipa_jax import aggregate

    solver, draw = aggregate.sum_solver(aggregate.SumOptions(columns=args.rank)), np.random.default_rng(0)
    state = solver.init(jnp.zeros(args.size))
    curved = state.basis * jnp.asarray(np.float32(10.0 ** -np.linspace(0, 3, args.rank)))[None]
    total = aggregate.row_of(500.0, curved, jnp.asarray(draw.normal(size=args.size), jnp.float32))
    return jax.jit(lambda total, state: solver.solve(total, state)[:2]), (total, state)


def measure_client(args) -> list[dict]:
    """Prints and returns the seconds of one client's message of a small CNN, matrix-free and by rows."""
    import jax
    import jax.numpy as jnp

    from benchmarks import setting
    from fipa_jax.curvature import make_gradient, make_image, make_sketch

    task, params, batch = setting.cifar(examples=100, epochs=1)
    outputs, loss = lambda theta, examples: task.outputs(theta, examples)[0], task.loss
    size, rows = sum(leaf.size for leaf in jax.tree.leaves(params)), []
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (size, args.rank)))[0]
    for jacobian in ("matrix_free", "rows"):
        options = {"jacobian": jacobian, "micro_batch": 5}
        gradient = make_gradient(outputs, loss)
        for solver in ("subspace", "lanczos"):
            sketch = jax.jit(make_sketch(outputs, loss, rank=args.rank, solver=solver, **options))
            seconds = timing.steady(sketch, jax.random.key(0), params, batch, repeats=args.repeats)[1]
            made = int(sketch(jax.random.key(0), params, batch).report.products)
            rows.append({"message": f"eigenpairs, {solver}", "jacobian": jacobian, "products": made, "s": seconds})
        message = jax.jit(
            lambda p, b, q, o=options, g=gradient: (make_image(outputs, loss, **o)(p, b, None, q), g(p, b))
        )
        seconds = timing.steady(message, params, batch, basis, repeats=args.repeats)[1]
        rows.append({"message": "sums", "jacobian": jacobian, "products": args.rank + 1, "s": seconds})
    print(f"\nclient: cnn_23k, 100 examples, R = s = {args.rank}; of sums the gradient counts as one product")
    timing.table(rows)
    return rows
