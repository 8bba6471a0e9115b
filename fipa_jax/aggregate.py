"""How do the clients' uploads become one step of the global model?

An `Aggregator` is a sibling of an optax transform: (init, apply). It returns a *step*, which is added to the
parameters, so a server optimiser (an optax transform) composes with any rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.sketch import Sketch

WEIGHTINGS = ("examples", "uniform")


class Uploads(NamedTuple):
    """What a round's C clients send; every array has a leading clients axis."""

    delta: Any  # parameter pytree [C, ...]: the client's new minus the broadcast parameters
    num_examples: jax.Array  # [C]; a client with 0 takes no part
    sketch: Sketch | None = None  # eigenvalues [C, R], basis [C, P, R] in the order of jax.tree.leaves; None for `mean`


class Aggregator(NamedTuple):
    """A rule as two pure functions; `state` is what the next round needs, `info` what a person needs."""

    init: Callable  # params -> state
    apply: Callable  # (uploads, state, params) -> (step, state, info: {name: array}, with `rejected` [C] bool)
    needs_sketch: bool = False  # whether the clients have to send their sketches


class FipaState(NamedTuple):
    """FIPA's hyper-parameters, as arrays: `state._replace(damping=...)` sweeps without recompiling."""

    damping: jax.Array  # [], beta, absolute or relative to H's largest eigenvalue
    rcond: jax.Array  # [], pinv drops eigenvalues of H below rcond times the largest
    max_step: jax.Array  # [], bound on |step| / max_m |delta_m|; 0 for none


def mean(weighting: str = "examples") -> Aggregator:
    """FedAvg: step = sum_m w_m delta_m, w_m = N_m / sum N (McMahan et al. 2017)."""
    _check_weighting(weighting)

    def apply(uploads, state, params):
        weights, uploads, info = _screen(uploads, params, weighting)
        step = trees.weighted_sum(weights, uploads.delta)
        return step, state, info | _compare(step, step, uploads.delta)

    return Aggregator(lambda params: (), apply)


def fipa(
    form: str = "damped",
    *,
    damping: float = 1e-3,
    relative: bool = True,
    rcond: float = 1e-5,
    max_step: float = 5.0,
    weighting: str = "examples",
) -> Aggregator:
    """Fisher-informed parameterwise aggregation (arXiv 2601.13608, eq. 6): B_m = w_m H^+ H_m, H = sum_m w_m H_m.

    With the merged factor F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m [P, D], so that H = F F^T and D = C R, and
    z = [sqrt(w_m) diag(lam_m)^{1/2} U_m^T delta_m]_m [D], so that F z = sum_m w_m H_m delta_m:

        pinv      step = H^+ F z                            the paper's rule; outside span(F) nothing moves
        tikhonov  step = (H + beta I)^{-1} F z              the authors' code steps by gamma beta times this: set the
                                                            server's learning rate to gamma beta
        damped    step = dbar + (H + beta I)^{-1} F z'      z' is z with delta_m - dbar for delta_m, dbar = sum_m w_m
                                                            delta_m. This is B_m = w_m (H + beta I)^{-1} (H_m + beta I),
                                                            so sum_m B_m = I: beta -> inf is FedAvg, beta -> 0 is pinv
                                                            inside span(F), and outside it FedAvg

    All three are one filter on the singular values of F, which come from a QR merge F = Q R and an SVD of R [D, D]
    (never from F^T F, which would halve the digits); nothing of size [P, P] exists.

    Args:
      form: `damped`, `tikhonov` or `pinv`.
      damping: beta. Directions with eigenvalues below it are left to the mean (damped) or not moved (tikhonov).
      relative: whether beta counts in units of H's largest eigenvalue.
      rcond: for pinv, the cut-off of H's eigenvalues relative to the largest.
      max_step: the step is shortened to at most this many times the longest client update: nearly collinear clients
        can otherwise amplify noise. 0 for no bound.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.

    Raises:
      ValueError: an unknown form or weighting; in `apply`, shapes that do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"aggregator.form: unknown form {form!r}; known: {', '.join(sorted(FORMS))}")
    _check_weighting(weighting)

    def init(params):
        dtype = ravel_pytree(params)[0].dtype
        return FipaState(*(jnp.asarray(x, dtype) for x in (damping, rcond, max_step)))

    def apply(uploads, state, params):
        if uploads.sketch is None:
            raise ValueError("fipa needs uploads.sketch (eigenvalues [C, R], basis [C, P, R]); it is None")
        weights, uploads, info = _screen(uploads, params, weighting)
        _, unravel = ravel_pytree(params)
        with jax.default_matmul_precision("highest"):
            deltas = trees.ravel_stacked(uploads.delta)  # [C, P]
            dbar = weights @ deltas
            merged = merge(weights, uploads.sketch)
            base, targets = (dbar, deltas - dbar[None, :]) if form == "damped" else (jnp.zeros_like(dbar), deltas)
            spectrum = merged.singular_values**2
            beta = state.damping * spectrum[0] if relative else state.damping
            beta = jnp.zeros_like(beta) if form == "pinv" else beta
            gain = FORMS[form](merged.singular_values, beta, state.rcond)
            step = base + merged.left @ (merged.rotation @ (gain * (merged.right @ merged.project(targets))))
        bound = jnp.where(state.max_step > 0, state.max_step * _longest(deltas), jnp.inf)
        step = _bound(step, bound)
        kept = jnp.sum(gain * merged.singular_values)
        condition = _ratio(spectrum[0] + beta, jnp.min(jnp.where(gain > 0, spectrum, spectrum[0])) + beta)
        pairs = jnp.sum(uploads.sketch.eigenvalues > 0)  # fewer than C R where a client's own rank is below R
        info |= {"effective_rank": kept, "merged_pairs": pairs, "condition": condition, "spectrum": spectrum}
        step, dbar = unravel(step), unravel(dbar)
        return step, state, info | _compare(step, dbar, uploads.delta)

    return Aggregator(init, apply, needs_sketch=True)


def _damped_gain(singular_values, beta, rcond):
    """s / (s^2 + beta): from z to the step, along each singular direction of F."""
    # A direction at rounding level carries no information; with beta = 0 it must not be divided by.
    floor = jnp.finfo(singular_values.dtype).eps * singular_values.shape[0] * singular_values[0]
    keep = singular_values > floor
    return jnp.where(keep, singular_values / jnp.where(keep, singular_values**2 + beta, 1), 0)


def _pinv_gain(singular_values, beta, rcond):
    """1 / s where s^2 > rcond s_max^2, else 0."""
    keep = singular_values**2 > rcond * singular_values[0] ** 2
    return jnp.where(keep, _damped_gain(singular_values, 0.0, rcond), 0)


FORMS = {"pinv": _pinv_gain, "tikhonov": _damped_gain, "damped": _damped_gain}


class Merged(NamedTuple):
    """The singular value decomposition of the merged factor, F = (left rotation) diag(singular_values) right."""

    left: jax.Array  # [P, D], orthonormal columns
    rotation: jax.Array  # [D, D]
    singular_values: jax.Array  # [D], descending; their squares are the non-zero eigenvalues of H
    right: jax.Array  # [D, D]
    project: Callable  # updates [C, P] -> z [D]


def merge(weights: jax.Array, sketch: Sketch) -> Merged:
    """QR merge of the clients' sketches, H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    Args:
      weights: [C], summing to one.
      sketch: eigenvalues [C, R], basis [C, P, R].
    """
    clients, size, rank = sketch.basis.shape
    # A zero eigenvalue may come out of a solver as a slightly negative one.
    scale = jnp.sqrt(weights[:, None] * jnp.maximum(sketch.eigenvalues, 0))  # [C, R]
    factor = jnp.transpose(sketch.basis * scale[:, None, :], (1, 0, 2)).reshape(size, clients * rank)
    left, triangle = jnp.linalg.qr(factor)
    rotation, singular_values, right = jnp.linalg.svd(triangle, full_matrices=False)
    project = lambda updates: (scale * jnp.einsum("cpr,cp->cr", sketch.basis, updates)).reshape(-1)
    return Merged(left, rotation, singular_values, right, project)


def fipa_step(delta, sketch: Sketch, num_examples: jax.Array, **options):
    """FIPA's step from stacked client results, for use in other people's loops.

    Args:
      delta: the clients' updates, a parameter pytree with a leading clients axis [C, ...].
      sketch: the clients' stacked sketches: eigenvalues [C, R], basis [C, P, R].
      num_examples: [C].
      **options: of `fipa`: form, damping, relative, rcond, max_step, weighting. The numeric ones may be traced.

    Returns:
      (step, info): the step is a parameter pytree, to be added to the broadcast parameters.
    """
    rule = fipa(**options)
    like = jax.tree.map(lambda leaf: leaf[0], delta)
    step, _, info = rule.apply(Uploads(delta, num_examples, sketch), rule.init(like), like)
    return step, info


AGGREGATORS = {"mean": mean, "fipa": fipa}


def _check_weighting(weighting):
    if weighting not in WEIGHTINGS:
        raise ValueError(f"aggregator.weighting: unknown {weighting!r}; known: {', '.join(WEIGHTINGS)}")


def _screen(uploads: Uploads, params, weighting: str):
    """Checks shapes, and sets aside the clients that must not take part: no examples, or anything not finite.

    Returns:
      (weights [C], uploads with those clients zeroed, info with `rejected` [C] bool). If no client is left all weights
      are 0, and so is the step.
    """
    _check_shapes(uploads, params)
    num_examples, dtype = jnp.asarray(uploads.num_examples), ravel_pytree(params)[0].dtype
    as_params = lambda leaf: jnp.asarray(leaf, dtype)  # a sketch in float64 must not turn a float32 model into one
    uploads = Uploads(uploads.delta, num_examples, jax.tree.map(as_params, uploads.sketch))
    present = uploads.num_examples > 0
    # The norm as well: it can overflow where no entry does, and the step would.
    lengths = jax.vmap(optax.tree.norm)(uploads.delta)
    accepted = present & jnp.isfinite(lengths) & trees.is_finite((uploads.delta, uploads.sketch))
    counts = uploads.num_examples if weighting == "examples" else present
    counts = jnp.where(accepted, counts, 0).astype(dtype)
    weights = _ratio(counts, jnp.sum(counts))
    delta, sketch = trees.zero_unless(accepted, (uploads.delta, uploads.sketch))
    return weights, Uploads(delta, num_examples, sketch), {"rejected": present & ~accepted}


def _check_shapes(uploads: Uploads, params):
    clients = jnp.shape(uploads.num_examples)
    if len(clients) != 1:
        raise ValueError(f"uploads.num_examples: needed shape [C], got {clients}")
    want = jax.tree.map(lambda leaf: clients + jnp.shape(leaf), params)
    got = jax.tree.map(jnp.shape, uploads.delta)
    if want != got:
        raise ValueError(f"uploads.delta: needed the parameters' tree with a leading clients axis, {want}, got {got}")
    if uploads.sketch is not None:
        size = ravel_pytree(params)[0].size
        eigenvalues, basis = uploads.sketch.eigenvalues.shape, uploads.sketch.basis.shape
        if eigenvalues[:1] != clients or len(eigenvalues) != 2 or basis != (*clients, size, *eigenvalues[1:]):
            raise ValueError(
                f"uploads.sketch: needed eigenvalues [C, R] and basis [C, P, R] with C = {clients[0]}, P = {size}, "
                f"got {eigenvalues} and {basis}"
            )


def _longest(deltas):
    return jnp.max(jnp.linalg.norm(deltas, axis=1))


def _bound(step, bound):
    """Shortens the step to `bound`; a step of that length or less passes bit for bit."""
    length = jnp.linalg.norm(step)
    return jnp.where(length > bound, step * _ratio(bound, length), step)


def _ratio(a, b):
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _compare(step, average, delta):
    """The step beside the clients' updates and beside FedAvg's."""
    norm, other = optax.tree.norm(step), optax.tree.norm(average)
    return {
        "step_ratio": _ratio(norm, _longest(trees.ravel_stacked(delta))),
        "fedavg_cosine": _ratio(optax.tree.vdot(step, average), norm * other),
        "fedavg_norm_ratio": _ratio(norm, other),
    }
