"""What is compiled? The stages of a round, once for all phases that differ in traced numbers alone; with how many
clients side by side, which is measured once for a phase on a machine, then remembered."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fipa_jax import files, trees
from fipa_jax.client.examples import take
from fipa_jax.config.process import user_cache
from fipa_jax.curvature import few_bits
from fipa_jax.curvature.common_basis import Core, bytes_of_core
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.curvature.sketchers import prices
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as round_lib
from fipa_jax.federation import server
from fipa_jax.federation.parallel import replicate
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.round import by_clients
from fipa_jax.federation.state import State, fetch
from fipa_jax.run.phase_checks import has_faults
from fipa_jax.run.phase_parts import TRACED

STEERING = ("rounds", "most_bytes_up", "max_skips")  # fields of a phase that steer the loop alone


class Programs(NamedTuple):
    """The stages of a round over their parts, see `federation.round` and `federation.server`."""

    draw: Callable  # (round, rates, root) -> (ids [C], orders [C, ...])
    train: Callable  # (state, rates, cohort, root, sketches=None) -> LocalResult [C, ...]
    sketch: Callable  # (state, rates, cohort, results | None, root) -> `uploads.Message` [C, ...]
    serve: Callable  # (state, rates, cohort, results, sketches) -> (state, info)


def jitted(parts: Parts) -> Programs:
    """The stages, each compiled by itself. The new state takes the old one's place."""

    def over_parts(stage, **options):
        return jax.jit(lambda *args: stage(parts, *args), **options)

    return Programs(
        draw=over_parts(round_lib.draw),
        train=over_parts(round_lib.train),
        sketch=over_parts(round_lib.sketch),
        serve=over_parts(server.serve, donate_argnums=0),
    )


def compiled(known: dict, settings: ConfigDict, parts: Parts) -> Programs:
    """The phase's programs, of those known where another phase differs in traced numbers only.

    Args:
      known: {key: programs}, to which new ones are added.
      settings: the phase's fields.
      parts: the phase's.
    """
    key = key_of(settings, parts)
    if key not in known:
        known[key] = jitted(parts)
    return known[key]


def key_of(settings: ConfigDict, parts: Parts) -> str:
    """What two phases must share to share their compiled programs."""
    static = json.loads(settings.to_json_best_effort())
    of_rule = [f"aggregator.{name}" for name in parts.aggregator.hyper]
    for path in (*STEERING, *TRACED, *of_rule):
        *parents, last = path.split(".")
        group = static
        for parent in parents:
            if parent not in group:
                raise ValueError(f"config.{path}: the rule's `hyper` names it, but it is no field of a phase")
            group = group[parent]
        group.pop(last, None)
    # Whether a number is there at all is not traced.
    does = {"late": settings.late.share > 0, "faults": has_faults(settings)}
    first = parts.first if settings.sketch.share < 1 else 0  # from which a schedule counts
    counts = {"chunk": parts.chunk, "cohort": parts.cohort, "first": first}  # a private cohort's depends on the rounds
    return json.dumps(static | counts | {"channel": does}, sort_keys=True)


def traffic_of(state: State, results: Any, sketches: Any, parts: Parts) -> Callable[[dict], dict]:
    """Builds `sent(info)`: the bytes that the server sends and receives in the round, over all clients of the cohort,
    and `bytes_kept`, what its rule, its optimiser and its term keep from round to round.

    Where one client holds all examples nothing is sent. Of a sketch that is sent only the pairs that are kept count,
    and its report; the gradient beside it where the rank adapts to it. Of a core its upper half, and of the basis the
    columns in use, for the clients that have answered.

    Args:
      state, results, sketches: of a round, or their shapes.
    """
    needs, term = parts.aggregator.needs, parts.term
    model = trees.nbytes(trees.select(state.params, parts.trainable))
    asked = jax.eval_shape(parts.aggregator.asks, state.aggregator)
    told = state.shared if term.travels else (), () if isinstance(sketches, Core | Sketch) else asked
    told += tuple(leaf for leaf in jax.tree.leaves(parts.announce(state.aggregator)) if leaf.ndim)  # no lone numbers
    down = parts.cohort * (model + trees.nbytes(told))
    sent = [results.before if needs.loss else (), results.damping if needs.damping else ()]
    up, pair, report = trees.nbytes([*sent, results.store if term.travels else ()]), 0, 0
    shown = answered = _nothing
    up += _bytes_of_updates(parts, results.delta)
    if isinstance(sketches, Sketch):
        report, pair = prices(sketches, parts.sketcher.bits)
        report += model if parts.sketcher.sends_gradient else 0
    elif isinstance(sketches, Core):
        shown, answered = _bytes_of_columns(parts, asked[0].shape[0], sketches.values.dtype.itemsize)
    else:
        up += trees.nbytes(sketches)
    sends, kept = not parts.pooled, trees.nbytes((state.aggregator, state.server))
    kept += parts.num_clients * trees.nbytes(state.shared) if term.remember else 0

    def sent_in(info: dict) -> dict:
        sketches = pair * int(info.get("sketch_pairs", 0)) + report * int(info.get("sketches_sent", 0))
        columns, clients = int(info.get("columns", 0)), int(info.get("sketches_sent", 0))
        basis, cores = clients * shown(columns), clients * answered(columns)
        both = {"bytes_down": down + basis, "bytes_up": up + sketches + cores}
        return {name: sends * bytes_ for name, bytes_ in both.items()} | {"bytes_kept": kept}

    return sent_in


class Shapes(NamedTuple):
    """The shapes of a round, as its server has them."""

    state: State
    cohort: Cohort
    results: Any  # of the clients' training
    sketches: Any


def shapes_of_round(experiment: Any, settings: ConfigDict, parts: Parts, rates: Rates) -> Shapes:
    """Goes through the clients' part of a round by shapes alone.

    Args:
      experiment: an `experiment.Experiment`; nothing of its data is looked at.
      settings: the phase's fields.
      parts, rates: the phase's.
    """
    stages, root, people = compiled(experiment.compiled, settings, parts), experiment.root, experiment.population
    state = fetch(parts_lib.init(parts, experiment.params, on_host=True), np.arange(parts.cohort))  # its stores alone
    _, orders = stages.draw.eval_shape(state.round, rates, root)
    cohort = people.shapes(parts.cohort)._replace(orders=orders)
    work = by_clients(parts, stages.train.eval_shape, stages.sketch.eval_shape)
    return Shapes(state, cohort, *work(state, rates, cohort, root))


def largest_upload(settings: ConfigDict, shapes: Shapes, parts: Parts) -> int:
    """The bytes that all clients of a round send at most: every one its curvature, with all pairs or columns.

    Raises:
      ValueError: they are more than `most_bytes_up` allows all rounds.
    """
    most: dict = {}
    if isinstance(shapes.sketches, Sketch):
        clients, pairs = shapes.sketches.eigenvalues.shape
        most = {"sketches_sent": clients, "sketch_pairs": clients * pairs}
    elif isinstance(shapes.sketches, Core):
        clients, columns = shapes.sketches.values.shape[:2]
        most = {"sketches_sent": clients, "columns": columns}
    largest = traffic_of(shapes.state, shapes.results, shapes.sketches, parts)(most)["bytes_up"]
    if largest > settings.most_bytes_up:
        raise ValueError(f"most_bytes_up: a round may take {largest:,} bytes, got {settings.most_bytes_up:,.0f}")
    return largest


def _bytes_of_columns(parts: Parts, size: int, itemsize: int):
    """Functions of the columns in use, of `size` entries each: the bytes of the basis, and of a core."""
    column = few_bits.bytes_of(size, parts.column_bits, itemsize)
    return lambda columns: columns * column, lambda columns: bytes_of_core(columns, parts.sketcher.bits, itemsize)


def _bytes_of_updates(parts: Parts, deltas: Any) -> int:
    """The bytes of a cohort's updates as they are sent, stacked [C, ...]."""
    if parts.update_bytes is None:
        return trees.nbytes(deltas)
    size = sum(leaf.size for leaf in jax.tree.leaves(deltas)) // parts.cohort
    return parts.cohort * parts.update_bytes(size)


def _nothing(columns: int) -> int:
    return 0


WORSE = 1.1  # so much slower than the best so far ends the search


def tuned_chunk(experiment, settings: ConfigDict, parts: Parts, state: State, rates: Rates) -> int:
    """The fastest chunk for a phase on this machine; all processes take the first one's.

    Measured on one device with its share of a cohort: no process waits for another before all have searched.

    Args:
      experiment: `experiment.Experiment`.
      settings: the phase's fields.
      parts, state, rates: of the phase.
    """
    people, config = experiment.population, experiment.config
    clients = -(-parts.cohort // (1 if parts.mesh is None else parts.mesh.size))
    shapes = jax.tree.map(lambda leaf: str((leaf.shape, leaf.dtype)), (state.params, people.shapes(parts.cohort)))
    fields = [group.to_json_best_effort() for group in (config.task, config.data, config.model)]
    machine = jax.devices()[0].device_kind, os.cpu_count(), jax.__version__
    depends = key_of(settings, parts), shapes, fields, clients, machine
    ids, orders = jitted(parts).draw(state.round, rates, experiment.root)
    cohort = people.cohort(ids)._replace(orders=orders)
    first = np.arange(clients)
    cohort = cohort._replace(
        ids=cohort.ids[:clients], clients=take(cohort.clients, first), orders=take(cohort.orders, first)
    )
    params, rates, cohort = replicate(jax.device_get((state.params, rates, cohort)), None)
    measure = seconds_of(parts._replace(mesh=None, cohort=clients), rates, params, cohort, jax.random.key(0))
    chunk = fastest_chunk(measure, clients, repr(depends), user_cache() / "chunks.json")
    return int(multihost_utils.broadcast_one_to_all(jnp.int32(chunk)))


def fastest_chunk(measure: Callable[[int], float], clients: int, key: str, file: Path) -> int:
    """The chunk of `parallel.map_clients`, of 1, 2, 4, ... and all clients, with which a round takes the least time.

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


def seconds_of(
    parts: Parts, rates: Rates, params: Any, cohort: Cohort, root: jax.Array, repeats: int = 3
) -> Callable[[int], float]:
    """Builds `measure(chunk)`: the least seconds of the clients' part of a round, infinite where memory is short.

    Args:
      parts, rates, params: of the phase.
      cohort: of a round.
      root: key.
      repeats: of the round, after one in which it is compiled.
    """

    def measure(chunk: int) -> float:
        own = parts._replace(chunk=chunk)
        stages = jitted(own)
        work = by_clients(own, stages.train, stages.sketch)
        state = fetch(parts_lib.init(own, params, on_host=True), jax.device_get(cohort.ids))
        seconds = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            try:
                jax.block_until_ready(work(state, rates, cohort, root))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return float("inf")
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    return measure


def _read(file: Path) -> dict:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, known: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, f"{json.dumps(known, indent=2)}\n".encode())
    except OSError as error:
        logging.warning("the fastest chunk will be measured again: %s cannot be written (%s)", file, error)
