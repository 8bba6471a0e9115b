"""The same rounds on 1, 2, 4 devices and on two processes with two each: `benchmark.py scaling`.

rounds  whole rounds; with --weak each device brings so many clients, else all of them share these
merge   the merge alone: memory of one device as compiled at a large network's size, and at a smaller one its seconds
paper   what more devices would make of the server's part, computed from parts that are measured on this one

On a CPU the devices are virtual: on a machine with fewer cores they share them, and the table shows what spreading
costs, not what it gains. The hash is that of the model after the last round, or of the step: equal hashes, equal bits.
"""

import argparse
import ast
import json
import math
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import timing, whole_run
from fipa_jax.config import fields
from fipa_jax.config.defaults import default

PARTS = ("rounds", "merge", "paper")
PLACES = ("1x1", "1x2", "1x4", "2x2", "4x1")  # processes x devices of each


def run(options: list[str]) -> dict:
    """Prints and returns seconds and hashes."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="rounds", help="what to measure: rounds, merge, paper")
    parser.add_argument("--weak", action="store_true", help="rounds, merge: so many clients on each device")
    parser.add_argument("--size", type=float, default=11_173_962, help="merge, paper: P; ResNet-18's by default")
    parser.add_argument("--merge-clients", type=int, default=20, help="merge, paper: C")
    parser.add_argument("--rank", type=int, default=50, help="merge, paper: R, and s of sums")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="merge: virtual devices")
    parser.add_argument("--run-size", type=float, default=200_000, help="merge, paper: P at which it runs; 0 for not")
    parser.add_argument("--repeats", type=int, default=3, help="merge, paper: of the seconds")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 64], help="paper: devices")
    parser.add_argument("--link", type=float, default=100.0, help="paper: GB/s that a device sends; not measured")
    parser.add_argument("--model", default="cnn_23k", help="sine, or a network of fipa_jax.models")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fipa"])
    parser.add_argument("--clients", type=int, default=8, help="all of which take part")
    parser.add_argument("--examples", type=int, default=200, help="of each client")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], help="rounds: fields of the config, PATH=VALUE")
    parser.add_argument("--places", nargs="+", default=list(PLACES), help="processes x devices of each")
    args = parser.parse_args(options)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise SystemExit(f"--parts: unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    measures = {"rounds": measure_rounds, "merge": measure_merge, "paper": on_paper}
    return {"setting": vars(args)} | {part: measures[part](args) for part in args.parts.split(",")}


def measure_rounds(args) -> list[dict]:
    """Prints and returns a line for each method and place."""
    places = [tuple(map(int, place.split("x"))) for place in args.places]
    # XLA's CPU pool has a thread for each virtual device at least, and a long sum is cut by their number: as many
    # everywhere, or places would differ by that alone.
    threads = max([os.cpu_count() or 1, *(devices for _, devices in places)])
    os.environ.setdefault("NPROC", str(threads))
    rows = [measure(args, method, *place) for method in args.methods for place in places]
    timing.table(rows)
    for method in args.methods:
        hashes = {row["hash"] for row in rows if row["method"] == method}
        print(f"{method}: {'the same bits everywhere' if len(hashes) == 1 else f'{len(hashes)} different models'}")
    return rows


def measure_merge(args) -> list[dict]:
    """Prints and returns a line for each number of devices, each from a process of its own; see `PARTS`."""
    rows = []
    for size in filter(None, (int(args.size), int(args.run_size))):
        for devices in args.devices:
            clients = args.merge_clients * (devices if args.weak else 1)
            found = _merged(args, size=size, clients=clients, devices=devices, runs=size == int(args.run_size))
            rows.append({"P": size, "C": clients, "devices": devices} | found)
    print(f"\nmerge: R = {args.rank}; GiB of one device")
    timing.table(rows)
    hashes = {row["hash"] for row in rows if "hash" in row}
    if hashes and not args.weak:
        print("the same bits everywhere" if len(hashes) == 1 else f"{len(hashes)} different steps")
    return rows


def _merged(args, **spec) -> dict:
    """What a worker process measures of one merge."""
    spec |= {"rank": args.rank, "repeats": args.repeats}
    command = [sys.executable, "-m", "benchmarks.merge_devices", json.dumps(spec)]
    folder = Path(__file__).resolve().parents[1]
    worker = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(worker.stdout)


def on_paper(args) -> list[dict]:
    """Prints and returns what the server's part would take on more devices like this one, for one number of clients in
    all and for so many on each device.

    Of eigenpairs, rows of [P, D], D = C R, are read by the device that holds them, P D^2 / n of work; the reduced
    system of D columns, D^3, is solved by each alike; a device sends its share of the bases to the others. Sums are
    added up, s P entries, and what follows is done by each alike, whatever C.
    """
    found = _merged(args, size=int(args.run_size), clients=args.merge_clients, devices=1, runs=True, parts=True)
    larger, rows = args.size / args.run_size, []
    read, reduced, of_sums = (found[name] for name in ("rows s", "reduced s", "sums s"))
    for growth in (False, True):
        for n in args.machines:
            more = n if growth else 1  # times as many clients
            away = 4 * args.size * args.rank * (1 - 1 / n) / (1e9 * args.link)  # s, of one client's basis to others
            parts = {"rows s": read * larger * more**2 / n, "reduced s": reduced * more**3}
            parts["exchange s"] = away * math.ceil(args.merge_clients * more / n)
            whole = sum(parts.values())
            ahead = {"C": args.merge_clients * more, "devices": n}
            rows.append(ahead | parts | {"eigenpairs s": whole, "sums s": of_sums * larger + 2 * away})
    print(
        f"\npaper: P = {args.size:.4g}, R = s = {args.rank}; measured here at P = {args.run_size:.4g} and C = "
        f"{args.merge_clients}: rows {read:.3g} s, reduced system {reduced:.3g} s, sums {of_sums:.3g} s; not measured: "
        f"{args.link:g} GB/s between devices"
    )
    timing.table(rows)
    return rows


def changes(given: list[str]) -> dict:
    """{path of a field: value}, of PATH=VALUE."""
    config, found = default(), {}
    for change in given:
        path, _, text = change.partition("=")
        group, name = fields.find(config, path)
        found[path] = ast.literal_eval(text) if isinstance(group[name], tuple) else fields.parse(text, group[name])
    return found


def measure(args, method: str, processes: int, devices: int) -> dict:
    """A line of the table."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    spec = {
        "model": args.model,
        "method": method,
        "clients": args.clients * (processes * devices if args.weak else 1),
        "cohort": 0,
        "examples": args.examples,
    }
    spec |= {"rounds": args.rounds, "batch": args.batch, "epochs": 1, "fields": {"devices": 0} | changes(args.set)}
    spec |= {"processes": processes, "coordinator": coordinator}
    together = [whole_run.start(devices, process=process, **spec) for process in range(processes)]
    found = [whole_run.finish(process) for process in together]
    hashes = {each["hash"][:12] for each in found}
    later = found[0]["stages"][1:-1] or found[0]["stages"]
    median = lambda *stages: statistics.median(sum(row.get(f"seconds_{s}", 0.0) for s in stages) for row in later)
    return {
        "method": method,
        "processes": processes,
        "devices": processes * devices,
        "first s": max(each["first"] for each in found),
        "round s": statistics.median(found[0]["rounds"][1:-1] or found[0]["rounds"]),
        "clients s": median("train", "sketch"),
        "merge s": median("aggregate"),
        "user s": sum(each["user"] for each in found),
        "hash": " ".join(sorted(hashes)),
    }
