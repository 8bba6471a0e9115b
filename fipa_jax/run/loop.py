"""How does a phase run, round after round? Stage by stage, each timed, or many rounds in one compiled call."""

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from fipa_jax import trees
from fipa_jax.client.examples import take
from fipa_jax.config.process import user_cache
from fipa_jax.curvature import sketch
from fipa_jax.federation import faults
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parallel import replicate
from fipa_jax.federation.population import Ahead, OnHost
from fipa_jax.reporting import console as report
from fipa_jax.reporting import metrics
from fipa_jax.run import parts as phase
from fipa_jax.run import tune
from fipa_jax.run.stalled import check_progress
from fipa_jax.saving.journal import Journal

# Fields of a phase that are traced or only steer the loop: methods that differ in these alone share compiled programs.
TRACED = (
    "rounds", "max_skips", "local.lr", "local.lr_decay", "local.damping", "term.mu", "server.lr",
    *(f"faults.{name}" for name in faults.Rates._fields), "late.share",
)  # fmt: skip


def run_phase(experiment, settings: ConfigDict, name: str, params, first: int, journal: Journal):
    """Runs one phase from `params`, or from where it was when the run was stopped; returns the parameters after it.

    Args:
      experiment: `experiment.Experiment`.
      settings: the phase's fields.
      name: of the run, in the metrics file and on the screen.
      params: the whole model's, that the phase starts from.
      first: number of its first round.
      journal: of the run.
    """
    config, last = experiment.config, first + settings.rounds - 1
    stages = rounds.make_stages(plan_of(experiment, settings))
    rates = replicate(phase.make_rates(settings, config.precision), stages.plan.mesh)
    state, note = journal.resumed(name, start(experiment, stages, params, first), stages.plan.mesh)
    if config.chunk < 0:
        chunk = note["chunk"] if note else tuned_chunk(experiment, settings, stages, state, rates)
        stages = rounds.make_stages(stages.plan._replace(chunk=chunk))
    make = in_blocks if config.rounds_per_call > 1 else functools.partial(by_stage, asked=journal.asked)
    advance = make(experiment, settings, stages, state, last)
    unseen = 1 if config.stage_seconds else config.eval.every  # rounds that run before the host looks at any
    per_call = config.rounds_per_call if config.rounds_per_call > 1 else unseen
    k, said, skipped = int(state.round), Counter(), note.get("skipped", 0)
    quiet = {"disable": True} if jax.process_index() else {}  # else it is as $TQDM_DISABLE says
    with tqdm(total=settings.rounds, initial=k - first, desc=f"{name:<12}", unit="round", **quiet) as bar:
        while k <= last:
            state, found = advance(state, rates, k, min(count_to(k, per_call, config.eval.every), last + 1 - k))
            for row, info in found:
                report.warn(name, row["round"], info, said)
                row = metrics.jsonable({"run": name} | row)
                journal.write(row)
                skipped = skipped + 1 if row.get("skipped") else 0
                check_progress(name, row, skipped, settings.max_skips)
            bar.set_postfix_str(report.progress(row), refresh=False)
            bar.update(len(found))
            k += len(found)
            note = {"first": first, "chunk": stages.plan.chunk, "skipped": skipped}
            journal.keep(name, state, row, note, ended=k > last)
    return state.params


def count_to(k: int, most: int, every: int) -> int:
    """So many rounds from k, at most `most`, that the last is an evaluated one, if one of them is."""
    count = most - (k + most - 1) % every
    return count if count > 0 else most


def by_stage(experiment, settings, stages, state, last: int, asked: Callable = lambda: False) -> Callable:
    """Builds `advance(state, rates, k, count) -> (state, [(row, info)])`: `count` rounds, one after another.

    With `config.stage_seconds` each stage is waited for and timed; without, the host looks at nothing before the end.

    Args:
      state: any of the phase.
      last: number of the phase's last round.
      asked: whether to end after the round that is under way.
    """
    config, people, root = experiment.config, experiment.population, experiment.root
    stages = compiled(experiment, settings, stages, state)
    fetch = lambda k: people.cohort(stages.draw(jnp.int32(k), root))
    if isinstance(people, OnHost):
        fetch = Ahead(fetch, last)

    def one(state, rates, k, clock):
        cohort = clock("fetch", fetch(k))
        seen = rounds.fetch(state, cohort.ids)
        results, sketches = rounds.work(stages, seen, rates, cohort, root, clock)
        sent = traffic_of(state, results, sketches, stages.plan)
        seen, info = clock("aggregate", stages.aggregate(seen, rates, cohort, results, sketches))
        state = rounds.keep(state, seen, cohort.ids)
        test, own = due(config.eval, k, last)
        figures = on_test(experiment, experiment.held, state.params) if test else {}
        figures |= on_clients(experiment, people, state.params) if own else {}
        return state, (info, clock("evaluate", figures), sent)

    def advance(state, rates, k, count):
        found, clocks, whole = [], [], Clock()
        while len(found) < count and not (found and asked()):
            clocks.append(Clock(config.stage_seconds))
            state, row = one(state, rates, k + len(found), clocks[-1])
            found.append(row)
        infos, figures, sent = zip(*found, strict=True)
        infos, figures = whole("round", jax.device_get((infos, figures)))
        each = {} if config.stage_seconds else {"seconds_round": whole.seconds["seconds_round"] / len(found)}
        rows = [
            {"round": k + j} | figures[j] | report.figures(info) | sent[j](info) | clocks[j].seconds | each
            for j, info in enumerate(infos)
        ]
        return state, list(zip(rows, infos, strict=True))

    return advance


def in_blocks(experiment, settings, stages, state, last: int) -> Callable:
    """Builds `advance(state, rates, k, count) -> (state, [(row, info)])`: `count` rounds in one compiled call.

    Evaluation is part of the program, and nothing comes back to the host in between. One compilation serves any count
    up to `config.rounds_per_call`.
    """
    config, key = experiment.config, key_of(settings, stages.plan, state)
    round_ = rounds.compose(stages)

    def one(state, rates, people, held, root, last):
        test, own = due(config.eval, state.round, last)
        state, info = round_(state, rates, *people, root)
        figures = _if(test, lambda params: on_test(experiment, held, params), state.params)
        return state, (info, figures | _if(own, lambda p: on_clients(experiment, people, p), state.params))

    def block(state, rates, people, held, root, count, last):
        given = rates, people, held, root, last
        row = jax.eval_shape(one, state, *given)[1]
        empty = jax.tree.map(lambda leaf: jnp.zeros([config.rounds_per_call, *leaf.shape], leaf.dtype), row)

        def body(i, carry):
            state, rows = carry
            state, row = one(state, *given)
            return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), rows, row)

        return lax.fori_loop(0, count, body, (state, empty))

    people, root = experiment.population, experiment.root
    run = experiment.compiled.setdefault(f"block of {key}", jax.jit(block, donate_argnums=0))
    rates = phase.make_rates(settings, config.precision)

    def uploads(state, rates, people, root):
        cohort = people.cohort(stages.draw(state.round, root))
        return rounds.work(stages, rounds.fetch(state, cohort.ids), rates, cohort, root)

    shapes = jax.eval_shape(uploads, state, rates, people, root)
    sent = traffic_of(state, *shapes, stages.plan)

    def advance(state, rates, k, count):
        clock = Clock()
        state, (infos, figures) = run(state, rates, people, experiment.held, root, count, last)
        infos, figures = jax.device_get(clock("round", (infos, figures)))
        found = []
        for i in range(count):
            info, values = jax.tree.map(lambda leaf, i=i: leaf[i], (infos, figures))
            test, own = due(config.eval, k + i, last)
            wanted = lambda name, test=test, own=own: own if name.startswith("client_") else test
            values = {name: value for name, value in values.items() if wanted(name)}
            seconds = {"seconds_round": clock.seconds["seconds_round"] / count}
            found.append(({"round": k + i} | values | report.figures(info) | sent(info) | seconds, info))
        return state, found

    return advance


def _if(condition, figures: Callable, params) -> dict:
    """{name: figure} where the condition holds, which is traced, else zeros."""
    blank = lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(figures, params))
    return lax.cond(condition, figures, blank, params)


def due(every: ConfigDict, k, last):
    """Which figures are due after round k, of the test set and of every client's own examples; k may be traced."""
    clients = (k == last) | (k % max(every.clients_every, 1) == 0)
    return (k == last) | (k % every.every == 0), clients if every.clients_every else clients & False


def on_test(experiment, held: dict, params) -> dict:
    """The figures of the test set, and of the held-out one."""
    found, figures = {}, experiment.problem.task.figures
    for prefix, data in held.items():
        found |= metrics.overall(experiment.evaluate(params, data), prefix, figures)
    return found


def on_clients(experiment, people, params) -> dict:
    """The figures of every client's own examples, `people` being the population."""
    return metrics.over_clients(people.means(people.values(experiment.evaluate, params)), people.num_examples)


def plan_of(experiment, settings: ConfigDict) -> rounds.Plan:
    """The plan of a phase of this experiment."""
    num_clients = experiment.population.num_examples.size
    return phase.make_plan(experiment.config, settings, experiment.problem.task, num_clients)


def start(experiment, stages: rounds.Stages, params, first: int) -> rounds.State:
    """The state before round `first`."""
    state = stages.init(params, first, phase.memories_on_host(experiment.config, stages.plan, params))
    memory = state.memory
    # A round writes its state in the place of the last one, and these parameters are the next method's too.
    return jax.tree.map(jnp.copy, state._replace(memory=()))._replace(memory=memory)


def tuned_chunk(experiment, settings: ConfigDict, stages: rounds.Stages, state: rounds.State, rates) -> int:
    """The fastest chunk for the phase on this machine, see `tune`; all processes take the first one's.

    Measured on one device with its share of a cohort: no process waits for another before all have searched.
    """
    plan, people, config = stages.plan, experiment.population, experiment.config
    clients = -(-plan.cohort // (1 if plan.mesh is None else plan.mesh.size))
    shapes = jax.tree.map(lambda leaf: str((leaf.shape, leaf.dtype)), (state.params, people.shapes(plan.cohort)))
    fields = [group.to_json_best_effort() for group in (config.task, config.data, config.model)]
    machine = jax.devices()[0].device_kind, os.cpu_count(), jax.__version__
    depends = key_of(settings, plan, state), shapes, fields, clients, machine
    cohort = people.cohort(stages.draw(state.round, experiment.root))
    cohort = cohort._replace(ids=cohort.ids[:clients], clients=take(cohort.clients, np.arange(clients)))
    params, rates, cohort = replicate(jax.device_get((state.params, rates, cohort)), None)
    measure = tune.seconds_of(plan._replace(mesh=None, cohort=clients), rates, params, cohort, jax.random.key(0))
    chunk = tune.fastest_chunk(measure, clients, repr(depends), user_cache() / "chunks.json")
    return int(multihost_utils.broadcast_one_to_all(jnp.int32(chunk)))


def compiled(experiment, settings: ConfigDict, stages: rounds.Stages, state: rounds.State):
    """The phase's stages, jitted once for all phases that differ in traced hyper-parameters only."""
    key = key_of(settings, stages.plan, state)
    if key not in experiment.compiled:
        jitted = {name: jax.jit(getattr(stages, name)) for name in ("draw", "train", "sketch")}
        aggregate = jax.jit(stages.aggregate, donate_argnums=0)  # the new state takes the old one's place
        experiment.compiled[key] = stages._replace(**jitted, aggregate=aggregate)
    return experiment.compiled[key]


def key_of(settings: ConfigDict, plan: rounds.Plan, state: rounds.State) -> str:
    """What two phases must share to share their compiled programs."""
    static = json.loads(settings.to_json_best_effort())
    static["aggregator"] = phase.flat(static["aggregator"])
    static |= {"chunk": plan.chunk, "has_faults": plan.faults, "late_rounds": plan.late}
    # A rule's own numbers are traced if it keeps them in its state, as `FipaState` does.
    traced = [f"aggregator.{name}" for name in getattr(state.aggregator, "_fields", ())]
    for path in (*TRACED, *traced):
        *parents, last = path.split(".")
        inner = static
        for parent in parents:
            inner = inner[parent]
        inner.pop(last, None)
    return json.dumps(static, sort_keys=True)


def traffic_of(state: rounds.State, results, sketches, plan: rounds.Plan) -> Callable:
    """Builds `sent(info)`: the bytes that the server sends and receives in the round, over all clients of the cohort,
    and `bytes_kept`, what its rule, its optimiser and its term keep from round to round.

    Of a sketch only the pairs that are kept count, and its report; the gradient too where the rank adapts to it.

    Args:
      state, results, sketches: of a round, or their shapes.
    """
    model = trees.nbytes(trees.select(state.params, plan.trainable))
    down = plan.cohort * (model + trees.nbytes(state.shared if plan.term.travels else ()))
    memory = results.memory if plan.term.travels else ()
    up, pair = trees.nbytes((results.delta, results.before, results.damping, memory)), 0
    if isinstance(sketches, sketch.Sketch):
        pair = trees.nbytes((sketches.eigenvalues, sketches.basis)) // sketches.eigenvalues.size
        up += trees.nbytes(sketches.report) + (plan.cohort * model if plan.gradient_scale else 0)
    else:
        up += trees.nbytes(sketches)
    kept = trees.nbytes((state.aggregator, state.server))
    kept += plan.num_clients * trees.nbytes(state.shared) if plan.term.remember else 0
    pairs = lambda info: int(info.get("sketch_pairs", 0))
    return lambda info: {"bytes_down": down, "bytes_up": up + pair * pairs(info), "bytes_kept": kept}


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
