"""How do updates and their merged curvature become one step? Three forms of one filter, and what stands in for a step
that fails. `aggregate.fipa` says what the forms are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.aggregate import merged_curvature as merge
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.trees import ratio


class Group(NamedTuple):
    """Those who have a say in the step: the round's clients, or messages of past ones. A group has one rank."""

    weights: jax.Array  # [C], over all groups summing to one
    deltas: jax.Array  # [C, P]
    sketch: Sketch  # eigenvalues [C, R], basis [C, P, R]
    moved: jax.Array | None = None  # [C, P], what the parameters have moved by since they began; None for nothing
    damping: jax.Array | None = None  # [C], their own, that the updates are relative to; None for the server's
    clients: bool = True  # whether they are clients, in whose updates the bounds count, or a merged past


class Settings(NamedTuple):
    """What of a rule the step depends on."""

    form: str  # a key of `FORMS`
    relative: bool  # whether the damping is in units of H's largest eigenvalue
    merge: str
    damping: jax.Array  # []
    rcond: jax.Array  # []
    explosion: jax.Array  # []


class Solved(NamedTuple):
    """A step, and how it came about."""

    step: jax.Array  # [P]
    beta: jax.Array  # [], the damping that it was taken with, absolute
    mean: jax.Array  # [P], sum_m w_m delta_m
    longest: jax.Array  # [], the longest update of a client, as seen from the present parameters
    merged: merge.Merged
    inverse: jax.Array  # [D], the form's filter of H's eigenvalues
    least: jax.Array  # [], the least eigenvalue that it lets through
    fallback: jax.Array  # [] int32, see `FALLBACKS`


# What `fallback` counts, in words: what is taken instead of a step that is not finite or explodes.
FALLBACKS = ("none", "the damped form with a larger damping", "the mean")
CAREFUL = 1e-3  # its damping, in units of H's largest eigenvalue


def solve(groups: Sequence[Group], settings: Settings) -> Solved:
    """The step of `settings.form` by all groups; a failing one gives way, see `aggregate.fipa`."""
    form, own = settings.form, any(group.damping is not None for group in groups)
    mean = sum(_weighted(group.weights, group) for group in groups)

    def base_of(beta):
        """sum_m w_m (beta_m / beta) delta_m, which the damped form starts from; the mean, where beta_m is beta."""
        return sum(_weighted(group.weights * _share(group, beta), group) for group in groups) if own else mean

    def merged_about(base):
        parts = [merge.Part(group.weights, group.sketch, _targets(group, base)) for group in groups]
        return merge.merge(parts, settings.merge)

    damped = form == "damped"
    base = jnp.zeros_like(mean) if not damped else base_of(settings.damping)
    merged = merged_about(base)
    spectrum = merged.spectrum
    beta = settings.damping * spectrum[0] if settings.relative else settings.damping
    beta = jnp.zeros_like(beta) if form == "pinv" else beta
    # With beta = 0 a direction at rounding level, which carries no information, must not be divided by.
    floor = (jnp.finfo(mean.dtype).eps * spectrum.size) ** 2
    inverse = lambda spectrum: FORMS[form](spectrum, beta, settings.rcond, floor)
    step, found = base + merged.solve(inverse), inverse(spectrum)
    least = jnp.min(jnp.where((found > 0) & (spectrum > floor * spectrum[0]), spectrum, spectrum[0]))
    longest = jnp.max(jnp.concatenate([_lengths(group) * _share(group, beta) for group in groups if group.clients]))

    def careful():
        """The damped form, with a damping that no rounding gets through."""
        enough = jnp.maximum(beta, CAREFUL * spectrum[0])
        base = base_of(enough)
        again = merged if damped and not own else merged_about(base)
        return base + again.solve(lambda spectrum: _damped_inverse(spectrum, enough, settings.rcond, floor)), enough

    limit = jnp.where(settings.explosion > 0, settings.explosion * longest, jnp.inf)
    failed = ~sound(step, limit)
    step, used = jax.lax.cond(failed, careful, lambda: (step, beta))
    failed_too = failed & ~sound(step, limit)
    step = jnp.where(failed_too, mean, step)
    return Solved(step, used, mean, longest, merged, found, least, failed.astype(jnp.int32) + failed_too)


def sound(step, limit=jnp.inf):
    """[] bool: the step is finite, and no longer than the limit."""
    length = jnp.linalg.norm(step)
    return jnp.isfinite(length) & (length <= limit)


def bounded(step, bound):
    """Shortens the step to `bound`; a step of that length or less passes bit for bit."""
    length = jnp.linalg.norm(step)
    return jnp.where(length > bound, step * ratio(bound, length), step)


def _weighted(weights, group: Group):
    return jnp.matmul(weights, group.deltas, precision="highest")


def _lengths(group: Group):
    """[C], of the updates as seen from the present parameters."""
    return jnp.linalg.norm(group.deltas if group.moved is None else group.deltas - group.moved, axis=1)


def _share(group: Group, beta):
    """[C], beta_m / beta."""
    return 1 if group.damping is None else ratio(group.damping, beta)


def _targets(group: Group, base) -> Callable:
    """What each one's curvature is applied to, the way from the present parameters + base to where it wants them."""

    def targets(start, number):  # [C, number]
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, number, axis=-1)
        found = rows(group.deltas) - rows(base)[None]
        return found if group.moved is None else found - rows(group.moved)

    return targets


def _damped_inverse(spectrum, beta, rcond, floor):
    """1 / (lam + beta), for H's eigenvalues lam."""
    keep = (spectrum > floor * spectrum[0]) | (beta > 0)
    return jnp.where(keep, 1 / jnp.where(keep, spectrum + beta, 1), 0)


def _pinv_inverse(spectrum, beta, rcond, floor):
    """1 / lam where lam > rcond lam_max, else 0."""
    return jnp.where(spectrum > rcond * spectrum[0], _damped_inverse(spectrum, 0.0, rcond, floor), 0)


FORMS = {"pinv": _pinv_inverse, "tikhonov": _damped_inverse, "damped": _damped_inverse}
