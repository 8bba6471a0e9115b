"""How do updates and their merged curvature become one step? FIPA's solvers: three filters of H's eigenvalues.

A `Solver` turns messages into a step. Those in here solve; those in `limits`, `past_rounds` and `trust` wrap one
that does, as `optax.apply_if_finite` wraps a transform, and have the same fields. `fisher_informed.from_solver`
makes an aggregation rule of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fipa_jax.aggregate import merged_curvature
from fipa_jax.aggregate.aggregator import Needs, Withdraws, never, sound
from fipa_jax.aggregate.merged_curvature import Factor, Filter, Merge
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.derivatives import vary_with
from fipa_jax.trees import length, ratio, total


class Messages(NamedTuple):
    """Those who have a say in the step, the round's clients or messages of past rounds; their sketches share a rank."""

    weights: jax.Array  # [C], over all messages summing to one
    deltas: jax.Array  # [C, P]
    sketch: Sketch  # eigenvalues [C, R], basis [C, P, R]
    moved: jax.Array | None = None  # [C, P], what the parameters have moved by since they began; None for nothing
    damping: jax.Array | None = None  # [C], their own, that the updates are relative to; None for the server's
    clients: bool = True  # whether they are clients, in whose updates the bounds count, or a merged past


class Now(NamedTuple):
    """What else a solver may look at in a round."""

    theta: jax.Array  # [P], the parameters before it
    size: jax.Array  # [], the cohort's examples or clients
    ids: jax.Array | None = None  # [C] int32, who the clients are
    loss: jax.Array | None = None  # [C], their mean losses at the broadcast parameters


class Solution(NamedTuple):
    """A step, and how it came about."""

    step: jax.Array  # [P]
    full: jax.Array  # [P], before any wrapper shortened it
    beta: jax.Array  # [], the damping that was used, absolute
    mean: jax.Array  # [P], FedAvg's step
    longest: jax.Array  # [], the longest client's update, in the units in which the step's length is bounded
    factor: Factor  # of the merged curvature H
    inverse: jax.Array  # [D], what each eigenvalue of H was multiplied by
    least: jax.Array  # [], the least eigenvalue that it lets through
    fallback: jax.Array  # [] int32, see `FALLBACKS`
    curve: jax.Array | None = None  # [], full^T H full, where a wrapper has computed it


Form = Literal["damped", "pinv", "tikhonov"]  # what becomes of H's eigenvalues
Hyper = dict  # {name: array}; the names are the config's paths below `aggregator`
Init = Callable[[jax.Array], Any]  # theta [P] -> state
Solve = Callable[[list[Messages], Hyper, Any, Now], tuple[Solution, Hyper, Any, dict]]


class Solver(NamedTuple):
    """Messages become a step: the same fields whether it solves, or wraps one that does."""

    hyper: Hyper  # {name: default}, the numbers that are traced
    init: Init
    solve: Solve  # (messages, hyper, state, now) -> (Solution, hyper, state, info)
    needs: Needs = Needs("sketch")  # what the clients have to send
    withdraws: Withdraws = never
    wrappers: tuple[str, ...] = ()  # what it is wrapped in, from the inside out
    relative: bool = False  # whether its damping counts in units of H's largest eigenvalue


def check_order(inner: Solver, refused: dict[str, str]) -> None:
    """Refuses to wrap a solver that one of some wrappers is around already.

    Args:
      refused: {wrapper: why not, in words}.

    Raises:
      ValueError: with these words.
    """
    for name in inner.wrappers:
        if name in refused:
            raise ValueError(refused[name])


# What `fallback` counts, in words: what is taken instead of a step that is not finite or explodes.
FALLBACKS = ("none", "the damped form with a larger damping", "the mean")
OWN_DAMPING = "aggregator.own_damping: needs form = 'damped', relative = False and damping above 0"
CAREFUL = 1e-3  # its damping, in units of H's largest eigenvalue


def pinv(rcond: Number = 1e-5, *, explosion: Number = 100.0, merge: Merge = "auto", mesh: Mesh | None = None) -> Solver:
    """step = H^+ sum_m w_m H_m delta_m (arXiv 2601.13608, eq. 6); outside span(F) nothing moves.

    Args:
      rcond: the pseudo-inverse drops eigenvalues of H below this share of the largest.
      explosion: a step that is not finite, or longer than this many times the longest update, is noise: the damped form
        with beta at least `CAREFUL` times H's largest eigenvalue takes its place, and where that fails too the mean. 0
        for no bound: then only what is not finite fails.
      merge, mesh: see `merged_curvature.merge`.
    """
    return _solver("pinv", {"rcond": rcond, "limits.explosion": explosion}, False, Merging(merge, mesh))


def tikhonov(
    damping: Number = 1e-3,
    *,
    relative: bool = True,
    explosion: Number = 100.0,
    merge: Merge = "auto",
    mesh: Mesh | None = None,
) -> Solver:
    """step = (H + beta I)^{-1} sum_m w_m H_m delta_m; directions with eigenvalues below beta hardly move.

    The authors' code takes gamma beta times this step: set the server's learning rate to gamma beta.

    Args:
      damping: beta.
      relative: whether beta counts in units of H's largest eigenvalue.
      explosion, merge, mesh: see `pinv`.
    """
    return _solver("tikhonov", {"damping": damping, "limits.explosion": explosion}, relative, Merging(merge, mesh))


def damped(
    damping: Number = 1e-3,
    *,
    relative: bool = True,
    own_damping: bool = False,
    explosion: Number = 100.0,
    merge: Merge = "auto",
    mesh: Mesh | None = None,
) -> Solver:
    """step = (H + beta I)^{-1} sum_m w_m (H_m + beta I) delta_m; directions with eigenvalues below beta get the mean.

    The weights B_m = w_m (H + beta I)^{-1} (H_m + beta I) sum to the identity. Computed as dbar + (H + beta I)^{-1}
    sum_m w_m H_m (delta_m - dbar), dbar the mean.

    Args:
      damping, relative, explosion, merge, mesh: see `tikhonov`.
      own_damping: whether an update is taken for what it is to the client, (H_m + beta_m I) delta_m = -g_m, see
        `fisher_informed.fipa`.

    Raises:
      ValueError: own_damping with a damping that is relative or not above 0.
    """
    if own_damping and (relative or (contracts.is_known(damping) and not damping > 0)):
        raise ValueError(OWN_DAMPING)
    solver = _solver("damped", {"damping": damping, "limits.explosion": explosion}, relative, Merging(merge, mesh))
    return solver._replace(needs=solver.needs._replace(damping=own_damping))


class Merging(NamedTuple):
    """How sketches are merged; static, see `merged_curvature.merge`."""

    method: Merge
    mesh: Mesh | None


def _solver(form: Form, hyper: Hyper, relative: bool, merge: Merging) -> Solver:
    merged_curvature.check(merge.method)

    def solve(messages, hyper, state, now):
        solution = _solve(messages, form, hyper, relative, merge)
        return solution, hyper, state, {"fallback": solution.fallback}

    return Solver(hyper, lambda theta: (), solve, relative=relative)


def _solve(messages: Sequence[Messages], form: Form, hyper: Hyper, relative: bool, merge: Merging) -> Solution:
    """The step of a form by all messages; a failing one gives way, see `pinv`."""
    mean = total(_weighted(each.weights, each) for each in messages)
    damping = jnp.zeros([], mean.dtype) if form == "pinv" else hyper["damping"]
    base = _base(messages, damping, mean) if form == "damped" else None
    factor = _merged_about(base, messages, merge)
    spectrum = factor.spectrum
    beta = damping * spectrum[0] if relative else damping
    remembered = not all(each.clients for each in messages)
    inverse = _filter(factor, spectrum, beta, remembered, hyper["rcond"] if form == "pinv" else 0.0)
    step, filtered = merged_curvature.solve(factor, inverse), inverse.of(spectrum)
    least = jnp.min(jnp.where((filtered > 0) & (spectrum > factor.noise.data * spectrum[0]), spectrum, spectrum[0]))
    longest = jnp.max(jnp.concatenate([_lengths(each) * _share(each, beta) for each in messages if each.clients]))

    def alike(*results):
        return vary_with(results, step, spectrum, beta)

    def careful():
        """The damped form, with a damping that no rounding gets through."""
        enough = jnp.maximum(beta, CAREFUL * spectrum[0])
        base = _base(messages, enough, mean)
        own = any(each.damping is not None for each in messages)
        again = factor if form == "damped" and not own else _merged_about(base, messages, merge)
        return alike(merged_curvature.solve(again, _filter(again, spectrum, enough, remembered)), enough)

    limit = jnp.where(hyper["limits.explosion"] > 0, hyper["limits.explosion"] * longest, jnp.inf)
    failed = ~sound(step, limit)
    step, used = jax.lax.cond(failed, careful, lambda: alike(step, beta))
    failed_too = failed & ~sound(step, limit)
    step = jnp.where(failed_too, mean, step)
    return Solution(step, step, used, mean, longest, factor, filtered, least, failed.astype(jnp.int32) + failed_too)


def _base(messages: Sequence[Messages], beta: jax.Array, mean: jax.Array) -> jax.Array:
    """sum_m w_m (beta_m / beta) delta_m [P], which the damped form starts from; the mean, where beta_m is beta."""
    if all(each.damping is None for each in messages):
        return mean
    return total(_weighted(each.weights * _share(each, beta), each) for each in messages)


def _merged_about(base: jax.Array | None, messages: Sequence[Messages], merge: Merging) -> Factor:
    """What each one's curvature is applied to is the way from the present parameters + base to where it wants them."""
    parts = [merged_curvature.Part(each.weights, each.sketch, each.deltas, each.moved) for each in messages]
    return merged_curvature.merge(parts, merge.method, base, merge.mesh)


def _weighted(weights: jax.Array, messages: Messages) -> jax.Array:
    return jnp.matmul(weights, messages.deltas, precision="highest")


def _lengths(messages: Messages) -> jax.Array:
    """[C], of the updates as seen from the present parameters."""
    seen = messages.deltas if messages.moved is None else messages.deltas - messages.moved
    return length(seen, axis=1)


def _share(messages: Messages, beta: jax.Array) -> jax.Array | int:
    """[C], beta_m / beta."""
    return 1 if messages.damping is None else ratio(messages.damping, beta)


def _filter(factor: Factor, spectrum: jax.Array, beta: jax.Array, remembered: bool, rcond: Any = 0.0) -> Filter:
    """1 / (lam + beta) of H's eigenvalues lam, where that is no noise, and above rcond lam_max.

    A direction of noise would come out as that noise / beta. What clients send is taken as it is; what is remembered of
    it was rounded, and coincides with it no better. Where beta is not above the noise of the eigenvalues themselves,
    these must be, and carry information.
    """
    noise = factor.noise
    damped = noise.data if remembered else noise.direction
    floor = jnp.where(beta > noise.eigenvalue * spectrum[0], damped, max(noise.data, noise.eigenvalue))
    return Filter(beta, jax.lax.stop_gradient(jnp.maximum(floor, rcond) * spectrum[0]))
