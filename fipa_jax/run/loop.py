"""How does a phase run, round after round? Stage by stage, each timed, or many rounds in one compiled call."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.aggregate.screening import REASONS
from fipa_jax.aggregate.server_optimizers import Averaged
from fipa_jax.client.examples import Client
from fipa_jax.data import partition
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as round_lib
from fipa_jax.federation import state as state_lib
from fipa_jax.federation.parallel import replicate
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Ahead, Cohort, OnHost, Resident
from fipa_jax.federation.server import result_of
from fipa_jax.federation.state import State
from fipa_jax.reporting import console, metrics
from fipa_jax.reporting.console import NOTED
from fipa_jax.run import personal_stage, private_run, programs
from fipa_jax.run.experiment import Experiment, parts_of, store_on_host
from fipa_jax.run.phase_parts import make_rates
from fipa_jax.run.programs import tuned_chunk
from fipa_jax.saving.journal import Journal

RowsAndInfos = list[tuple[dict, dict]]  # of each round (its row of the metrics file, its info)
# (state, first round k, count, the phase's last round as far as is known) -> after `count` rounds from k
Advance = Callable[[State, int, int, int], tuple[State, RowsAndInfos]]


class Phase(NamedTuple):
    """A phase of a run, made real."""

    experiment: Experiment
    settings: ConfigDict  # its fields
    parts: Parts
    rates: Rates
    first: int  # number of its first round
    last: int
    largest: int  # bytes that all clients of a round send at most; 0 where nobody asks
    shown: Callable[[dict, dict], dict]  # (row, info) -> the row as it may be shown


def run_phase(
    experiment: Experiment,
    settings: ConfigDict,
    name: str,
    params: Any,
    first: int,
    journal: Journal,
    at_checkpoint: Callable[[], Any] = lambda: None,
) -> Any:
    """Runs one phase from `params`, or from where it was when the run was stopped; returns the parameters after it.

    Args:
      settings: the phase's fields.
      name: of the run, in the metrics file and on the screen.
      params: the whole model's, that the phase starts from.
      first: number of its first round.
      journal: of the run.
      at_checkpoint: called after every checkpoint but the phase's last one, to show what there is so far.
    """
    parts = parts_of(experiment, settings)
    rates = make_rates(settings, experiment.config.precision, experiment.problem.public)
    rates = replicate(rates, parts.mesh)
    state, note = journal.resumed(name, start(experiment, parts, params, first), parts)
    rates, state, budget = private_run.begin(experiment, settings, rates, state, lambda: journal.secret(name))
    if experiment.config.chunk < 0:
        chunk = note["chunk"] if note else tuned_chunk(experiment, settings, parts, state, rates)
        parts = parts._replace(chunk=chunk)
    largest = 0
    if settings.most_bytes_up:
        shapes = programs.shapes_of_round(experiment, settings, parts, rates)
        largest = programs.largest_upload(settings, shapes, parts)
    phase = Phase(experiment, settings, parts, rates, first, first + budget.rounds - 1, largest, budget.of_row)
    if (done := int(state.round) - first) > budget.rounds:  # by --resume=anyway
        logging.warning("%s: has %d rounds, more than the %d that are asked for now", name, done, budget.rounds)
    in_one_call = experiment.config.rounds_per_call > 1
    advance = in_blocks(phase, state) if in_one_call else by_stage(phase, journal.asked)
    return result_of(parts, rounds_of(phase, name, advance, state, journal, note, at_checkpoint))


def rounds_of(
    phase: Phase,
    name: str,
    advance: Advance,
    state: State,
    journal: Journal,
    note: dict,
    at_checkpoint: Callable[[], Any] = lambda: None,
) -> State:
    """Advances to the phase's end, and writes down every round; returns the last state.

    Args:
      note: of the checkpoint that it goes on from: rounds in a row that were skipped, bytes that clients have sent.
    """
    k, warned, asked = int(state.round), Counter(), phase.first + phase.settings.rounds - 1
    skipped, bytes_up = note.get("skipped", 0), note.get("bytes_up", 0)
    with console.Progress(name, phase.settings.rounds, k - phase.first) as bar:
        while k <= (last := last_within(phase, k, bytes_up)):
            state, rows = advance(state, k, min(count_to(phase.experiment.config, k), last + 1 - k), last)
            bytes_up += sum(row["bytes_up"] for row, _ in rows)
            ended = k + len(rows) > last_within(phase, k + len(rows), bytes_up)
            for row, info in rows:
                row = phase.shown(row, info)
                if ended and row["round"] == k + len(rows) - 1:
                    own = phase, result_of(phase.parts, state)
                    row |= console.attempt("the figures of the clients' own models", own_models, *own) or {}
                    row |= {"ended_early": True} if row["round"] < asked else {}
                console.attempt("a warning", console.warn, name, row["round"], info, warned)
                row = metrics.jsonable({"run": name} | row)
                journal.write(row)
                skipped = skipped + 1 if row.get("skipped") else 0
                check_progress(name, row, skipped, phase.settings.max_skips)
            console.attempt("the progress", bar.advance, len(rows), row)
            k += len(rows)
            note = {"first": phase.first, "chunk": phase.parts.chunk, "skipped": skipped, "bytes_up": bytes_up}
            if journal.keep(name, state, row, note, ended=ended) and not ended:
                at_checkpoint()
    if phase.first < k <= phase.last:
        logging.warning("%s: another round might send more bytes than all may; it ends after %d", name, k - phase.first)
    return state


def last_within(phase: Phase, k: int, bytes_up: int) -> int:
    """The last round that is sure to stay within `most_bytes_up`, where round k is next and so much has been sent."""
    if not phase.largest:
        return phase.last
    return min(phase.last, k - 1 + int((phase.settings.most_bytes_up - bytes_up) // phase.largest))


def start(experiment: Experiment, parts: Parts, params: Any, first: int) -> State:
    """The state before round `first`."""
    state = parts_lib.init(parts, params, first, store_on_host(experiment.config, parts, params))
    store = state.store
    # A round writes its state in the place of the last one, and these parameters are the next method's too.
    return jax.tree.map(jnp.copy, state._replace(store=()))._replace(store=store)


def count_to(config: ConfigDict, k: int) -> int:
    """So many rounds from k that run before the host looks at any, the last an evaluated one, if one of them is."""
    unseen = 1 if config.stage_seconds else config.eval.every
    most, every = config.rounds_per_call if config.rounds_per_call > 1 else unseen, config.eval.every
    count = most - (k + most - 1) % every
    return count if count > 0 else most


def by_stage(phase: Phase, asked: Callable[[], bool] = lambda: False) -> Advance:
    """Builds `advance`: rounds one after another, their stages in programs of their own.

    With `config.stage_seconds` each stage is waited for and timed; without, the host looks at nothing before the end.

    Args:
      asked: whether to end after the round that is under way, as where a checkpoint is due.
    """
    config, people, root = phase.experiment.config, phase.experiment.population, phase.experiment.root
    stages = programs.compiled(phase.experiment.compiled, phase.settings, phase.parts)

    def fetch(k: int) -> Cohort:
        ids, orders = stages.draw(jnp.int32(k), phase.rates, root)
        return people.cohort(ids)._replace(orders=orders)

    cohort_of = Ahead(fetch, phase.last) if isinstance(people, OnHost) else fetch

    def one(state: State, k: int, last: int, clock: "Clock"):
        cohort = clock("fetch", cohort_of(k))
        seen = state_lib.fetch(state, cohort.ids)
        work = round_lib.by_clients(phase.parts, stages.train, stages.sketch, clock)
        results, sketches = work(seen, phase.rates, cohort, root)
        sent = programs.traffic_of(state, results, sketches, phase.parts)
        seen, info = clock("aggregate", stages.serve(seen, phase.rates, cohort, results, sketches))
        state = state_lib.keep(state, seen, cohort.ids)
        return state, (info, clock("evaluate", figures_of(phase, state, k, last)), sent)

    def advance(state: State, k: int, count: int, last: int):
        rounds, clocks, whole = [], [], Clock()
        while len(rounds) < count and not (rounds and asked()):
            clocks.append(Clock(config.stage_seconds))
            state, outcome = one(state, k + len(rounds), last, clocks[-1])
            rounds.append(outcome)
        infos, figures, sent = zip(*rounds, strict=True)
        infos, figures = whole("round", jax.device_get((infos, figures)))
        mean = {} if config.stage_seconds else {"seconds_round": whole.seconds["seconds_round"] / len(rounds)}
        rows = [row_of(k + j, figures[j], info, sent[j], clocks[j].seconds | mean) for j, info in enumerate(infos)]
        return state, list(zip(rows, infos, strict=True))

    return advance


def row_of(k: int, figures: dict, info: dict, sent: Callable[[dict], dict], seconds: dict) -> dict:
    """Round k's row of the metrics file: the figures of evaluation, of the rule, the bytes sent, the seconds."""
    return {"round": k} | figures | console.figures(info) | sent(info) | seconds


def figures_of(phase: Phase, state: State, k: int, last: int) -> dict:
    """The figures that are due after round k, of rounds up to `last`."""
    experiment, params = phase.experiment, state.params
    test, clients = due(experiment.config.eval, k, last)
    figures = on_test(experiment, phase.parts, experiment.held, state) if test else {}
    figures |= on_belief(experiment, phase.parts, experiment.held, state) if test else {}
    return figures | (on_clients(experiment, experiment.population, experiment.held, params) if clients else {})


def own_models(phase: Phase, params: Any) -> dict:
    """The figures of the clients' own models, once the phase is over, and the seconds that they took."""
    clock = Clock()
    figures = personal_stage.figures(phase.experiment, phase.settings, phase.parts, params)
    clock("personal", figures)
    return figures | clock.seconds if figures else {}


def in_blocks(phase: Phase, state: State) -> Advance:
    """Builds `advance`: `count` rounds in one compiled call.

    Evaluation is part of the program, and nothing comes back to the host in between. One compilation serves any count
    up to `config.rounds_per_call`.

    Args:
      state: any of the phase.
    """
    experiment, parts = phase.experiment, phase.parts
    config, people, root = experiment.config, experiment.population, experiment.root
    name = f"block of {programs.key_of(phase.settings, parts)}"
    run = experiment.compiled.setdefault(name, jax.jit(_block(experiment, parts), donate_argnums=0))
    shapes = programs.shapes_of_round(experiment, phase.settings, parts, phase.rates)
    sent = programs.traffic_of(state, shapes.results, shapes.sketches, parts)

    def advance(state: State, k: int, count: int, last: int):
        clock = Clock()
        state, outcome = run(state, phase.rates, people, experiment.held, root, count, last)
        infos, figures = jax.device_get(clock("round", outcome))
        seconds = {"seconds_round": clock.seconds["seconds_round"] / count}
        rows = []
        for i in range(count):
            info, values = jax.tree.map(lambda leaf, i=i: leaf[i], (infos, figures))
            test, clients = due(config.eval, k + i, last)
            wanted = {name: x for name, x in values.items() if (clients if name.startswith("client_") else test)}
            rows.append((row_of(k + i, wanted, info, sent, seconds), info))
        return state, rows

    return advance


def _block(experiment: Experiment, parts: Parts) -> Callable:
    """(state, rates, people, held, root, count, last) -> (state, (info, figures) of each round), to be compiled."""
    config = experiment.config

    def one(state, rates, people, held, root, last):
        test, clients = due(config.eval, state.round, last)
        state, info = round_lib.whole_round(parts, state, rates, *people, root)
        figures = _if(test, lambda state: on_test(experiment, parts, held, state), state)
        figures |= _if(test, lambda state: on_belief(experiment, parts, held, state), state)
        return state, (info, figures | _if(clients, lambda p: on_clients(experiment, people, held, p), state.params))

    def block(state, rates, people, held, root, count, last):
        row = jax.eval_shape(one, state, rates, people, held, root, last)[1]
        empty = jax.tree.map(lambda leaf: jnp.zeros([config.rounds_per_call, *leaf.shape], leaf.dtype), row)

        def body(i, carry):
            state, rows = carry
            state, row = one(state, rates, people, held, root, last)
            return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), rows, row)

        return lax.fori_loop(0, count, body, (state, empty))

    return block


def _if(condition: jax.Array, figures: Callable[[Any], dict], params: Any) -> dict:
    """{name: figure} where the condition holds, which is traced, else zeros."""
    shapes = jax.eval_shape(figures, params)

    def blank(params):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return lax.cond(condition, figures, blank, params)


def due(every: ConfigDict, k, last):
    """Which figures are due after round k, of the test set and of every client's own examples; k may be traced."""
    clients = (k == last) | (k % max(every.clients_every, 1) == 0)
    return (k == last) | (k % every.every == 0), clients if every.clients_every else clients & False


def on_test(experiment: Experiment, parts: Parts, held: dict, state: State) -> dict:
    """The figures of the test set, and of the held-out one; `test_average_*` where past models are averaged."""
    last = of_model(experiment, held, state.params)
    if not isinstance(state.server, Averaged):
        return last
    held = {f"{prefix}_average": data for prefix, data in held.items()}
    return last | of_model(experiment, held, result_of(parts, state))


def of_model(experiment: Experiment, held: dict, params: Any) -> dict:
    """The figures of one model on {what their names begin with: data}."""
    result, figures = {}, experiment.problem.task.figures
    for prefix, data in held.items():
        result |= metrics.overall(experiment.evaluate(params, data), prefix, figures)
    return result


def on_belief(experiment: Experiment, parts: Parts, held: dict, state: State) -> dict:
    """The same of `eval.samples` models drawn from the server's belief, their probabilities averaged; {} without."""
    precision = parts.aggregator.spread(state.aggregator)
    if isinstance(precision, tuple) or not experiment.problem.classes:
        return {}
    theta, unravel = ravel_pytree(trees.select(state.params, parts.trainable))
    shape = experiment.config.eval.samples, theta.size
    noise = jax.random.normal(jax.random.fold_in(experiment.root, state.round), shape, theta.dtype)
    drawn = theta[None] + noise / jnp.sqrt(precision)[None]
    models = jax.vmap(lambda one: trees.replace(state.params, unravel(one)))(drawn)
    result, figures = {}, experiment.problem.task.figures
    for prefix, data in held.items():
        result |= metrics.overall(experiment.evaluate_drawn(models, data), f"{prefix}_belief", figures)
    return result


def on_clients(experiment: Experiment, people, held: dict, params: Any) -> dict:
    """The figures of every client's own examples, `people` being the population, and of its own test examples."""
    figures, tests = experiment.problem.task.figures, experiment.problem.test_clients
    own = metrics.of_clients(people.values(experiment.evaluate, params), figures)
    result = metrics.over_clients(people.means(own), people.num_examples)
    if tests is None:
        return result
    owned = [indices for indices in tests if len(indices)]
    testers = Resident(held["test"], Client(*map(jnp.asarray, partition.pad(owned))))
    values = testers.values(experiment.evaluate, params)
    own = metrics.of_clients(values, figures)
    result |= metrics.over_clients(testers.means(own), testers.num_examples, "client_test")
    names = experiment.problem.names or range(len(tests))
    by_name = {str(name): indices for name, indices in zip(names, tests, strict=True) if len(indices)}
    return result | metrics.of_each_client(values, by_name, figures)


class Clock:
    """Seconds of each stage; waits for the device, so that a stage's time is its own, or does nothing."""

    def __init__(self, wait: bool = True):
        self.seconds, self._wait, self._last = {}, wait, time.perf_counter()

    def __call__(self, stage: str, result):
        if not self._wait:
            return result
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[f"seconds_{stage}"], self._last = round(now - self._last, 6), now
        return result


class Stalled(Exception):
    """The run makes no progress."""


def check_progress(name: str, row: dict, skipped: int, most: int) -> None:
    """Ends a phase of which so many rounds in a row were skipped; 0 for never.

    Args:
      name: of the phase.
      row: of its last round.
      skipped: rounds up to that one that were skipped in a row.
      most: of them.

    Raises:
      Stalled: says what the last one lacked, and what to change.
    """
    if not 0 < most <= skipped:
        return
    counts = {words: row.get(f"rejected_{reason}") for reason, words in REASONS.items()}
    counts[NOTED["absent"]] = row.get("clients_absent")
    why = "; ".join(f"{count} clients: {words}" for words, count in counts.items() if count)
    raise Stalled(
        f"{name}: {skipped} rounds in a row were skipped, the last one round {row['round']}. In it: "
        f"{why or 'the new parameters were not finite'}. Lower local.lr or server.lr, look at the clients' data, lower "
        "least_clients, or raise max_skips (0: never stop)"
    )
