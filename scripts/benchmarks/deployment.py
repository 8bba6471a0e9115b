"""What does a round cost once it travels? `benchmark.py deployment --config=configs/sine.py`, without any transport.

The same rounds as a simulation, and through the bytes of server and clients in one process: seconds a round, the
slowest client's, the server's to read and to aggregate, bytes each way, and how far the models are apart. Before that
the bytes alone: an upload of so many megabytes packed and unpacked, beside flax's msgpack of the same arrays.
"""

import argparse
import statistics
import time

from benchmarks import profile, timing

STAGES = ("seconds_fetch", "seconds_train", "seconds_sketch", "seconds_aggregate")  # of a simulated round


def run(options: list[str]) -> dict:
    """Prints and returns the lines."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py deployment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(profile.DEFAULT), help="a config file, FILE or FILE:VARIANT")
    parser.add_argument("--set", nargs="*", default=[], help="of its fields: PATH=VALUE, as data.dir=DIR")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fipa"], help="as in config.compare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(options)

    import jax

    sizes = [of_bytes(args.megabytes, args.repeats)]
    timing.table(sizes)
    rows = []
    for method in args.methods:
        args.method = method
        config = profile.configured(args)
        config.rounds_per_call = 1
        with jax.enable_x64(config.precision == "float64"):
            rows.append(measure(config, args))
    timing.table(rows)
    return {"setting": vars(args), "bytes": sizes, "rows": rows}


def of_bytes(megabytes: float, repeats: int) -> dict:
    """A line on packing and unpacking an upload of ten pairs, SHA-256 and all."""
    import numpy as np
    from flax import serialization

    from fipa_jax.deployment import wire

    size = max(int(megabytes * 1e6 / 4 / 11), 1)
    draw = np.random.default_rng(0)
    arrays = {"delta/w": draw.normal(size=size), "sketch/basis": draw.normal(size=[size, 10])}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    message = wire.Message("upload", "0" * 64, 0, 0, arrays)
    blob, other = wire.pack(message), serialization.msgpack_serialize(arrays)
    return {
        "megabytes": round(len(blob) / 1e6, 1),
        "pack": seconds_of(lambda: wire.pack(message), repeats),
        "unpack": seconds_of(lambda: wire.unpack(blob), repeats),
        "msgpack": seconds_of(lambda: serialization.msgpack_serialize(arrays), repeats),
        "unmsgpack": seconds_of(lambda: serialization.msgpack_restore(other), repeats),
    }


def measure(config, args) -> dict:
    """A line on one method."""
    import jax
    import numpy as np

    from fipa_jax.config import methods as compared
    from fipa_jax.deployment.agreement import agree
    from fipa_jax.deployment.server import Server
    from fipa_jax.deployment.site import Site
    from fipa_jax.run import experiment, loop
    from fipa_jax.saving.journal import Rows

    config.fipa.rounds, config.warmup.rounds, config.compare = args.rounds, 0, (args.method,)
    built, settings, rows = experiment.build(config), compared.method(config, args.method), Rows()
    want = loop.run_phase(built, settings, args.method, built.params, 0, rows)
    problem = built.problem
    agreement = agree(config, problem.task, len(problem.clients), problem.test, spec=args.method)
    width = max(map(len, problem.clients))
    owned = [np.asarray(own) for own in problem.clients]
    data = [{name: field[own] for name, field in problem.train.items()} for own in owned]
    sites = [Site(agreement, client, own, width) for client, own in enumerate(data)]
    server, clients, travelled = Server(agreement, Rows()), [], []
    while not server.done:
        sent, seconds = {}, []
        for client, blob in server.broadcasts(server.draw()).items():
            start = time.perf_counter()
            sent[client] = sites[client].work(blob)
            seconds.append(time.perf_counter() - start)
        server.round(sent)
        clients.append(seconds)
        travelled.append(server.last)
    pairs = zip(jax.tree.leaves(server.params), jax.tree.leaves(want), strict=True)
    return {
        "method": args.method,
        "simulated": median(sum(v for k, v in row.items() if k in STAGES) for row in rows[1:]),
        "all_clients": median(sum(seconds) for seconds in clients[1:]),
        "slowest_client": median(max(seconds) for seconds in clients[1:]),
        "read": median(row["seconds_read"] for row in travelled[1:]),
        "aggregate": median(row["seconds_aggregate"] for row in travelled[1:]),
        "bytes_down": travelled[-1]["bytes_down"],
        "bytes_up": travelled[-1]["bytes_up"],
        "simulated_down": rows[-1]["bytes_down"],
        "simulated_up": rows[-1]["bytes_up"],
        "apart": max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-300)) for a, b in pairs),
    }


def median(values) -> float:
    """Of some seconds."""
    return round(statistics.median(values), 4)


def seconds_of(function, repeats: int) -> float:
    """The least over some calls: what others do on the machine only adds."""

    def one():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return round(min(one() for _ in range(repeats)), 4)
