"""What does the server do in a round? It takes what has arrived, makes a step of it, and keeps what the next needs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import step_of
from fipa_jax.aggregate.screening import Received, receive
from fipa_jax.aggregate.server_optimizers import average_of
from fipa_jax.aggregate.uploads import Message, Uploads
from fipa_jax.client.local_solver import LocalResult
from fipa_jax.client.terms import Stores, changes_the_updates
from fipa_jax.curvature.common_basis import Core
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.curvature.sketchers import are_sent
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.state import State, places


def serve(
    parts: Parts,
    state: State,
    rates: Rates,
    cohort: Cohort,
    results: LocalResult,
    sketches: Message,
) -> tuple[State, dict]:
    """What the server makes of a round: (the state after it, info). A real deployment calls this too.

    Of the cohort it looks at ids, numbers of examples and orders, of the results at what clients send: `cohort.data`
    may be empty.

    Args:
      parts: of the phase.
      state: as `state.fetch` gives it for the cohort.
      rates: of the phase.
      cohort: who has taken part.
      results: of the clients' training, stacked [C, ...].
      sketches: stacked [C, ...], as the rule wants them.

    Returns:
      The state, with the cohort's stores, and info: of the channel, of the screening, of the rule (`aggregate.INFO`),
      and `ids` [C], `local_loss` [], `sketch_pairs` [] (eigenpairs that were sent), `sketches_sent` [] (or cores, by
      so many clients) and `skipped` [] bool: fewer than `parts.least_clients` clients took part, or the new parameters
      would not be finite.
    """
    chosen = trees.select(state.params, parts.trainable)
    sent = uploads_of(parts, cohort, results, sketches)
    uploads, delivered = parts.channel.deliver(sent, chosen, state.history, cohort.orders, rates.channel)
    received, screening = receive(uploads, chosen, parts.mesh, parts.sketcher.bits if parts.sketcher else 0)
    complete = functools.partial(completed, parts, state, rates, results)
    step, rule, info, received = step_of(parts.aggregator, received, state.aggregator, chosen, screening, complete)
    store, stores = remember(parts, state, rates, results, received)
    step = parts.term.correct(step, stores)
    chosen, server = move(parts, state, rates, chosen, step, received)
    after = State(trees.replace(state.params, chosen), rule, server, store, stores.shared, state.round, state.history)
    # A step back needs nobody: the one before it may have cost all clients.
    enough = (jnp.sum(received.took_part) >= parts.least_clients) | parts.aggregator.withdraws(rule)
    skipped = ~enough | ~_all_finite(chosen)
    after = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), state, after)
    # After a skipped round too, or ages would not be rounds.
    history = parts.channel.advance(state.history, trees.select(after.params, parts.trainable))
    if parts.mesh is not None:  # what long rows have left spread comes to its place, or the next would compile anew
        after = jax.lax.with_sharding_constraint(after, places(after, parts.mesh))
    info |= delivered | {"ids": cohort.ids, "local_loss": jnp.mean(results.loss), "skipped": skipped}
    if isinstance(uploads.sketch, Sketch):
        info["sketch_pairs"] = jnp.sum(uploads.sketch.eigenvalues > 0)
        info["sketches_sent"] = jnp.sum(are_sent(uploads.sketch))
    if isinstance(uploads.sketch, Core):
        info["sketches_sent"] = jnp.sum(jnp.any(uploads.sketch.values != 0, axis=(1, 2)))
    return after._replace(history=history, round=state.round + 1), parts.channel.show(info)


def uploads_of(parts: Parts, cohort: Cohort, results: LocalResult, sketches: Message) -> Uploads:
    """What the clients of a cohort send, stacked [C, ...]; only what the rule needs."""
    needs = parts.aggregator.needs
    loss, damping = results.before if needs.loss else None, results.damping if needs.damping else None
    return Uploads(results.delta, cohort.clients.num_examples, sketches, loss, damping, cohort.ids)


def completed(parts: Parts, state: State, rates: Rates, results: LocalResult, received: Received) -> Received:
    """What the rule gets: the updates as the term completes them, see `client.Term`."""
    if not changes_the_updates(parts.term):
        return received
    _, stores = remember(parts, state, rates, results, received)
    delta = jax.vmap(parts.term.complete, in_axes=(0, None))(received.delta, stores)
    return received._replace(delta=trees.zero_unless(received.took_part, delta))


def remember(parts: Parts, state: State, rates: Rates, results: LocalResult, received: Received) -> tuple[Any, Stores]:
    """(the cohort's stores after the round [C, ...], the means of stores that a term goes by).

    A client that takes no part keeps its old store, so that one bad upload does not poison the shared mean.
    """
    term = parts.term
    if term.remember is None:
        latest, accepted = results.store, trees.is_finite((results.loss, results.store))
    else:
        latest, accepted = jax.vmap(term.remember)(received.delta), True
    accepted &= received.took_part
    change = trees.zero_unless(accepted, optax.tree.sub(latest, state.store))
    store = optax.tree.add(state.store, change)
    shared = jax.tree.map(lambda mean, d: mean + jnp.sum(d, axis=0) / parts.num_clients, state.shared, change)
    even = trees.ratio(accepted.astype(float), jnp.sum(accepted))
    before, after = (trees.weighted_sum(even, trees.zero_unless(accepted, rows)) for rows in (state.store, store))
    return store, Stores(state.shared, shared, before, after, rates.local.mu)


def move(parts: Parts, state: State, rates: Rates, chosen: dict, step: Any, received: Received):
    """(the trainable parameters after the server's optimiser, the optimiser's state)."""
    rule = optax.with_extra_args_support(parts.server)
    sent = {"deltas": received.delta, "present": received.took_part}
    gradient = optax.tree.scale(-1, trees.widened(step))
    update, server = rule.update(gradient, state.server, trees.widened(chosen), **sent)
    return jax.tree.map(lambda p, u: (p - rates.server_lr * u).astype(p.dtype), chosen, update), server


def result_of(parts: Parts, state: State) -> Any:
    """The whole model's parameters that a phase leaves: the last ones, or a mean, see `server_optimizers.averaged`."""
    last = trees.select(state.params, parts.trainable)
    return trees.replace(state.params, average_of(state.server, last))


def _all_finite(tree: Any) -> jax.Array:
    """[] bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
