"""The same rounds on 1, 2, 4 devices and on two processes with two each: `benchmark.py scaling`.

On a CPU the devices are virtual: on a machine with fewer cores they share them, and the table shows what spreading
costs, not what it gains. The hash is that of the model after the last round: equal hashes are equal bits.
"""

import argparse
import socket
import statistics

from benchmarks import timing, whole_run

PLACES = ("1x1", "1x2", "1x4", "2x2")  # processes x devices of each


def run(options: list[str]) -> dict:
    """Prints and returns seconds and hashes."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cnn_23k", help="sine, or a network of fipa_jax.models")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fipa"])
    parser.add_argument("--clients", type=int, default=8, help="all of which take part")
    parser.add_argument("--examples", type=int, default=200, help="of each client")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--places", nargs="+", default=list(PLACES), help="processes x devices of each")
    args = parser.parse_args(options)
    places = [tuple(map(int, place.split("x"))) for place in args.places]
    rows = [measure(args, method, *place) for method in args.methods for place in places]
    timing.table(rows)
    for method in args.methods:
        hashes = {row["hash"] for row in rows if row["method"] == method}
        print(f"{method}: {'the same bits everywhere' if len(hashes) == 1 else f'{len(hashes)} different models'}")
    return {"setting": vars(args), "rows": rows}


def measure(args, method: str, processes: int, devices: int) -> dict:
    """A line of the table."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    spec = {"model": args.model, "method": method, "clients": args.clients, "cohort": 0, "examples": args.examples}
    spec |= {"rounds": args.rounds, "batch": args.batch, "epochs": 1, "fields": {"devices": 0}}
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
