"""What is one round? Broadcast, local training, sketches, aggregation, server step: pure stages, and their composition.

The stages are apart so that a run can time each; `compose` makes them one jittable function.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fipa_jax import trees
from fipa_jax.aggregate.rules import Aggregator
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client import terms
from fipa_jax.client.examples import Client, gather, present, subsample, take
from fipa_jax.client.local_work import Hyper, adaptive_steps, with_initial_loss
from fipa_jax.curvature.sketch import Diagonal, Sketch
from fipa_jax.curvature.sketcher import plain, with_rank_by_gradient
from fipa_jax.federation import faults as faults_lib
from fipa_jax.federation import late as late_lib
from fipa_jax.federation.client_store import Memories
from fipa_jax.federation.parallel import map_clients, replicate
from fipa_jax.federation.population import Cohort, sample_cohort


class State(NamedTuple):
    """All that the next round needs; a pytree of arrays."""

    params: Any  # the global model
    aggregator: Any
    server: optax.OptState
    memory: Any  # of the term, stacked over all clients [T, ...], or on the host; inside a stage the cohort's [C, ...]
    shared: Any  # the mean of `memory` over all T clients
    round: jax.Array  # [], int32, counted over all phases
    history: Any = ()  # the trainable parameters of this and past rounds [A, ...], where clients may be late


class Plan(NamedTuple):
    """A phase's static choices and functions."""

    task: Any  # tasks.Task
    local: Callable  # a local solver of `client`
    term: terms.Term
    # (outputs, features) -> (key, params, batch, mask) -> Sketch or Diagonal, as the rule needs; None if it needs none
    sketch: Callable | None
    aggregator: Aggregator
    server: optax.GradientTransformation  # on the negative step, without the learning rate; see `server`
    num_clients: int  # T
    cohort: int  # C
    trainable: str  # regular expression over parameter paths
    sketch_examples: int = 0  # examples of a client that enter its sketch; 0 for all
    gradient_scale: float = 0.0  # c of `sketch.above_gradient`, by which the sketches' rank adapts; 0 for none
    step_scale: float = 0.0  # c of `client.steps_for`: local steps that adapt to the client's sketch; 0 for none
    max_steps: int = 0  # bound on those
    sketch_first: bool = False  # whether the local solver takes the client's sketch, or its steps adapt to it
    matched: bool = False  # whether the clients' second-order steps take the rule's damping
    faults: bool = False  # whether faults are injected
    late: int = 0  # rounds that clients may be late
    least_clients: int = 1  # with fewer accepted clients a round is skipped
    chunk: int = 1
    mesh: Any = None


class Rates(NamedTuple):
    """A phase's traced hyper-parameters."""

    local: Hyper
    lr_decay: jax.Array  # [], the local learning rate is lr * lr_decay ** round
    server_lr: jax.Array  # [], gamma
    faults: Any = ()  # `faults.Rates`, where faults are injected
    late: Any = ()  # [], probability that a client is late, where it may be


class Stages(NamedTuple):
    """One round, stage by stage.

    From `train` on a stage sees the cohort alone: the `simulate.Cohort`, which `population` makes of its ids, and the
    state of `fetch`. What belongs to all clients may live on the host. Keys derive from the root key, the round number
    and the client's id: neither the order of the clients nor a resume changes them.
    """

    init: Callable  # (params, round=0, on_host=False) -> State
    draw: Callable  # (round, root) -> ids [C] of the cohort
    train: Callable  # (state, rates, cohort, root, sketches=None) -> LocalResult [C, ...]
    sketch: Callable  # (state, rates, cohort, results | None, root) -> Sketch or Diagonal [C, ...], or None
    aggregate: Callable  # (state, rates, cohort, results, sketches) -> (state, info)
    plan: Plan


class LocalResult(NamedTuple):
    """The cohort's `local_work.LocalResult` [C, ...], with what has happened to it."""

    delta: Any
    store: Any
    loss: jax.Array
    before: jax.Array | None = None
    damping: jax.Array | None = None
    age: Any = ()  # [C] int32, rounds ago at which it started, where clients may be late
    faults: Any = ()  # `faults.Faults`, what goes wrong with the upload, where faults are injected


def make_stages(plan: Plan) -> Stages:
    """Builds a round's stages, all pure."""
    server_rule = optax.with_extra_args_support(plan.server)
    local = adaptive_steps(plan.local, plan.step_scale, plan.max_steps) if plan.step_scale else plan.local
    local = with_initial_loss(local, plan.task.loss) if plan.aggregator.wants_loss else local
    sketcher = None if plan.sketch is None else plain(plan.sketch)
    if sketcher and plan.gradient_scale:
        sketcher = with_rank_by_gradient(sketcher, plan.task.loss, plan.gradient_scale)

    def restrict(params):
        """The trainable subset, and the model's outputs as a function of it alone."""
        chosen = trees.select(params, plan.trainable)
        return chosen, lambda theta, batch: plan.task.outputs(trees.replace(params, theta), batch)

    def init(params, round: int = 0, on_host: bool = False) -> State:
        chosen = trees.select(params, plan.trainable)
        blank = plan.term.init(chosen)
        stacked = lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], plan.num_clients, axis=0)
        memory, server = () if on_host else jax.tree.map(stacked, blank), plan.server.init(chosen)
        history = late_lib.start(chosen, plan.late + 1) if plan.late else ()
        rule, round = plan.aggregator.init(chosen), jnp.asarray(round, jnp.int32)
        state = State(params, rule, server, memory, blank, round, history)
        if plan.mesh is not None:  # placed where a round leaves it, or the second round would compile anew
            state = replicate(state, plan.mesh)
        return state._replace(memory=Memories(blank)) if on_host else state

    def keys(state, root, ids):
        """Of the round: (clients' training [C], clients' sketches [C])."""
        _, train, sketch = jax.random.split(jax.random.fold_in(root, state.round), 3)
        per_client = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        return per_client(train, ids), per_client(sketch, ids)

    def draw(round, root):
        key = jax.random.split(jax.random.fold_in(root, round), 3)[0]
        return sample_cohort(key, plan.num_clients, plan.cohort)

    def ages_of(state, rates, cohort, root):
        """[C] int32, or None where nobody may be late."""
        if not plan.late:
            return None
        return late_lib.draw(jax.random.fold_in(root, state.round), rates.late, plan.late, cohort.ids)

    def broadcast(state, age):
        """(the trainable parameters that a client starts from, the model's outputs as a function of them)."""
        chosen, outputs = restrict(state.params)
        return chosen if age is None else late_lib.then(state.history, age), outputs

    def train(state: State, rates: Rates, cohort: Cohort, root, sketches=None) -> LocalResult:
        hyper = rates.local._replace(lr=rates.local.lr * rates.lr_decay**state.round)
        if plan.matched:
            hyper = hyper._replace(damping=state.aggregator.damping)
        faults = None
        if plan.faults:
            faults = faults_lib.draw(jax.random.fold_in(root, state.round), rates.faults, cohort.ids)

        ages = ages_of(state, rates, cohort, root)

        def one(seen, data, hyper, client, key, memory, sketch, part, age):
            chosen, outputs = broadcast(seen, age)
            hyper = hyper._replace(sketch=sketch, part=part)
            result = local(outputs, chosen, data, client, key, hyper, memory, seen.shared)
            if not plan.aggregator.wants_damping:
                result = result._replace(damping=None)
            return result

        common, sizes = (_common(state), cohort.data, hyper), cohort.clients.num_examples
        part = faults.part if plan.faults else None
        stacked = cohort.clients, keys(state, root, cohort.ids)[0], state.memory, sketches, part, ages
        results = map_clients(one, common, *stacked, sizes=sizes, chunk=plan.chunk, mesh=plan.mesh)
        results = LocalResult(*results)
        results = results._replace(age=ages) if plan.late else results
        return results._replace(faults=faults) if plan.faults else results

    def sketch(state: State, rates: Rates, cohort: Cohort, results, root) -> Sketch | Diagonal | None:
        if plan.sketch is None:
            return None

        def one(seen, data, client, key, delta, age):
            theta, outputs = broadcast(seen, age)
            if delta is not None:
                theta = optax.tree.add(theta, delta)
            draw_key, solve_key = jax.random.split(key)
            client = subsample(draw_key, client, plan.sketch_examples)
            batch, mask = gather(data, client.indices), present(client)
            return sketcher.of_client(outputs, theta, solve_key, batch, mask)

        moved = results.delta if plan.aggregator.at == "local" else None
        stacked = cohort.clients, keys(state, root, cohort.ids)[1], moved, ages_of(state, rates, cohort, root)
        common, sizes = (_common(state), cohort.data), cohort.clients.num_examples
        found = map_clients(one, common, *stacked, sizes=sizes, chunk=plan.chunk, mesh=plan.mesh)
        return sketcher.of_cohort(found, state.round)

    def aggregate(state: State, rates: Rates, cohort: Cohort, results: LocalResult, sketches):
        chosen = trees.select(state.params, plan.trainable)
        loss = results.before if plan.aggregator.wants_loss else None
        damping = results.damping if plan.aggregator.wants_damping else None
        uploads = results.delta, sketches, cohort.clients.num_examples
        if plan.faults:
            uploads = faults_lib.inject(results.faults, rates.faults.scale_by, *uploads)
        delta, sketches, num_examples = uploads
        uploads = Uploads(delta, num_examples, sketches, loss, damping, cohort.ids)
        if plan.late:
            since = lambda age: optax.tree.sub(chosen, late_lib.then(state.history, age))
            uploads = uploads._replace(age=results.age, moved=jax.vmap(since)(results.age))
        step, rule_state, info = plan.aggregator.apply(uploads, state.aggregator, chosen)
        # A client set aside keeps its old memory, so that one bad upload does not poison the shared mean; so does one
        # without examples, whose memory would change although it took no step.
        took_part = (num_examples > 0) & ~info["rejected"] & ~info.get("stale", jnp.asarray(False))
        latest = results.store if plan.term.remember is None else jax.vmap(plan.term.remember)(delta)
        accepted = took_part & trees.is_finite((results.loss, latest))
        change = trees.zero_unless(accepted, optax.tree.sub(latest, state.memory))
        memory = optax.tree.add(state.memory, change)
        shared = jax.tree.map(lambda mean, d: mean + jnp.sum(d, axis=0) / plan.num_clients, state.shared, change)
        even = trees.ratio(accepted.astype(float), jnp.sum(accepted))
        of_cohort = lambda memory: trees.weighted_sum(even, trees.zero_unless(accepted, memory))
        means = state.shared, shared, of_cohort(state.memory), of_cohort(memory)
        step = plan.term.correct(terms.Served(step, *means, rates.local.mu))
        sent = {"deltas": delta, "present": took_part}
        update, server = server_rule.update(optax.tree.scale(-1, step), state.server, chosen, **sent)
        chosen = jax.tree.map(lambda p, u: (p - rates.server_lr * u).astype(p.dtype), chosen, update)
        info |= {"ids": cohort.ids, "local_loss": jnp.mean(results.loss)}
        if plan.late:
            info |= {"age_mean": jnp.mean(results.age), "age_most": jnp.max(results.age)}
        if isinstance(sketches, Sketch):
            info["sketch_pairs"] = jnp.sum(sketches.eigenvalues > 0)
        if plan.faults:
            info["faults"] = results.faults.kinds
        # A step back needs nobody: the one before it may have cost all clients.
        skipped = (jnp.sum(took_part) < plan.least_clients) & ~jnp.asarray(info.get("undone", False))
        for leaf in jax.tree.leaves(chosen):
            skipped |= ~jnp.all(jnp.isfinite(leaf))
        info["skipped"] = skipped
        params = trees.replace(state.params, chosen)
        after = State(params, rule_state, server, memory, shared, state.round, state.history)
        after = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), state, after)
        if plan.late:  # after a skipped round too, or ages would not be rounds
            history = late_lib.push(state.history, trees.select(after.params, plan.trainable))
            after = after._replace(history=history)
        return after._replace(round=state.round + 1), info

    return Stages(init, draw, train, sketch, aggregate, plan)


def _common(state: State) -> State:
    """What all clients of a round may look at."""
    return state._replace(aggregator=(), server=(), memory=())


def work(stages: Stages, seen: State, rates: Rates, cohort: Cohort, root, clock=lambda stage, result: result):
    """The clients' part of a round: (results, sketches). Sketches come first where local work needs them.

    Args:
      clock: (name of the stage, its result) -> the result; it may measure the time.
    """
    if stages.plan.sketch_first:
        sketches = clock("sketch", stages.sketch(seen, rates, cohort, None, root))
        return clock("train", stages.train(seen, rates, cohort, root, sketches)), sketches
    results = clock("train", stages.train(seen, rates, cohort, root))
    return results, clock("sketch", stages.sketch(seen, rates, cohort, results, root))


def compose(stages: Stages) -> Callable:
    """The round as one function: (state, rates, data, clients, root) -> (state, info). Jit it, or scan over it.

    `data` is the training set {field: [N, ...]} and `clients` all clients, stacked [T, ...]; both on the device.
    """

    def round_(state: State, rates: Rates, data: dict, clients: Client, root):
        ids = stages.draw(state.round, root)
        cohort, seen = Cohort(ids, take(clients, ids), data), fetch(state, ids)
        results, sketches = work(stages, seen, rates, cohort, root)
        seen, info = stages.aggregate(seen, rates, cohort, results, sketches)
        return keep(state, seen, ids), info

    return round_


def fetch(state: State, ids) -> State:
    """The state as the cohort `ids` [C] sees it: of the clients' memories its own, [C, ...]."""
    on_host = isinstance(state.memory, Memories)
    return state._replace(memory=state.memory.rows(ids) if on_host else take(state.memory, ids))


def keep(state: State, seen: State, ids) -> State:
    """The state after a round: `seen`, with the memories of all clients; those on the host are written in place."""
    if isinstance(state.memory, Memories):
        state.memory.put(ids, seen.memory)
        return seen._replace(memory=state.memory)
    return seen._replace(memory=_put(state.memory, ids, seen.memory))


def snapshot(state: State) -> State:
    """The state on the host, in copies that later rounds do not write to."""
    on_host = isinstance(state.memory, Memories)
    memory = state.memory.snapshot() if on_host else None
    # Of its own part of what every process holds: not all of them need take the snapshot.
    copy = lambda leaf: np.array(leaf.addressable_data(0))
    found = jax.tree.map(copy, state._replace(memory=()) if on_host else state)
    return found._replace(memory=memory) if on_host else found


def restored(state: State, leaves: dict, mesh=None) -> State:
    """The state whose `snapshot` had these leaves.

    Args:
      state: a blank one of the same phase.
      leaves: {path: array}; those that begin with no field of the state are passed over.
      mesh: of the phase's plan.

    Raises:
      ValueError: they are not of such a phase.
    """
    own = {path: leaf for path, leaf in leaves.items() if path.partition("/")[0] in State._fields}
    store = state.memory
    if not isinstance(store, Memories):
        return jax.tree.map(jnp.copy, replicate(trees.fitted(own, state), mesh))
    seen = len(own.get("memory/ids", ()))
    found = trees.fitted(own, state._replace(memory=store.blank_of(seen)))
    store.put(found.memory["ids"], found.memory["rows"])
    return jax.tree.map(jnp.copy, replicate(found._replace(memory=()), mesh))._replace(memory=store)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked, ids, rows):
    """The stacked tree [T, ...] with `rows` [C, ...] at `ids`, in its place."""
    return jax.tree.map(lambda all_, new: all_.at[ids].set(new), stacked, rows)
