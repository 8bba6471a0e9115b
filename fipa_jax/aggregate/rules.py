"""How do the clients' uploads become one step of the global model?

An `Aggregator` is a sibling of an optax transform: (init, apply). It returns a *step*, which is added to the
parameters, so a server optimiser (an optax transform) composes with any rule.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate import filters as forms
from fipa_jax.aggregate import past_rounds as past_lib
from fipa_jax.aggregate import trust_region as trust_lib
from fipa_jax.aggregate.uploads import Uploads, cap_traces, freshness, relative_traces, screen
from fipa_jax.curvature.sketch import Diagonal, Sketch
from fipa_jax.trees import ratio

WEIGHTINGS = ("examples", "uniform")


class Aggregator(NamedTuple):
    """A rule as two pure functions; `state` is what the next round needs, `info` what a person needs."""

    init: Callable  # params -> state
    apply: Callable  # (uploads, state, params) -> (step, state, info: {name: array}, with `rejected` [C] bool)
    curvature: str = "none"  # what the clients have to send of it: none, sketch or diagonal
    at: str = "broadcast"  # the parameters at which they see it: broadcast, or local, those after their training
    wants_loss: bool = False  # whether they have to send their loss at the broadcast parameters
    wants_damping: bool = False  # whether they have to send the damping of their own steps


class FipaState(NamedTuple):
    """FIPA's hyper-parameters, as arrays: `state._replace(damping=...)` sweeps without recompiling."""

    damping: jax.Array  # [], beta, absolute or relative to H's largest eigenvalue
    rcond: jax.Array  # [], pinv drops eigenvalues of H below rcond times the largest
    max_step: jax.Array  # [], bound on |step| / max_m |delta_m|; 0 for none
    max_divergence: jax.Array  # [], bound on step^T H step / 2; 0 for none
    max_drift: jax.Array  # [], bound on how far a late client's own answers have moved; 0 for none
    explosion: jax.Array  # [], the same ratio above which the step is another's, see `forms`; 0 for none
    memory_decay: jax.Array  # [], by which the weight of what is remembered falls in a round
    last: trust_lib.Trust | None = None  # of the last step, by which the damping adapts
    past: past_lib.Past | None = None  # what is remembered of past rounds


def mean(weighting: str = "examples", *, staleness: float = 0.5, mix: bool = False) -> Aggregator:
    """FedAvg: step = sum_m w_m delta_m, w_m = N_m / sum N (McMahan et al. 2017).

    Where clients are late, with s(age) = (1 + age)^-staleness:

        FedBuff   step = sum_m w_m s(age_m) delta_m (Nguyen et al. 2022)
        FedAsync  step = sum_m w_m s(age_m) (theta_m - theta), `mix` (Xie et al. 2019, one client at a time: C = 1),
                  where theta_m is what the client came to, from parameters that are old
    """
    _check_weighting(weighting)

    def apply(uploads, state, params):
        weights, _, uploads, info = screen(uploads, params, weighting)
        fresh = weights * freshness(uploads, staleness, weights.dtype)
        towards = optax.tree.sub(uploads.delta, uploads.moved) if mix and uploads.moved is not None else uploads.delta
        # Of a client that is left out the update is zero, and so is its weight: but its parameters' way is not.
        step = trees.weighted_sum(fresh, towards)
        return step, state, info | _compare(step, step, uploads.delta)

    return Aggregator(lambda params: (), apply)


def fipa(
    form: str = "damped",
    *,
    damping: float = 1e-3,
    relative: bool = True,
    rcond: float = 1e-5,
    max_step: float = 5.0,
    max_divergence: float = 0.0,
    explosion: float = 100.0,
    trace_cap: float = 1000.0,
    trust: bool = False,
    memory: str = "none",
    memory_decay: float = 0.9,
    memory_rank: int = 250,
    memory_length: int = 8,
    num_clients: int = 0,
    own_damping: bool = False,
    staleness: float = 0.5,
    transport: bool = True,
    max_drift: float = 0.0,
    weighting: str = "examples",
    merge: str = "auto",
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

    All three are one filter on the singular values of F, see `merge`; nothing of size [P, P] or [P, D] exists. With a
    client's Gauss-Newton steps as local training (`second_order.gauss_newton`) it is the mixing of FedPM (arXiv
    2511.09100). If the clients' Gauss-Newton steps have the damping beta too, delta_m = -(H_m + beta I)^{-1} g_m, then
    the damped form is the centralised Levenberg-Marquardt step, -(H + beta I)^{-1} g, exactly: of a sketch of rank R
    that asks no more than that the eigenvalues it leaves out be small beside beta. `trust` finds such a beta round by
    round.

    How far can one client j move the step? In the damped form, with s' the step without it at the same beta,
    d = delta_j - s', A = sum_{m != j} w_m (H_m + beta I) and K = w_j (H_j + beta I):

        (A + K) s = A s' + K delta_j, so that x = s - s' has (A + K) x = K d, and |x|_A <= |d|_A
        |x|_A^2 + |x|_K^2 = x^T K d <= |x|_K |d|_K, so that |x|_A <= |d|_K / 2

    The first holds whatever its eigenvalues are: a client without bounds decides alone in the directions that it names.
    With `trace_cap` c and tau the lower median of the traces K <= kappa I, kappa = w_j (c tau + beta): the others'
    model of their loss, |x|_A^2 / 2, rises by at most kappa |d|^2 / 8. `max_step` says nothing of that; it bounds |x|
    by 2 max_step max_m |delta_m|, in any form and at any beta. Through A >= (1 - w_j) beta I the cap gives
    |x| <= (kappa / ((1 - w_j) beta))^{1/2} |d| / 2, which is more unless beta is large. And where beta is relative the
    cap keeps one client's eigenvalues from raising it above all that the others know.

    Args:
      form: `damped`, `tikhonov` or `pinv`.
      damping: beta. Directions with eigenvalues below it are left to the mean (damped) or not moved (tikhonov).
      relative: whether beta counts in units of H's largest eigenvalue.
      rcond: for pinv, the cut-off of H's eigenvalues relative to the largest.
      max_step: the step is shortened to at most this many times the longest update of a client, with `latest` also of
        an absent one, as seen from the present parameters: nearly collinear clients can otherwise amplify noise. 0 for
        no bound.
      max_divergence: the step is shortened until step^T H step / 2 is at most this: to second order, for a likelihood,
        by how much the model's answers move in Kullback-Leibler divergence, the mean over the clients' examples. 0 for
        no bound.
      explosion: a step that is not finite, or before it is shortened longer than this many times the longest update,
        is noise: the damped form with beta at least `CAREFUL` times H's largest eigenvalue takes its place, and
        where that fails too the mean. 0 for no bound: then only what is not finite fails.
      trace_cap: a client's eigenvalues are scaled down so that their sum is at most this many times the clients' lower
        median, see `uploads.relative_traces`; 0 for no cap. `info["trace_ratio"]` is the largest such ratio.
      trust: whether beta follows the clients' losses and a step that raised them is undone, see `trust.judge`; for
        rounds in which all clients take part, and a server's learning rate of 1. `damping` is the first round's.
      memory: what the server remembers of past rounds, see `past`: `none`, `prior`, `targets` or `latest`. For cohorts
        that are a small part of all clients.
      memory_decay: by which the weight of a past cohort falls with each round. With the prior the step is then about
        1 - memory_decay of the cohort's own: compare with FedAvg at the server's learning rate 1 - memory_decay. What
        one client says, see above, then weighs for about 1 / (1 - memory_decay) rounds. Below 1, for `latest` up to 1.
      memory_rank: of what is remembered, for `targets` of each cohort, for `latest` of each client.
      memory_length: L, the cohorts that `targets` remembers.
      num_clients: T, all clients, of which `latest` remembers one message each; it needs `uploads.ids`.
      own_damping: whether the damped form takes an update for what it is to the client, (H_m + beta_m I) delta_m =
        -g_m with `uploads.damping` beta_m, 1 / (learning rate x steps) of gradient descent, so that with the server's
        beta

            step = (H + beta I)^{-1} sum_m w_m (H_m + beta_m I) delta_m

        is the Levenberg-Marquardt step whatever the local damping: exactly for one Gauss-Newton step, nearly for
        gradient descent on the loss alone; a proximal term adds its mu to beta_m, which is not seen. `max_step` and
        `explosion` then count in units of the longest beta_m / beta |delta_m|. Beta must be absolute.
      staleness: where clients are late: a weight falls with the client's age by (1 + age)^-staleness.
      transport: whether a late client's target, or with `latest` an absent one's, is what it was, H_m (delta_m -
        moved_m) for H_m delta_m: its gradient at the present parameters, by its own curvature, if these have moved by
        moved_m since. That holds for steps which the damped form undoes: matched, natural or with own_damping.
        Otherwise it is a pull back to where the client began.
      max_drift: a late client, or with `latest` an absent one, takes no part if moved_m^T H_m moved_m / 2 is above
        this, as its curvature and gradient are of other parameters; 0 for no bound. `info["stale"]` names late ones.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      merge: how the clients' sketches are merged, see `merge.merge`.

    Raises:
      ValueError: an unknown form, weighting, merge or memory, trust in a rule without damping or with a memory,
        own_damping in another form than the damped one; in `apply`, shapes that do not fit.
    """
    if form not in forms.FORMS:
        raise ValueError(f"aggregator.form: unknown form {form!r}; known: {', '.join(sorted(forms.FORMS))}")
    _check_weighting(weighting)
    remember = past_lib.make(
        memory,
        rank=memory_rank,
        length=memory_length,
        decay=memory_decay,
        num_clients=num_clients,
        transport=transport,
    )
    if own_damping and (form != "damped" or relative or (isinstance(damping, int | float) and not damping > 0)):
        raise ValueError("aggregator.own_damping: needs form = 'damped', relative = False and damping above 0")
    if trust and memory != "none":
        raise ValueError(f"aggregator.trust: needs all clients in every round, where memory = {memory!r} adds nothing")
    if trust and form == "pinv":
        raise ValueError("aggregator.trust: 'pinv' has no damping to adapt; set aggregator.form = 'damped'")

    def init(params):
        theta = ravel_pytree(params)[0]
        last = trust_lib.init(theta.size, theta.dtype) if trust else None
        past = remember.init(theta) if remember else None
        given = damping, rcond, max_step, max_divergence, max_drift, explosion, memory_decay
        numbers = (jnp.asarray(x, theta.dtype) for x in given)
        return FipaState(*numbers, last, past)

    def apply(uploads, state, params):
        if not isinstance(uploads.sketch, Sketch):
            raise ValueError("fipa needs uploads.sketch, a Sketch of eigenvalues [C, R] and basis [C, P, R]")
        if trust and uploads.loss is None:
            raise ValueError("fipa with trust needs uploads.loss [C], the clients' mean losses before their work")
        if memory == "latest" and uploads.ids is None:
            raise ValueError("fipa with memory = 'latest' needs uploads.ids [C], who the clients are")
        if own_damping and uploads.damping is None:
            raise ValueError("fipa with own_damping needs uploads.damping [C], that of the clients' own steps")
        weights, size, uploads, info = screen(uploads, params, weighting, staleness, state.max_drift)
        theta, unravel = ravel_pytree(params)
        relative_trace = relative_traces(uploads.sketch, weights)
        sketch, capped = cap_traces(uploads.sketch, relative_trace, trace_cap)
        deltas, moved = trees.ravel_stacked(uploads.delta), None  # [C, P]
        if uploads.moved is not None and transport:
            moved = jnp.where((weights > 0)[:, None], trees.ravel_stacked(uploads.moved), 0)
        cohort = forms.Group(weights, deltas, sketch, moved, uploads.damping if own_damping else None)
        settings = forms.Settings(form, relative, merge, state.damping, state.rcond, state.explosion)
        now = past_lib.Round(cohort, uploads.ids, size, theta, state.memory_decay, state.max_drift, settings)
        groups = remember.join(state.past, now) if remember else [cohort]
        solved = forms.solve(groups, settings)
        step, factor, quadratic = _bounded(solved, state)
        if remember:
            state = state._replace(past=remember.keep(state.past, now, solved))
            info["memory_share"] = jnp.sum(groups[1].weights)
        if trust:
            full = quadratic + solved.beta * jnp.vdot(solved.step, solved.step)
            # The step solves (H + beta I) step = -g, which turns -g x - x^T H x / 2 at x = factor step into this.
            predicted = factor * full - factor**2 * quadratic / 2
            step, state, verdict = _trusted(step, predicted, state, weights, uploads.loss)
            info |= verdict
        spectrum = solved.merged.spectrum
        info |= {
            "effective_rank": jnp.sum(solved.inverse * spectrum),
            "merged_pairs": jnp.sum((uploads.sketch.eigenvalues > 0) & (weights > 0)[:, None]),
            "condition": ratio(spectrum[0] + solved.beta, solved.least + solved.beta),
            "spectrum": spectrum,
            "fallback": solved.fallback,
            "capped": capped,
            "trace_ratio": jnp.max(relative_trace),
            "divergence": factor**2 * quadratic / 2,
        }
        info |= _describe(uploads.sketch, weights)
        step, dbar = unravel(step), unravel(solved.mean)
        return step, state, info | _compare(step, dbar, uploads.delta)

    return Aggregator(init, apply, curvature="sketch", wants_loss=trust, wants_damping=own_damping)


def _bounded(solved: forms.Solved, state: FipaState):
    """(step [P] within both bounds, [] what it was shortened to, [] step^T H step of the one before)."""
    bound = jnp.where(state.max_step > 0, state.max_step * solved.longest, jnp.inf)
    quadratic = jnp.minimum(solved.merged.quadratic(solved.step), jnp.finfo(solved.step.dtype).max)
    limit = jnp.where(state.max_divergence > 0, 2 * state.max_divergence, jnp.inf)
    factor = jnp.where(quadratic > limit, jnp.sqrt(ratio(limit, quadratic)), 1)
    step = forms.bounded(factor * solved.step, bound)
    return step, ratio(jnp.linalg.norm(step), jnp.linalg.norm(solved.step)), quadratic


def _trusted(step, predicted, state: FipaState, weights, losses):
    """(the step to take: this one, or the last one back; the state with the damping that follows; info)."""
    loss = jnp.dot(weights, jnp.where(weights > 0, losses, 0))
    clients = jnp.sum(weights > 0, dtype=jnp.int32)
    verdict = trust_lib.judge(state.last, loss, state.damping, clients)
    step, last = trust_lib.follow(state.last, verdict, loss, state.damping, step, predicted, clients)
    info = {"damping": state.damping, "gain": verdict.gain, "undone": ~verdict.accepted}
    return step, state._replace(damping=verdict.damping, last=last), info


class DiagonalState(NamedTuple):
    """The diagonal rule's hyper-parameter, as an array."""

    damping: jax.Array  # [], beta, absolute or relative to the largest diagonal entry of H


def diagonal(
    *,
    damping: float = 1e-3,
    relative: bool = True,
    at: str = "local",
    staleness: float = 0.5,
    weighting: str = "examples",
) -> Aggregator:
    """FIPA with the curvatures' diagonals alone, entry by entry: f_m = diag H_m [P], beta as in the damped form.

        step = (sum_m w_m f_m delta_m + beta dbar) / (sum_m w_m f_m + beta)

    Seen at the clients' own trained parameters this is Fisher merging (Matena & Raffel 2022, arXiv 2111.09832, eq. 4)
    and the minimum of FedFisher's diagonal form (Jhunjhunwala et al. 2024), with the mean where no client has any
    curvature: beta -> 0 is theirs, beta -> inf is FedAvg.

    Args:
      damping: beta.
      relative: whether beta counts in units of the largest entry of sum_m w_m f_m.
      at: `local`, or `broadcast` as FIPA's own sketches.
      staleness: see `fipa`; a late client's update is added as it is.
      weighting: see `fipa`.

    Raises:
      ValueError: an unknown weighting or `at`; in `apply`, shapes that do not fit.
    """
    _check_weighting(weighting)
    if at not in PLACES:
        raise ValueError(f"aggregator.at: unknown {at!r}; known: {', '.join(PLACES)}")

    def init(params):
        return DiagonalState(jnp.asarray(damping, ravel_pytree(params)[0].dtype))

    def apply(uploads, state, params):
        if not isinstance(uploads.sketch, Diagonal):
            raise ValueError("diagonal needs uploads.sketch, a Diagonal of values [C, P]")
        weights, _, uploads, info = screen(uploads, params, weighting, staleness)
        deltas = trees.ravel_stacked(uploads.delta)
        dbar = jnp.matmul(weights, deltas, precision="highest")
        values = jnp.where((weights > 0)[:, None], jnp.maximum(uploads.sketch.values, 0), 0).astype(dbar.dtype)
        total = jnp.matmul(weights, values, precision="highest")
        beta = state.damping * jnp.max(total) if relative else state.damping
        # In the form dbar + ..., which passes identical updates through unchanged.
        pull = jnp.einsum("c,cp,cp->p", weights, values, deltas - dbar[None], precision="highest")
        step = dbar + ratio(pull, total + beta)
        failed = ~forms.sound(step)
        info["fallback"] = 2 * failed.astype(jnp.int32)
        step, dbar = (ravel_pytree(params)[1](x) for x in (jnp.where(failed, dbar, step), dbar))
        return step, state, info | _compare(step, dbar, uploads.delta)

    return Aggregator(init, apply, curvature="diagonal", at=at)


def fipa_step(delta, sketch: Sketch, num_examples: jax.Array, **options):
    """FIPA's step from stacked client results, for use in other people's loops.

    Args:
      delta: the clients' updates, a parameter pytree with a leading clients axis [C, ...].
      sketch: the clients' stacked sketches: eigenvalues [C, R], basis [C, P, R].
      num_examples: [C].
      **options: of `fipa`; damping, rcond, max_step, max_divergence and explosion may be traced. A memory, and what
        asks for more than this of the clients, needs `fipa` itself.

    Returns:
      (step, info): the step is a parameter pytree, to be added to the broadcast parameters.
    """
    if options.get("memory", "none") != "none":
        raise ValueError(
            "fipa_step keeps nothing from call to call: for a memory take aggregate.fipa(...) and its state"
        )
    rule = fipa(**options)
    like = jax.tree.map(lambda leaf: leaf[0], delta)
    step, _, info = rule.apply(Uploads(delta, num_examples, sketch), rule.init(like), like)
    return step, info


AGGREGATORS = {"diagonal": diagonal, "fipa": fipa, "mean": mean}
PLACES = ("broadcast", "local")


def _check_weighting(weighting):
    if weighting not in WEIGHTINGS:
        raise ValueError(f"aggregator.weighting: unknown {weighting!r}; known: {', '.join(WEIGHTINGS)}")


def _describe(sketch: Sketch, weights) -> dict:
    """What the clients' reports say of their sketches, over the clients that take part."""
    if sketch.report is None:
        return {}
    report, there = sketch.report, weights > 0
    share = ratio(jnp.sum(sketch.eigenvalues, axis=1), report.trace)
    return {
        "captured": jnp.dot(weights, jnp.where(there, share, 0)),  # of the trace of the clients' curvature
        "sketch_residual": jnp.max(jnp.where(there[:, None], report.residuals, 0)),
        "sketch_products": jnp.sum(report.products),
        "sketches_unconverged": jnp.sum(there & ~report.converged),
        "flags": report.flags,
    }


def _longest(deltas):
    return jnp.max(jnp.linalg.norm(deltas, axis=1))


def _compare(step, average, delta):
    """The step beside the clients' updates and beside FedAvg's."""
    norm, other = optax.tree.norm(step), optax.tree.norm(average)
    return {
        "step_ratio": ratio(norm, _longest(trees.ravel_stacked(delta))),
        "fedavg_cosine": ratio(optax.tree.vdot(step, average), norm * other),
        "fedavg_norm_ratio": ratio(norm, other),
    }
