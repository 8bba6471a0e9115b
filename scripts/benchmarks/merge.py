"""The server's merge of the clients' sketches: errors, seconds of its methods, and time and memory at scale.

accuracy  the step's relative error against a dense float64 computation in NumPy from the same float32 uploads, the
          worst over seeds, for clients whose subspaces are at a principal angle; also with the basis sent in bfloat16,
          and what that rounding itself does to the step
methods   seconds of a step of `aggregate.fipa(...)` by each method, and what `merge.choose` picks
size      the same at a large network's size, in a fresh process for each method: peak memory as a ratio to the uploads,
          and seconds beside those of one read and one copy of the uploads
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import timing

PARTS = ("accuracy", "methods", "size")
METHODS = ("qr", "tsqr", "gram")
FORMS = ("damped", "tikhonov", "pinv")
ANGLES = (1.0, 1e-2, 1e-3, 1e-4, 0.0)
CUT = 1e-3  # relative damping, and pinv's rcond
MID_SIZES = ((23_711, 5, 50), (23_711, 5, 200), (200_000, 5, 20))  # P, C, R


def run(options: list[str]) -> dict:
    """Measures the parts asked for."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracy's sketches")
    parser.add_argument("--accuracy-size", type=int, default=2000, help="P of the accuracy; dense, so thousands")
    parser.add_argument("--size", type=float, default=11.2e6, help="P of the size part")
    parser.add_argument("--clients", type=int, default=5, help="C of the size part")
    parser.add_argument("--rank", type=int, default=20, help="R of the size part")
    parser.add_argument("--size-methods", default="gram,tsqr", help="of the size part")
    parser.add_argument("--stores", default="float32,bfloat16", help="dtypes of the basis, of the size part")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing, in turns")
    parser.add_argument("--max-width", type=int, default=1000, help="methods: leave out sizes with D above this")
    args = parser.parse_args(options)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise SystemExit(f"--parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    measures = {"accuracy": measure_accuracy, "methods": measure_methods, "size": measure_size}
    return {"setting": vars(args)} | {part: measures[part](args) for part in args.parts.split(",")}


def measure_accuracy(args) -> list[dict]:
    """Prints and returns the worst relative errors of the step, a row for each angle and form."""
    from fipa_jax.aggregate import merged_curvature as merge

    whole, merge.BLOCK = merge.BLOCK, 2**12  # so that the streaming runs
    rows = [accuracy_row(angle, form, args) for angle in ANGLES for form in FORMS]
    merge.BLOCK = whole
    print(
        f"\naccuracy: |step - dense float64| / |dense float64|, worst of {args.seeds} seeds; P = {args.accuracy_size}, "
        f"C = 4, R = 5, float32, cut {CUT:g}; goal 1e-5; |step| in units of the longest update"
    )
    timing.table(rows)
    return rows


def accuracy_row(angle: float, form: str, args) -> dict:
    """The worst errors over seeds by each method, from a float32 basis and from one in bfloat16."""
    import jax.numpy as jnp

    errors, lengths = {}, []
    for seed in range(args.seeds):
        num_examples, eigenvalues, basis, deltas = sketches(seed, angle, args.accuracy_size)
        kept = {}
        for store in ("float32", "bfloat16"):
            stored = jnp.asarray(basis).astype(store)
            kept[store] = dense_step(form, num_examples, eigenvalues, np.float64(stored.astype("float32")), deltas)
            for method in METHODS:
                step = our_step(form, method, num_examples, eigenvalues, stored, deltas)
                name = method if store == "float32" else f"{method} bf16"
                errors.setdefault(name, []).append(relative(step, kept[store]))
        errors.setdefault("bf16's own", []).append(relative(kept["bfloat16"], kept["float32"]))
        lengths.append(np.linalg.norm(kept["float32"]) / np.max(np.linalg.norm(deltas, axis=1)))
    return (
        {"angle": f"{angle:g}", "form": form}
        | {name: float(np.max(found)) for name, found in errors.items()}
        | {"|step|": float(np.max(lengths))}
    )


def sketches(seed: int, angle: float, size: int, clients: int = 4, rank: int = 5) -> tuple:
    """Uploads in float32; each client's subspace has all its principal angles to the first one's equal to `angle`."""
    rng = np.random.default_rng(seed)
    all_ = np.linalg.qr(rng.normal(size=(size, clients * rank)))[0].reshape(size, clients, rank).transpose(1, 0, 2)
    tilt = np.where(np.arange(clients) > 0, angle, 0.0)[:, None, None]
    rotations = np.linalg.qr(rng.normal(size=(clients, rank, rank)))[0]  # each client has eigenvectors of its own
    basis = (np.cos(tilt) * all_[:1] + np.sin(tilt) * all_) @ rotations
    eigenvalues = -np.sort(-(10 ** rng.uniform(-3, 1, size=(clients, rank))), axis=1)
    deltas = rng.normal(size=(clients, size))
    return rng.integers(100, 1000, clients), *(np.float32(x) for x in (eigenvalues, basis, deltas))


def dense_step(form: str, num_examples, eigenvalues, basis, deltas) -> np.ndarray:
    """[P], FIPA's step in float64 from matrices [P, P]: sum_m w_m (H + beta I)^-1 (H_m + beta I) delta_m and alike."""
    weights = num_examples / np.sum(num_examples)
    eigenvalues, basis, deltas = (np.float64(x) for x in (eigenvalues, basis, deltas))
    factor = np.concatenate([u * np.sqrt(w * lam) for w, lam, u in zip(weights, eigenvalues, basis, strict=True)], 1)
    curvature = factor @ factor.T
    pulled = sum(
        w * u @ (lam * (u.T @ delta)) for w, lam, u, delta in zip(weights, eigenvalues, basis, deltas, strict=True)
    )
    if form == "pinv":
        return np.linalg.pinv(curvature, rcond=float(np.float32(CUT)), hermitian=True) @ pulled
    beta = float(np.float32(CUT)) * np.linalg.norm(factor, 2) ** 2
    target = pulled + beta * (weights @ deltas) if form == "damped" else pulled
    return np.linalg.solve(curvature + beta * np.eye(len(curvature)), target)


def our_step(form: str, method: str, num_examples, eigenvalues, basis, deltas) -> np.ndarray:
    """[P], FIPA's step in float32."""
    import jax.numpy as jnp

    apply, uploads, params = rule(method, num_examples, eigenvalues, basis, deltas, form=form)
    return np.asarray(apply(uploads, jnp.asarray(params)))


def rule(method: str, num_examples, eigenvalues, basis, deltas, form: str = "damped") -> tuple:
    """(jitted (uploads, params) -> step, uploads, params), with no bound on the step."""
    import jax
    import jax.numpy as jnp

    from fipa_jax import aggregate
    from fipa_jax.curvature import sketch

    unbounded = aggregate.Limits(max_step=0.0)
    aggregator = aggregate.fipa(form, damping=CUT, rcond=CUT, limits=unbounded, merge=method)

    @jax.jit
    def apply(uploads, params):
        received, info = aggregate.receive(uploads, params)
        return aggregate.step_of(aggregator, received, aggregator.init(params), params, info)[0]

    sketches = sketch.Sketch(jnp.asarray(eigenvalues), jnp.asarray(basis))
    uploads = aggregate.Uploads(jnp.asarray(deltas), jnp.asarray(num_examples), sketches)
    return apply, uploads, jnp.zeros(deltas.shape[1], jnp.float32)


def relative(step, dense) -> float:
    return float(np.linalg.norm(step - dense) / np.linalg.norm(dense))


def measure_methods(args) -> list[dict]:
    """Prints and returns the seconds of each method at mid sizes, in alternation."""
    import jax
    import jax.numpy as jnp

    from fipa_jax.aggregate import merged_curvature as merge

    rows = []
    for size, clients, rank in MID_SIZES:
        width = clients * rank
        if width > args.max_width:
            continue
        rng, timers, steps = np.random.default_rng(0), {}, {}
        basis = np.linalg.qr(rng.normal(size=(size, rank)).astype(np.float32))[0]
        basis = np.stack([basis[rng.permutation(size)] for _ in range(clients)])
        eigenvalues = np.float32(10.0 ** -np.linspace(0, 3, rank)) * np.ones([clients, 1], np.float32)
        deltas = rng.normal(size=(clients, size)).astype(np.float32)
        for method in METHODS:
            call = rule(method, np.full(clients, 500), eigenvalues, basis, deltas)
            program = call[0].lower(*call[1:]).compile()
            steps[method] = np.asarray(program(*call[1:]))
            timers[method] = lambda program=program, call=call: timing.wall_seconds(program, *call[1:])
        seconds = timing.in_turns(timers, args.repeats)
        row = {"P": size, "D": width} | {method: statistics.median(seconds[method]) for method in METHODS}
        row |= {"auto": merge.choose(size, width, jnp.dtype("float32"), jax.default_backend())}
        row |= {"GFLOP of F^T F": 2 * size * width**2 / 1e9, "MB of F": 4 * size * width / 1e6}
        rows.append(row | {f"{method} - qr": relative(steps[method], steps["qr"]) for method in ("tsqr", "gram")})
    print("\nmethods: seconds of a step, medians; the last columns are the steps' relative differences")
    timing.table(rows)
    return rows


def measure_size(args) -> list[dict]:
    """Prints and returns each method's figures, every one from a process of its own."""
    rows = []
    for store, method in itertools.product(args.stores.split(","), args.size_methods.split(",")):
        spec = {"method": method, "size": int(args.size), "clients": args.clients, "rank": args.rank, "store": store}
        worker = subprocess.run(
            [sys.executable, "-m", "benchmarks.merge_size", json.dumps(spec | {"repeats": args.repeats})],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        found = {"failed": f"exit {worker.returncode}"} if worker.returncode else json.loads(worker.stdout)
        rows.append({"method": f"{method}, {store}"} | found)
    print(
        f"\nsize: P = {int(args.size):,}, C = {args.clients}, R = {args.rank}; peak memory of the process in ratio to "
        "the uploads, before and after the step; less what it held without them, goal 1.15; the step's temporaries"
    )
    memory = ("uploads GiB", "started GiB", "before", "after", "after - started", "temporaries")
    timing.table([{"method": row["method"]} | {name: row.get(name) for name in memory} for row in rows])
    timing.table([{name: value for name, value in row.items() if name not in memory} for row in rows])
    return rows
