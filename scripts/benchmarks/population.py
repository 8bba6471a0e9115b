"""Time and memory of a round beside the number of all clients: `benchmark.py population`.

A hundred clients of many take part in a round; clients and examples live on the host. Each client owns ten of 50,000
random images, so that only the lists of who owns what grow; each population runs in a process of its own. SCAFFOLD
shows that what clients keep between rounds grows with the clients seen.
"""

import argparse
import statistics

from benchmarks import timing, whole_run


def run(options: list[str]) -> dict:
    """Prints and returns seconds of a round, by stage, and the peak memory of the process."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py population", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--populations", type=int, nargs="+", default=[10**3, 10**5, 10**6])
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--examples", type=int, default=10, help="of each client")
    parser.add_argument("--pool", type=int, default=50_000, help="images among which clients' examples are")
    parser.add_argument("--model", default="cnn_23k", help="a network of fipa_jax.models")
    parser.add_argument("--terms", nargs="+", default=["none", "scaffold"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(options)
    rows = [measure(args, term, clients) for term in args.terms for clients in args.populations]
    for row in rows:
        base = next(other for other in rows if other["term"] == row["term"])
        row |= {f"{name} / first": row[name] / base[name] for name in ("round s", "peak MiB")}
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(args, term: str, clients: int) -> dict:
    """A line of the table: medians over the rounds after the first two, in which programs are compiled."""
    spec = {"clients": clients, "cohort": args.cohort, "examples": args.examples, "pool": args.pool}
    spec |= {"model": args.model, "method": "fedavg", "rounds": args.rounds, "batch": args.examples, "epochs": 1}
    fields = {"examples_on": "host", "client_store": "host", "fipa.term.name": term}
    found = whole_run.finish(whole_run.start(fields=fields, **spec))
    later = found["stages"][2:-1] or found["stages"]  # the last one is evaluated
    median = lambda stage: statistics.median(row[f"seconds_{stage}"] for row in later)
    stages = {f"{stage} s": median(stage) for stage in ("fetch", "train", "aggregate")}
    return (
        {"term": term, "clients": clients, "round s": sum(stages.values())} | stages | {"peak MiB": found["peak MiB"]}
    )
