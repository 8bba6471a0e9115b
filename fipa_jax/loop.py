"""How does a phase run, round after round? Stage by stage, each timed, or many rounds in one compiled call."""

import json
import time
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict
from tqdm import tqdm

from fipa_jax import metrics, phase, report, rounds, sketch, trees

# Fields of a phase that are traced or only steer the loop: rules that differ in these alone share compiled programs.
TRACED = ("rounds", "local.lr", "local.lr_decay", "local.damping", "term.mu", "server.lr")


def run_phase(experiment, settings: ConfigDict, name: str, params, first: int, writer: metrics.Writer):
    """Runs one phase from `params`; returns (params, its metrics rows).

    Args:
      experiment: `experiment.Experiment`.
      settings: the phase's fields.
      name: of the run, in the metrics file and on the screen.
      params: the whole model's, that the phase starts from.
      first: number of its first round.
      writer: of the metrics file.
    """
    rates = phase.make_rates(settings, experiment.config.precision)
    stages = rounds.make_stages(plan_of(experiment, settings))
    state = start(experiment, stages, params, first)
    per_call, last = experiment.config.rounds_per_call, first + settings.rounds - 1
    advance = (in_blocks if per_call > 1 else by_stage)(experiment, settings, stages, state)
    rows, said = [], Counter()
    with tqdm(total=settings.rounds, desc=f"{name:<12}", unit="round") as bar:
        for k in range(first, last + 1, per_call):
            state, found = advance(state, rates, k, min(per_call, last + 1 - k), last)
            for row, info in found:
                report.warn(name, row["round"], info, said)
                rows.append(metrics.jsonable({"run": name} | row))
                writer.write(rows[-1])
                bar.set_postfix_str(report.progress(rows[-1]), refresh=False)
            bar.update(len(found))
    return state.params, rows


def by_stage(experiment, settings, stages, state) -> Callable:
    """Builds `advance(state, rates, k, 1, last) -> (state, [(row, info)])`: one round, the seconds of each stage."""
    stages = compiled(experiment, settings, stages, state)
    data, clients, root = experiment.train, experiment.clients, experiment.root

    def advance(state, rates, k, count, last):
        clock = Clock()
        ids = stages.draw(state.round, clients, root)
        seen = rounds.fetch(state, ids)
        results, sketches = rounds.work(stages, seen, rates, data, clients, ids, root, clock)
        sent = traffic_of(state, results, sketches, stages.plan)
        seen, info = clock("aggregate", stages.aggregate(seen, rates, clients, ids, results, sketches))
        state = rounds.keep(state, seen, ids)
        test, own = due(experiment.config.eval, k, last)
        figures = on_test(experiment, experiment.held, state.params) if test else {}
        figures |= on_clients(experiment, data, clients, state.params) if own else {}
        clock("evaluate", figures)
        info = jax.device_get(info)
        return state, [({"round": k} | figures | report.figures(info) | sent(info) | clock.seconds, info)]

    return advance


def in_blocks(experiment, settings, stages, state) -> Callable:
    """Builds `advance(state, rates, k, count, last) -> (state, [(row, info)])`: `count` rounds in one compiled call.

    Evaluation is part of the program, and nothing comes back to the host in between. One compilation serves any count
    up to `config.rounds_per_call`.
    """
    config, key = experiment.config, key_of(settings, state)
    round_ = rounds.compose(stages)

    def one(state, rates, data, held, clients, root, last):
        test, own = due(config.eval, state.round, last)
        state, info = round_(state, rates, data, clients, root)
        figures = _if(test, lambda params: on_test(experiment, held, params), state.params)
        return state, (info, figures | _if(own, lambda p: on_clients(experiment, data, clients, p), state.params))

    def block(state, rates, data, held, clients, root, count, last):
        given = rates, data, held, clients, root, last
        row = jax.eval_shape(one, state, *given)[1]
        empty = jax.tree.map(lambda leaf: jnp.zeros([config.rounds_per_call, *leaf.shape], leaf.dtype), row)

        def body(i, carry):
            state, rows = carry
            state, row = one(state, *given)
            return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), rows, row)

        return lax.fori_loop(0, count, body, (state, empty))

    data, clients, root = experiment.train, experiment.clients, experiment.root
    run = experiment.compiled.setdefault(f"block of {key}", jax.jit(block))
    rates = phase.make_rates(settings, config.precision)
    ids = jax.eval_shape(stages.draw, state.round, clients, root)
    of_clients = lambda state, rates, *given: rounds.work(stages, rounds.fetch(state, given[2]), rates, *given)
    shapes = jax.eval_shape(of_clients, state, rates, data, clients, ids, root)
    sent = traffic_of(state, *shapes, stages.plan)

    def advance(state, rates, k, count, last):
        clock = Clock()
        state, (infos, figures) = run(state, rates, data, experiment.held, clients, root, count, last)
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


def on_clients(experiment, data: dict, clients, params) -> dict:
    """The figures of every client's own examples."""
    return metrics.over_clients(experiment.evaluate(params, data), clients)


def plan_of(experiment, settings: ConfigDict) -> rounds.Plan:
    """The plan of a phase of this experiment."""
    num_clients = experiment.clients.num_examples.shape[0]
    return phase.make_plan(experiment.config, settings, experiment.problem.task, num_clients)


def start(experiment, stages: rounds.Stages, params, first: int) -> rounds.State:
    """The state before round `first`."""
    num_clients = experiment.clients.num_examples.shape[0]
    on_host = phase.memory_on_host(experiment.config, stages.plan, params, num_clients)
    return stages.init(params, num_clients, first, on_host)


def compiled(experiment, settings: ConfigDict, stages: rounds.Stages, state: rounds.State):
    """The phase's stages, jitted once for all phases that differ in traced hyper-parameters only."""
    key = key_of(settings, state)
    if key not in experiment.compiled:
        jitted = {name: jax.jit(getattr(stages, name)) for name in ("draw", "train", "sketch", "aggregate")}
        experiment.compiled[key] = stages._replace(**jitted)
    return experiment.compiled[key]


def key_of(settings: ConfigDict, state: rounds.State) -> str:
    """What two phases must share to share their compiled programs."""
    static = json.loads(settings.to_json_best_effort())
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
    """Builds `sent(info)`: the bytes that the server sends and receives in the round, over all clients of the cohort.

    Of a sketch only the pairs that are kept count, and its report; the gradient too where the rank adapts to it.

    Args:
      state, results, sketches: of a round, or their shapes.
    """
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    model = size(trees.select(state.params, plan.trainable))
    down = plan.cohort * (model + size(state.shared if plan.term.travels else ()))
    up, pair = size((results.delta, results.before, results.memory if plan.term.travels else ())), 0
    if isinstance(sketches, sketch.Sketch):
        pair = size((sketches.eigenvalues, sketches.basis)) // sketches.eigenvalues.size
        up += size(sketches.report) + (plan.cohort * model if plan.gradient_scale else 0)
    else:
        up += size(sketches)
    return lambda info: {"bytes_down": down, "bytes_up": up + pair * int(info.get("sketch_pairs", 0))}


class Clock:
    """Seconds of each stage; waits for the device, so that a stage's time is its own."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def __call__(self, stage: str, result):
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[f"seconds_{stage}"], self._last = round(now - self._last, 6), now
        return result
