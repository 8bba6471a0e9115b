"""What is compiled, and for whom? The stages of a round, once for all phases that differ in traced numbers alone."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.federation import round as round_lib
from fipa_jax.federation import server
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.state import State
from fipa_jax.run.parts import TRACED, has_faults

STEERING = ("rounds", "max_skips")  # fields of a phase that steer the loop alone


class Programs(NamedTuple):
    """The stages of a round over their parts, see `federation.round` and `federation.server`."""

    draw: Callable  # (round, rates, root) -> (ids [C], orders [C, ...])
    train: Callable  # (state, rates, cohort, root, sketches=None) -> LocalResult [C, ...]
    sketch: Callable  # (state, rates, cohort, results | None, root) -> Sketch or Diagonal [C, ...], or None
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
            group = group[parent]
        group.pop(last, None)
    # Whether a number is there at all is not traced.
    does = {"late": settings.late.share > 0, "faults": has_faults(settings)}
    return json.dumps(static | {"chunk": parts.chunk, "channel": does}, sort_keys=True)


def traffic_of(state: State, results: Any, sketches: Any, parts: Parts) -> Callable[[dict], dict]:
    """Builds `sent(info)`: the bytes that the server sends and receives in the round, over all clients of the cohort,
    and `bytes_kept`, what its rule, its optimiser and its term keep from round to round.

    Of a sketch only the pairs that are kept count, and its report; the gradient too where the rank adapts to it.

    Args:
      state, results, sketches: of a round, or their shapes.
    """
    needs, term = parts.aggregator.needs, parts.term
    model = trees.nbytes(trees.select(state.params, parts.trainable))
    down = parts.cohort * (model + trees.nbytes(state.shared if term.travels else ()))
    sent = [results.delta, results.before if needs.loss else (), results.damping if needs.damping else ()]
    up, pair = trees.nbytes([*sent, results.store if term.travels else ()]), 0
    if isinstance(sketches, Sketch):
        pair = trees.nbytes((sketches.eigenvalues, sketches.basis)) // sketches.eigenvalues.size
        up += trees.nbytes(sketches.report) + (parts.cohort * model if parts.sketcher.sends_gradient else 0)
    else:
        up += trees.nbytes(sketches)
    kept = trees.nbytes((state.aggregator, state.server))
    kept += parts.num_clients * trees.nbytes(state.shared) if term.remember else 0

    def sent_in(info: dict) -> dict:
        pairs = int(info.get("sketch_pairs", 0))
        return {"bytes_down": down, "bytes_up": up + pair * pairs, "bytes_kept": kept}

    return sent_in
