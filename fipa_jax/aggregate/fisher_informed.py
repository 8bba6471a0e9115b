"""FIPA as an aggregation rule: a solver with its wrappers, and the facade that composes them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate import solvers
from fipa_jax.aggregate.adaptive_damping import adaptive
from fipa_jax.aggregate.aggregator import (
    WEIGHTINGS,
    Aggregator,
    Info,
    Params,
    Weighting,
    compare,
    step_of,
    weights_of,
)
from fipa_jax.aggregate.late_updates import LateUpdates, check_moved, without_drifted
from fipa_jax.aggregate.limits import Limits, capped, limited
from fipa_jax.aggregate.merged_curvature import Merge
from fipa_jax.aggregate.past_rounds import PastRounds, kind_of, remembering
from fipa_jax.aggregate.row_blocks import Spread, fill_up, padded
from fipa_jax.aggregate.screening import Received, receive, without_place
from fipa_jax.aggregate.solvers import Form, Messages, Now, Solution, Solver
from fipa_jax.aggregate.trust import trust_region
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.lookup import lookup

# What FIPA's `info` says, beside that of the screening (`screening.receive`, `late_updates.without_drifted`).
INFO = {
    "agreement": "[], cosine of the step and of where a smaller damping would have led the last ones, where it adapts",
    "capped": "[C] bool, clients whose eigenvalues were scaled down to the cap",
    "captured": "[], share of the trace of the clients' curvature that their sketches hold, by their reports",
    "condition": "[], the largest over the least eigenvalue that the filter lets through, both with the damping",
    "damping": "[], beta, where it adapts",
    "divergence": "[], step^T H step / 2",
    "effective_rank": "[], sum of lam / (lam + beta): the directions in which curvature decides",
    "fallback": "[] int32, what was taken instead of a failing step, a place in `solvers.FALLBACKS`",
    "fedavg_cosine": "[], cosine of the step and FedAvg's",
    "fedavg_norm_ratio": "[], the step's length over FedAvg's",
    "flags": "{name in `sketch.FLAGS`: [C] bool}, by the clients' reports",
    "gain": "[], actual over predicted decrease of the loss by the last step, where there is a trust region",
    "merged_pairs": "[] int, eigenpairs of the clients that take part",
    "past_share": "[], the weight of past rounds, of one in all",
    "sketch_products": "[] int, products with the clients' curvature, by their reports",
    "sketch_residual": "[], the largest residual of the clients' eigenpairs, by their reports",
    "sketches_unconverged": "[] int, sketches whose residuals are above their tolerance",
    "spectrum": "[D], the eigenvalues of H within the span of all bases, descending",
    "step_ratio": "[], the step's length over the longest client's update",
    "trace_ratio": "[], the largest client's trace over the clients' median, see `limits.median_trace`",
    "undone": "[] bool, whether the step takes the last one back, where there is a trust region",
}


class FipaState(NamedTuple):
    """FIPA's state: `state._replace(hyper=state.hyper | {"damping": ...})` sweeps without recompiling."""

    hyper: dict[str, jax.Array]  # {field of `config.fipa.aggregator`: []}, the numbers that are traced
    solver: Any  # what the solver and its wrappers keep


def from_solver(
    solver: Solver,
    *,
    weighting: Weighting = "examples",
    late: LateUpdates = LateUpdates(),
    spread: bool = False,
) -> Aggregator:
    """The aggregation rule of a solver.

    Example:
      few_of_many = from_solver(
          capped(remembering(limited(damped(0.1, relative=False), max_divergence=0.005), prior(rank=250)))
      )

    Args:
      solver: of `solvers`, as it is or wrapped.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      late: see `fipa`.
      spread: whether long vectors and bases are filled up with zeros, so that their rows can be spread over devices.

    Returns:
      The rule, which needs of the clients what the solver needs; its state is a `FipaState`.

    Raises:
      ValueError: the weighting is not known, or a number is negative or NaN; in `apply`, uploads without what the
        solver needs.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    numbers = solver.hyper | {"late.max_drift": late.max_drift}
    contracts.at_least(0, **numbers, **{"late.staleness": late.staleness})

    def init(params):
        theta = trees.ravel(trees.widened(contracts.floating(params, "params")))
        theta = fill_up(theta, padded(theta.size)) if spread else theta
        hyper = {name: jnp.array(value, theta.dtype) for name, value in numbers.items()}
        return FipaState(hyper, solver.init(theta))

    def admit(received: Received, state: FipaState):
        received, unknown = without_place(received, solver.needs.num_clients)
        received, drifted = without_drifted(received, state.hyper["late.max_drift"])
        return received, unknown | drifted

    def apply(received: Received, state: FipaState, params):
        sketch = _sketch_of(received, solver)
        weights, size = weights_of(received, params, weighting, late.staleness)
        theta, unravel = ravel_pytree(params)
        length, rows = theta.size, padded(theta.size) if spread else theta.size
        sketch = sketch._replace(basis=fill_up(sketch.basis, rows))
        moved = None
        if late.transport:
            check_moved(received, "transport")
        if received.moved is not None and late.transport:
            moved = fill_up(trees.ravel_stacked(received.moved), rows)
        damping = received.damping if solver.needs.damping else None
        theta = fill_up(theta, rows)
        cohort = Messages(weights, fill_up(received.deltas, rows), sketch, moved, damping)
        now = Now(theta, size, received.ids, received.loss)
        solution, hyper, kept, info = solver.solve([cohort], state.hyper, state.solver, now)
        step = unravel(solution.step[:length])
        average = trees.weighted_sum(weights, trees.widened(received.delta))  # without what is remembered
        info |= _describe(solution, sketch, weights) | compare(step, average, received)
        return step, FipaState(hyper, kept), info

    def announce(state: FipaState):
        return {"damping": state.hyper["damping"]} if "damping" in state.hyper else {}

    def withdraws(state: FipaState):
        return solver.withdraws(state.solver)

    needs = solver.needs._replace(spread=spread)
    return Aggregator(init, apply, needs, tuple(numbers), admit, announce, withdraws)


def fipa(
    form: Form = "damped",
    *,
    damping: Number = 1e-3,
    relative: bool = True,
    rcond: Number = 1e-5,
    own_damping: bool = False,
    trust: bool = False,
    limits: Limits = Limits(),
    past: PastRounds = PastRounds(),
    late: LateUpdates = LateUpdates(),
    weighting: Weighting = "examples",
    merge: Merge = "auto",
    spread: Spread | None = None,
) -> Aggregator:
    """Fisher-informed parameterwise aggregation (arXiv 2601.13608, eq. 6): B_m = w_m H^+ H_m, H = sum_m w_m H_m.

    Example:
      rule = fipa("damped", damping=1e-3, past=PastRounds("prior", rank=100))
      state = rule.init(params)
      received, screening = receive(Uploads(delta, num_examples, sketches), params)
      step, state, info, received = step_of(rule, received, state, params, screening)
      params = jax.tree.map(jnp.add, params, step)

    Args:
      form: what becomes of H's eigenvalues: `damped`, the default, `tikhonov`, or `pinv`, the paper's; see below.
      damping: beta. Directions with eigenvalues below it are left to the mean (damped) or not moved (tikhonov).
      relative: whether beta counts in units of H's largest eigenvalue.
      rcond: for pinv, the cut-off of H's eigenvalues relative to the largest.
      own_damping: whether the damped form undoes each client's own damping, `uploads.damping`; see below.
      trust: whether beta follows the clients' losses and a step that raised them is undone, see `trust_region`; for
        rounds in which all clients take part, and a server's learning rate of 1. `damping` is the first round's.
      limits: on the step and on each client, see `limits.limited` and `limits.capped`.
      past: what the server remembers of past rounds, for cohorts that are a small part of all clients.
      late: how late clients count, see below.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      merge: how the clients' sketches are merged, see `merged_curvature.merge`.
      spread: the devices that share the rows of long bases, see `row_blocks`; None where arrays are as they come.

    Returns:
      The rule: (init, apply) and what its clients have to send. `INFO` says what its `info` holds.

    Raises:
      ValueError: an unknown form, weighting, merge or kind of past; trust in a rule without damping or with a past;
        own_damping in another form than the damped one; past.adaptive with a relative damping or without the
        prior; `curvature` without the damped form and an absolute damping above 0; in `apply`, uploads without what
        the rule needs, or of late clients where these are to send gradients.

    **The forms.** With the merged factor F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m [P, D], so that H = F F^T and D = C R,
    and z = [sqrt(w_m) diag(lam_m)^{1/2} U_m^T delta_m]_m [D], so that F z = sum_m w_m H_m delta_m:

        pinv      step = H^+ F z                            the paper's rule; outside span(F) nothing moves
        tikhonov  step = (H + beta I)^{-1} F z              the authors' code steps by gamma beta times this: set the
                                                            server's learning rate to gamma beta
        damped    step = dbar + (H + beta I)^{-1} F z'      z' is z with delta_m - dbar for delta_m, dbar = sum_m w_m
                                                            delta_m. This is B_m = w_m (H + beta I)^{-1} (H_m + beta I),
                                                            so sum_m B_m = I: beta -> inf is FedAvg, beta -> 0 is pinv
                                                            inside span(F), and outside it FedAvg

    All three are one filter on the singular values of F, see `merged_curvature`; nothing of size [P, P] or [P, D]
    exists. With a client's Gauss-Newton steps as local training (`client.second_order.gauss_newton`) it is the mixing
    of FedPM (arXiv 2511.09100). If the clients' Gauss-Newton steps have the damping beta too, delta_m = -(H_m + beta
    I)^{-1} g_m, then the damped form is the centralised Levenberg-Marquardt step, -(H + beta I)^{-1} g, exactly: of a
    sketch of rank R that asks no more than that the eigenvalues it leaves out be small beside beta. `trust` finds such
    a beta round by round.

    **Own damping.** The damped form then takes an update for what it is to the client, (H_m + beta_m I) delta_m = -g_m
    with `uploads.damping` beta_m, 1 / (learning rate x steps) of gradient descent (with momentum what its gradients
    have counted in all; weight decay and a proximal term's mu add to it), so that with the server's beta

        step = (H + beta I)^{-1} sum_m w_m (H_m + beta_m I) delta_m

    is the Levenberg-Marquardt step whatever the local damping: exactly for one Gauss-Newton step, nearly for gradient
    descent. Bounds on the step then count in units of the longest beta_m / beta |delta_m|. Beta must be absolute.

    **Late clients.** With `late.transport` a late client's target, or with `latest` an absent one's, is what it was,
    H_m (delta_m - moved_m) for H_m delta_m: its gradient at the present parameters, by its own curvature, if these have
    moved by moved_m since. That holds for steps which the damped form undoes: matched, natural or with own_damping.
    Otherwise it is a pull back to where the client began. A client beyond `late.max_drift`, moved_m^T H_m moved_m / 2,
    takes no part, as its curvature and gradient are of other parameters.

    This only composes: `from_solver(capped(remembering(limited(damped(...)), prior(...))))` and the like.
    """
    lookup(FORMS, form, "aggregator.form")
    _check(form, damping, relative, own_damping, past)
    options = {"explosion": limits.explosion, "merge": merge, "mesh": spread.mesh if spread else None}
    if form == "pinv":
        solver = alone = solvers.pinv(rcond, **options)
    else:
        options |= {"own_damping": True} if own_damping else {}
        solver = FORMS[form](damping, relative=relative, **options)
        alone = FORMS[form](damping, relative=False, **options)
    seldom = past.kind == "curvature"  # much of it is not known
    solver = limited(solver, max_step=limits.max_step, max_divergence=limits.max_divergence, with_damping=seldom)
    if trust:
        solver = trust_region(solver)
    if past.kind != "none":
        solver = remembering(solver, kind_of(past, alone, late.transport), decay=past.decay)
    if past.adaptive:
        solver = adaptive(solver)
    solver = capped(solver, trace_cap=limits.trace_cap)
    return from_solver(solver, weighting=weighting, late=late, spread=spread is not None)


def fipa_step(
    delta: Params,
    sketch: Sketch,
    num_examples: jax.Array,
    *,
    form: Form = "damped",
    damping: Number = 1e-3,
    relative: bool = True,
    rcond: Number = 1e-5,
    limits: Limits = Limits(),
) -> tuple[Params, Info]:
    """FIPA's step from stacked client results, for use in other people's loops.

    It keeps nothing from call to call. Past rounds, and what asks for more than this of the clients, need `fipa`.

    Example:
      step, info = fipa_step(delta, sketches, jnp.array([50, 50]), form="damped", damping=1e-3)
      params = jax.tree.map(jnp.add, params, step)

    Args:
      delta: the clients' updates, a parameter pytree with a leading clients axis [C, ...].
      sketch: the clients' stacked sketches: eigenvalues [C, R], basis [C, P, R].
      num_examples: [C]; ones for uniform weights.
      form, damping, relative, rcond, limits: see `fipa`; damping, rcond and the bounds on the step may be traced.

    Returns:
      (step, info): the step is a parameter pytree, to be added to the broadcast parameters; for info see
      `screening.receive` and `INFO`.

    Raises:
      ValueError: shapes do not fit, the form is not known, or a number is negative or NaN.
    """
    rule = fipa(form, damping=damping, relative=relative, rcond=rcond, limits=limits)
    if not all(jnp.ndim(leaf) and len(leaf) for leaf in jax.tree.leaves(delta)):
        raise ValueError("delta: needed a leading axis of clients, one at least, in every array")
    like = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], delta)
    received, info = receive(Uploads(delta, jnp.asarray(num_examples), sketch), like)
    step, _, info, _ = step_of(rule, received, rule.init(like), like, info)
    return step, info


FORMS = {"damped": solvers.damped, "pinv": solvers.pinv, "tikhonov": solvers.tikhonov}


def _check(form: Form, damping: Number, relative: bool, own_damping: bool, past: PastRounds) -> None:
    """Refuses, with a ValueError, forms and dampings with which some option cannot work."""
    if own_damping and form != "damped":
        raise ValueError(solvers.OWN_DAMPING)
    contracts.at_least(0, damping=damping)
    undamped = contracts.is_known(damping) and not damping > 0
    if past.kind == "curvature" and (form != "damped" or relative or undamped):
        raise ValueError(
            "aggregator.damping: past.kind = 'curvature' divides gradients by it, it needs form = 'damped', relative = "
            "False and damping above 0"
        )
    if past.adaptive and past.kind != "prior":
        raise ValueError(f"aggregator.past.adaptive: needs past.kind = 'prior', got {past.kind!r}; set it to False")


def _sketch_of(received: Received, solver: Solver) -> Sketch:
    """The clients' sketches, where they have sent all that the solver needs."""
    if not isinstance(received.sketch, Sketch):
        raise ValueError("fipa needs uploads.sketch, a Sketch of eigenvalues [C, R] and basis [C, P, R]")
    if solver.needs.loss and received.loss is None:
        raise ValueError("fipa with trust needs uploads.loss [C], the clients' mean losses before their work")
    if solver.needs.ids and received.ids is None:
        raise ValueError("fipa with past.kind = 'latest' needs uploads.ids [C], who the clients are")
    if solver.needs.gradient and received.age is not None:
        raise ValueError("fipa with past.kind = 'curvature' needs clients that are not late: their gradients are old")
    if solver.needs.damping and received.damping is None:
        raise ValueError("fipa with own_damping needs uploads.damping [C], that of the clients' own steps")
    return received.sketch


def _describe(solution: Solution, sketch: Sketch, weights: jax.Array) -> dict:
    """What the step comes from; of the clients' reports, over those that take part."""
    spectrum, present = solution.factor.spectrum, weights > 0
    info = {
        "effective_rank": jnp.sum(solution.inverse * spectrum),
        "merged_pairs": jnp.sum((sketch.eigenvalues > 0) & present[:, None]),
        "condition": trees.ratio(spectrum[0] + solution.beta, solution.least + solution.beta),
        "spectrum": spectrum,
    }
    if sketch.report is None:
        return info
    report = sketch.report
    share = trees.ratio(jnp.sum(sketch.eigenvalues, axis=1), report.trace)
    return info | {
        "captured": jnp.dot(weights, jnp.where(present, share, 0)),
        "sketch_residual": jnp.max(jnp.where(present[:, None], report.residuals, 0)),
        "sketch_products": jnp.sum(report.products),
        "sketches_unconverged": jnp.sum(present & ~report.converged),
        "flags": report.flags,
    }
