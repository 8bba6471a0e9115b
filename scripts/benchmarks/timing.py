"""What the measurements share: the cores they run on, the clock, and how a table is printed."""

import importlib.metadata
import math
import os
import platform
import statistics
import time

from fipa_jax import config


def use_cpus(cpus: str) -> None:
    """Pins this process and its children to some cores (all that there are if empty), with as many threads.

    Must come before jax, numpy and torch start.
    """
    if cpus:
        there = {str(cpu): cpu for cpu in os.sched_getaffinity(0)}
        if not set(wanted := cpus.split(",")) <= set(there):
            raise SystemExit(f"--cpus={cpus}: needs cores of {sorted(there.values())}, as in 0 or 0,1")
        os.sched_setaffinity(0, {there[cpu] for cpu in wanted})
    threads = len(os.sched_getaffinity(0))
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    config.prepare_process()
    os.environ["MKL_NUM_THREADS"] = os.environ["TORCH_NUM_THREADS"] = str(threads)


def steady(function, *args, repeats: int = 5) -> tuple[float, float]:
    """Wall seconds of a function's first call, which compiles, and the median of its later ones."""
    import jax

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def in_turns(variants: dict, repeats: int, budget: float = math.inf) -> dict[str, list[float]]:
    """Seconds of every variant, measured in alternation, so that what else the machine does falls on all of them.

    Args:
      variants: {name: () -> its seconds}.
      repeats: turns.
      budget: a variant that has taken so many seconds in all takes no further turn.

    Returns:
      {name: seconds of each turn}.
    """
    seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            if sum(seconds[name]) < budget or not seconds[name]:
                seconds[name].append(run())
    return seconds


def wall_seconds(function, *args) -> float:
    """Wall seconds of one call, until its arrays are there."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def machine() -> dict:
    """The cores, the device and the versions that a result depends on."""
    import jax

    from fipa_jax.saving import provenance

    versions = provenance.of_code()
    versions.pop("device")
    for name in ("flax", "numpy", "scipy", "matfree"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "device": str(jax.devices()[0]),
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: list[dict]) -> None:
    """Prints rows of the same fields, floats to three digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for line in [names, *cells]:
        first, *others = (
            f"{text:{'<' if i == 0 else '>'}{width}}" for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]), flush=True)


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
