"""FIPA where the server sees nothing but sums over the clients: no eigenpairs, one message whatever their number.

All clients multiply one common basis Q [P, s], and send their products beside their update. Each number that they send
is linear in the clients, so that a secure sum can carry it (`secure_sum`), and the server's work does not grow with
their number. With Y = sum_m w_m H_m Q, dbar = sum_m w_m delta_m and r = sum_m w_m Q^T H_m delta_m:

    gradient   step = (Hn + beta I)^{-1} u,   Hn = Y (Q^T Y)^+ Y^T <= H (Nystrom),   u = sum_m w_m (-g_m)
    galerkin   step = dbar + Q (Q^T Y + beta I)^{-1} (r - Y^T dbar)

The first is the Levenberg-Marquardt step where the curvature that Q misses is below beta; clients send their gradients
and train nothing. The second is for any local training: the best step in dbar + span(Q) in the norm of H + beta I,
hence never worse than the mean in it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate import trust as trust_lib
from fipa_jax.aggregate.aggregator import Info
from fipa_jax.aggregate.limits import Limits
from fipa_jax.aggregate.past_rounds import PastRounds, check_decay
from fipa_jax.aggregate.secure_sum import check_bits
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.lookup import lookup

SumForm = Literal["galerkin", "gradient"]  # a name in `FORMS`
BasisName = Literal["last", "seed"]  # a name in `BASES`

# What the rule's `info` says, beside that of the screening.
INFO_OF_SUMS = {
    "columns": "[] int32, columns of the common basis that are in use",
    "damping": "[], beta of the step; of the gradient form without trust at least the least eigenvalue seen",
    "divergence": "[], step^T Hn step / 2",
    "effective_rank": "[], sum of lam / (lam + beta) over the eigenvalues seen",
    "fedavg_cosine": "[], cosine of the step and the clients' mean update",
    "fedavg_norm_ratio": "[], the step's length over that of the mean update",
    "gain": "[], actual over predicted decrease of the loss by the last step, where there is a trust region",
    "past_share": "[], the weight of past rounds, of one in all",
    "spectrum": "[s], eigenvalues of Hn, descending",
    "tail": "[], the least eigenvalue seen over beta: far below 1, more columns would change nothing",
    "undone": "[] bool, whether the step takes the last one back, where there is a trust region",
}


class SumOptions(NamedTuple):
    """How a rule works from sums; the group `aggregator.sums` of a config."""

    form: SumForm = "galerkin"  # see the head of this module
    columns: int = 50  # s, of the common basis at most
    fresh: int = 5  # columns drawn anew in each round, where the basis comes from the last sum
    basis: BasisName = "last"  # last: the sum's eigenvectors and fresh columns; seed: all drawn anew
    tail: float = 0.0  # columns are added and dropped so that the least eigenvalue is so large a part of beta; 0: all s
    bits: int = 0  # of a fixed-point sum, see `secure_sum`; 0 for a floating-point one
    seed: int = 0  # of the columns that are drawn


class Row(NamedTuple):
    """What one client adds to the sums, and their total: all entries are linear in the clients."""

    weight: jax.Array  # [], w_m: N_m, or 1
    clients: jax.Array  # [], 1; 0 of one that is refused
    image: jax.Array  # [P, s], w_m H_m Q
    update: jax.Array  # [P], w_m delta_m; in the gradient form w_m (-g_m)
    response: jax.Array  # [s], w_m Q^T H_m delta_m
    loss: jax.Array  # [], w_m times the mean loss at the broadcast parameters; 0 where nobody asks


class Remembered(NamedTuple):
    """Past rounds' curvature, decayed and summed: U diag(lam) U^T, which any new basis can be multiplied by."""

    vectors: jax.Array  # [P, s], orthonormal columns
    values: jax.Array  # [s], its eigenvalues
    weight: jax.Array  # [], of examples or clients; 0 where nothing is remembered


class SumState(NamedTuple):
    """What the server keeps; `basis` and `active` are what it tells the clients."""

    hyper: dict[str, jax.Array]  # {field of `config.fipa.aggregator`: []}, the numbers that are traced
    basis: jax.Array  # [P, s], Q: orthonormal columns, those not in use are zero
    active: jax.Array  # [] int32, columns in use
    round: jax.Array  # [] int32
    past: Any  # Remembered, or ()
    trust: Any  # trust.Trust, or ()


class SumSolver(NamedTuple):
    """The rule as pure functions of one row of sums, for loops of one's own; see `sum_solver`."""

    init: Callable[[jax.Array], SumState]  # theta [P] -> state
    solve: Callable[[Row, SumState], tuple[jax.Array, SumState, Info]]  # (total, state) -> (step [P], state, info)


def row_of(weight: Number, image: jax.Array, update: jax.Array, loss: Number = 0.0) -> Row:
    """What a client sends, to be added up; a contribution that is not finite is refused here: nobody can see it later.

    So is one of which a part, times the weight, is so long that its norm overflows: each of its numbers is below the
    root of the largest one, and sums over any number of clients are finite.

    Example:
      row = row_of(num_examples, image(params, batch, None, basis).values, delta)
      total = jax.tree.map(lambda part: jax.lax.psum(part, "clients"), row)   # within a shard_map

    Args:
      weight: [], w_m, not normalised; one that is not above 0, or not finite, takes no part.
      image: [P, s], H_m Q.
      update: [P], delta_m, or minus the gradient.
      loss: [], the mean loss at the broadcast parameters.

    Returns:
      The row, in the update's precision, float32 at least; all zeros, `clients` too, where it is refused.

    Raises:
      ValueError: the update or the image is not of floating-point numbers, or their shapes do not fit.
    """
    image, update = (contracts.floating(array, name) for array, name in ((image, "image"), (update, "update")))
    if jnp.ndim(update) != 1 or jnp.ndim(image) != 2 or len(image) != len(update):
        raise ValueError(
            f"update: needed shape [P] beside an image [P, s], got {jnp.shape(update)} and {jnp.shape(image)}"
        )
    image, update = trees.widened((image, update))
    weight, loss = jnp.asarray(weight, update.dtype), jnp.asarray(loss, update.dtype)
    with jax.default_matmul_precision("highest"):
        own = image.astype(update.dtype), update, image.T @ update, loss
    row = Row(weight, jnp.ones_like(weight), *(weight * part for part in own))
    sound = (weight > 0) & jnp.all(jnp.isfinite(jnp.stack([trees.length(part) for part in row])))
    return jax.tree.map(lambda part: jnp.where(sound, part, 0), row)


def sum_solver(
    sums: SumOptions = SumOptions(),
    *,
    damping: Number = 1e-3,
    relative: bool = True,
    trust: bool = False,
    limits: Limits = Limits(0.0, 0.0, 0.0, 0.0),
    past: PastRounds = PastRounds(),
) -> SumSolver:
    """The server's part of FIPA from sums, as functions of their total: its work does not grow with the clients.

    Example:
      solver = sum_solver(SumOptions(columns=20), damping=1e-3)
      state = solver.init(theta)
      ...   # each client: row_of(num_examples, image(params, batch, None, state.basis).values, delta), summed
      step, state, info = solver.solve(total, state)

    Args: see `from_sums`.

    Raises:
      ValueError: see `from_sums`; in `init`, theta is not of floating-point numbers; in `solve`, the total is not of
        the columns of the state's basis.
    """
    form = lookup(FORMS, sums.form, "aggregator.sums.form")
    next_basis = lookup(BASES, sums.basis, "aggregator.sums.basis")
    numbers = solver_numbers(damping, limits, past)
    contracts.at_least(0, **numbers, tail=sums.tail, fresh=sums.fresh)
    _check(sums, trust, past)

    def init(theta: jax.Array) -> SumState:
        theta = trees.widened(contracts.floating(theta, "theta"))
        size, columns = theta.size, min(sums.columns, theta.size)
        hyper = {name: jnp.array(value, theta.dtype) for name, value in numbers.items()}
        drawn = _random(sums.seed, 0, (size, columns), theta.dtype)
        blank = jnp.zeros([size, columns], theta.dtype), jnp.zeros([columns], theta.dtype), jnp.zeros([], theta.dtype)
        return SumState(
            hyper,
            jnp.linalg.qr(drawn)[0],
            jnp.int32(columns),
            jnp.int32(0),
            () if past.kind == "none" else Remembered(*blank),
            trust_lib.init(size, theta.dtype) if trust else (),
        )

    def solve(total: Row, state: SumState) -> tuple[jax.Array, SumState, Info]:
        if jnp.shape(total.image) != state.basis.shape:
            needed, got = state.basis.shape, jnp.shape(total.image)
            raise ValueError(f"total.image: needed shape {needed}, that of the state's basis, got {got}")
        with jax.default_matmul_precision("highest"):
            mean, past_state, info = _mean_of(total, state)
            seen = nystrom(mean.image, state.basis)
            largest, least = seen.values[0], _least(seen, state.active)
            beta = state.hyper["damping"] * (largest if relative else 1)
            if sums.form == "gradient" and not trust:
                beta = jnp.maximum(beta, least)
            full = form(mean, seen, state.basis, beta)
            step, curve = _bounded(full, seen, state.hyper["limits.max_divergence"])
            described = _describe(step, total, seen, beta, least, state)
            hyper, judged = state.hyper, ()
            if trust:
                step, hyper, judged, told = _judged(step, curve, mean, total, beta, state)
                described |= told
            active = _columns(seen, beta, state.active, sums)
            basis = next_basis(seen, active, state.round + 1, sums)
            if past.kind != "none":
                past_state = _kept(seen, past_state, total)
        after = SumState(hyper, basis, active, state.round + 1, past_state, judged)
        return step, _unless_empty(total, after, state), info | described

    return SumSolver(init, solve)


def _check(sums: SumOptions, trust: bool, past: PastRounds) -> None:
    """Refuses, with a ValueError, options that do not fit together."""
    check_bits(sums.bits)
    if past.kind != "none":
        check_decay(past.decay)
    if past.adaptive:
        raise ValueError("aggregator.past.adaptive: is for the rule 'fipa', not for 'sums'; set it to False")
    if sums.columns < 1 or sums.fresh > sums.columns:
        raise ValueError(
            f"aggregator.sums.columns: needs 1 or more, and as many as sums.fresh = {sums.fresh}, got {sums.columns}"
        )
    if trust and (sums.form != "gradient" or past.kind != "none"):
        raise ValueError(
            "aggregator.trust: from sums it needs sums.form = 'gradient', whose sums say what a step promises, and no "
            "past rounds"
        )


def solver_numbers(damping: Number, limits: Limits, past: PastRounds) -> dict:
    """{field of `config.fipa.aggregator`: value} of the numbers that are traced."""
    numbers = {"damping": damping, "limits.max_divergence": limits.max_divergence}
    return numbers | ({"past.decay": past.decay} if past.kind != "none" else {})


class Seen(NamedTuple):
    """The curvature that the sums show, Hn = U diag(lam) U^T."""

    values: jax.Array  # [s], descending, not negative
    vectors: jax.Array  # [P, s], orthonormal columns


def nystrom(image: jax.Array, basis: jax.Array) -> Seen:
    """The eigenpairs of Hn = Y (Q^T Y)^+ Y^T, for Y = H Q: below H, and equal to it in the span of Q.

    Stabilised by a shift (Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
    data"): of H + nu I, with nu at the rounding of Y, which is subtracted again. Directions of Q in which the curvature
    is below that are left out.

    Args:
      image: Y [P, s].
      basis: Q [P, s], orthonormal columns; some may be zero.
    """
    eps = jnp.finfo(image.dtype).eps
    shift = 10 * eps * trees.length(image)
    shifted = image + shift * basis
    core = basis.T @ shifted
    values, turn = jnp.linalg.eigh((core + core.T) / 2)
    sound = values > shift / 2
    scale = jnp.where(sound, 1 / jnp.sqrt(jnp.where(sound, values, 1)), 0)
    left, triangle = jnp.linalg.qr(shifted @ (turn * scale[None]))  # Hn + nu I = B B^T, B = left triangle
    inner, roots, _ = jnp.linalg.svd(triangle)
    return Seen(jnp.maximum(roots**2 - shift, 0), left @ inner)


def _by_gradient(mean: Row, seen: Seen, basis: jax.Array, beta: jax.Array) -> jax.Array:
    """(Hn + beta I)^{-1} u; what is outside of the span is projected twice, as its division by beta amplifies."""
    inside = seen.vectors.T @ mean.update
    outside = mean.update - seen.vectors @ inside
    outside -= seen.vectors @ (seen.vectors.T @ outside)
    return seen.vectors @ trees.ratio(inside, seen.values + beta) + trees.ratio(outside, beta)


def _by_galerkin(mean: Row, seen: Seen, basis: jax.Array, beta: jax.Array) -> jax.Array:
    """dbar + Q (Q^T Y + beta I)^{-1} (r - Y^T dbar); a direction of rounding is left to the mean."""
    core = basis.T @ mean.image
    values, turn = jnp.linalg.eigh((core + core.T) / 2)
    floor = 10 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    wanted = turn.T @ (mean.response - mean.image.T @ mean.update)
    found = jnp.where(values > floor, wanted / jnp.where(values > floor, values + beta, 1), 0)
    return mean.update + basis @ (turn @ found)


FORMS = {"galerkin": _by_galerkin, "gradient": _by_gradient}


def _of_last_sum(seen: Seen, active: jax.Array, round: jax.Array, sums: SumOptions) -> jax.Array:
    """The first eigenvectors seen, and fresh columns behind them, which find what the basis has missed."""
    size, columns = seen.vectors.shape
    fresh = min(sums.fresh, columns)
    place, kept = jnp.arange(columns)[None], jnp.maximum(active - fresh, 0)
    drawn = _random(sums.seed, round, (size, columns if sums.tail else fresh), seen.vectors.dtype)
    drawn = jnp.pad(drawn, ((0, 0), (columns - drawn.shape[1], 0)))
    basis = jnp.linalg.qr(jnp.where(place < kept, seen.vectors, drawn))[0]
    return jnp.where(place < active, basis, 0)


def _of_seed(seen: Seen, active: jax.Array, round: jax.Array, sums: SumOptions) -> jax.Array:
    """Random columns that every client could draw by itself from the seed and the round's number."""
    basis = jnp.linalg.qr(_random(sums.seed, round, seen.vectors.shape, seen.vectors.dtype))[0]
    return jnp.where(jnp.arange(basis.shape[1])[None] < active, basis, 0)


BASES = {"last": _of_last_sum, "seed": _of_seed}


def _random(seed: int, round, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), round), shape, dtype)


def _mean_of(total: Row, state: SumState) -> tuple[Row, Any, Info]:
    """(means over clients and past, the past after its decay, what to say of it).

    The past is one more client, with the update zero: it only resists. In the first round the cohort's own curvature
    stands in for it, as in `past_rounds.prior`; but it is not remembered as more than it was, so that the steps of the
    next rounds are longer than there.
    """
    if state.past == ():
        return jax.tree.map(lambda part: trees.ratio(part, total.weight), total), (), {}
    decay = state.hyper["past.decay"]
    past = state.past._replace(weight=decay * state.past.weight)
    again = past.weight * (past.vectors @ (past.values[:, None] * (past.vectors.T @ state.basis)))
    first = jnp.where(past.weight > 0, 1, 1 - decay)
    both = total._replace(
        weight=total.weight + past.weight,
        image=total.image + again,
        update=first * total.update,
        response=first * total.response,
    )
    share = trees.ratio(past.weight, both.weight)
    return jax.tree.map(lambda part: trees.ratio(part, both.weight), both), past, {"past_share": share}


def _kept(seen: Seen, past: Remembered, total: Row) -> Remembered:
    """The past and the present as one."""
    return Remembered(seen.vectors, seen.values, past.weight + total.weight)


def _least(seen: Seen, active: jax.Array) -> jax.Array:
    """[], the least eigenvalue that the columns in use can see."""
    return jnp.take(seen.values, active - 1)


def _columns(seen: Seen, beta: jax.Array, active: jax.Array, sums: SumOptions) -> jax.Array:
    """[] int32: a column for each eigenvalue above `tail` beta, and fresh ones; twice as many if all are."""
    if not sums.tail:
        return active
    above = jnp.sum(seen.values > sums.tail * beta, dtype=jnp.int32)
    wanted = jnp.where(above >= active, 2 * active, above + sums.fresh)
    return jnp.clip(wanted, min(sums.fresh + 1, seen.values.size), seen.values.size)


def _bounded(full: jax.Array, seen: Seen, most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the step with step^T Hn step / 2 at most `most`, or as it is where that is 0; step^T Hn step of it)."""
    curve = jnp.sum(seen.values * (seen.vectors.T @ full) ** 2)
    over = (most > 0) & (curve > 2 * most)
    factor = trees.root(jnp.where(over, trees.ratio(jnp.where(over, 2 * most, 1), curve), 1))
    return jnp.where(over, factor * full, full), factor**2 * curve


def _judged(step, curve, mean: Row, total: Row, beta, state: SumState):
    """(the step to take, hyper, trust, info) of a trust region on the sum of the losses, see `trust`."""
    last, damping, clients = state.trust, state.hyper["damping"], total.clients.astype(jnp.int32)
    predicted = jnp.vdot(mean.update, step) - curve / 2
    verdict = trust_lib.judge(last, mean.loss, damping, clients)
    step, last = trust_lib.follow(last, verdict, mean.loss, damping, step, predicted, clients)
    info = {"gain": verdict.gain, "undone": last.undone}
    return step, state.hyper | {"damping": verdict.damping}, last, info


def _describe(step, total: Row, seen: Seen, beta, least, state: SumState) -> Info:
    average = trees.ratio(total.update, total.weight)
    length, other = trees.length(step), trees.length(average)
    return {
        "columns": state.active,
        "damping": beta,
        "divergence": jnp.sum(seen.values * (seen.vectors.T @ step) ** 2) / 2,
        "effective_rank": jnp.sum(trees.ratio(seen.values, seen.values + beta)),
        "fedavg_cosine": trees.ratio(jnp.vdot(step, average), length * other),
        "fedavg_norm_ratio": trees.ratio(length, other),
        "spectrum": seen.values,
        "tail": trees.ratio(least, beta),
    }


def _unless_empty(total: Row, after: SumState, before: SumState) -> SumState:
    """The state after a round in which somebody took part, else that before."""
    there = total.weight > 0
    return jax.tree.map(lambda new, old: jnp.where(there, new, old), after, before)
