"""How many clients side by side are the fastest here? Measured once for a phase on a machine, then remembered."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from fipa_jax.federation import round as rounds
from fipa_jax.files import write

WORSE = 1.1  # so much slower than the best so far ends the search


def fastest_chunk(measure: Callable, clients: int, key: str, file: Path) -> int:
    """The chunk of `simulate.map_clients`, of 1, 2, 4, ... and all clients, with which a round takes the least time.

    The search ends where it gets slower, or where the device's memory does not do.

    Args:
      measure: chunk -> seconds.
      clients: that one device runs in a round.
      key: names all that the answer depends on.
      file: where answers are kept, JSON; one that cannot be read or written costs a measurement.
    """
    name, known = hashlib.sha256(key.encode()).hexdigest(), _read(file)
    if not isinstance(known.get(name), int):
        seconds = {}
        for chunk in [2**n for n in range(clients.bit_length()) if 2**n < clients] + [clients]:
            seconds[chunk] = measure(chunk)
            if seconds[chunk] > WORSE * min(seconds.values()):
                break
        known[name] = min(seconds, key=seconds.get)
        logging.info("seconds of a round by chunk: %s", seconds)
        _write(file, known)
    return known[name]


def seconds_of(plan: rounds.Plan, rates: rounds.Rates, params, cohort, root, repeats: int = 3) -> Callable:
    """Builds `measure(chunk)`: the least seconds of the clients' part of a round, infinite where memory is short.

    Args:
      plan, rates, params: of the phase.
      cohort: `simulate.Cohort`, of a round.
      root: key.
      repeats: of the round, after one in which it is compiled.
    """

    def measure(chunk: int) -> float:
        stages = rounds.make_stages(plan._replace(chunk=chunk))
        stages = stages._replace(train=jax.jit(stages.train), sketch=jax.jit(stages.sketch))
        state = rounds.fetch(stages.init(params, on_host=True), jax.device_get(cohort.ids))
        taken = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            try:
                jax.block_until_ready(rounds.work(stages, state, rates, cohort, root))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return float("inf")
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    return measure


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, known: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, f"{json.dumps(known, indent=2)}\n".encode())
    except OSError as error:
        logging.warning("the fastest chunk will be measured again: %s cannot be written (%s)", file, error)
