"""FIPA with the clients' curvature layer by layer, H_m ~= diag_l(A_ml x G_ml): FedPM, FedFisher-KFAC, FedLPA, RegMean.

A layer's matrix W [a, g] (a bias is a row of it) has the update delta_m [a, g] and H_m delta = A_m delta G_m, so that

    (sum_m w_m H_m + beta I) step = sum_m w_m (H_m + beta I) delta_m

is a system of its own for each layer, whose weights B_m sum to the identity. What each `kind` takes for G_m:

    foof     the identity: step = (A + beta I)^-1 sum_m w_m (A_m + beta I) delta_m, A = sum_m w_m A_m, of size [a, a].
             FedPM's rule (AAAI 2026, arXiv 2511.09100), whose clients step by the same preconditioner (Benzing 2022)
    kfac     the second moment of the layer's output gradients, by conjugate gradients: a sum of Kronecker products has
             no small inverse. FedFisher's K-FAC form (Jhunjhunwala et al. 2024), FedLPA (Liu et al. 2024)
    regmean  the identity, and the entries of A_m off its diagonal times `shrink` (Jin et al. 2023, eq. 2 and sec. 4),
             once, on models that clients have trained to their end

Parameters of no layer get the mean, in all forms. Under `pinv` and `tikhonov` a layer's step is by its curvature alone,
as for eigenpairs: FIPA's three forms, see `solvers`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import (
    WEIGHTINGS,
    Aggregator,
    Needs,
    Place,
    Weighting,
    compare,
    sound,
    weights_of,
)
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.limits import Limits, median_trace
from fipa_jax.aggregate.past_rounds import PastRounds, check_decay
from fipa_jax.aggregate.screening import Received
from fipa_jax.aggregate.solvers import Form
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.layer_factors import (
    Layer,
    LayerFactors,
    diagonal_of,
    layers_of,
    leaves_of,
    matrix_of,
    unpacked,
)
from fipa_jax.lookup import lookup

LayerKind = Literal["foof", "kfac", "regmean"]  # a name in `KINDS`
FORMS = {"damped": "the mean", "pinv": "nothing", "tikhonov": "nothing"}  # what flat directions get

# What the rule's `info` says, beside that of the screening.
INFO_OF_LAYERS = {
    "capped": "[C] bool, clients whose curvature was scaled down to the cap",
    "damping": "[], beta of the step",
    "divergence": "[], step^T H step / 2 over the layers",
    "fallback": "[] int32, 2 where the mean was taken instead of a step that failed",
    "fedavg_cosine": "[], cosine of the step and FedAvg's",
    "fedavg_norm_ratio": "[], the step's length over FedAvg's",
    "past_share": "[], the weight of past rounds, of one in all",
    "solve_residual": "[], the largest relative residual that conjugate gradients leave of a layer's system",
    "step_ratio": "[], the step's length over the longest client's update",
}


class LayerOptions(NamedTuple):
    """How a rule works layer by layer; the group `aggregator.layers` of a config."""

    kind: LayerKind = "foof"  # see the head of this module
    iterations: int = 50  # kfac: of conjugate gradients for a layer's system, at most
    shrink: float = 0.9  # regmean: what the entries of A_m off its diagonal are multiplied by


class LayerPast(NamedTuple):
    """Past rounds as one more client, whose update is zero: of each layer a decayed mean of A, and one of G."""

    inputs: dict[str, jax.Array]  # {path: [a (a + 1) / 2]}
    outputs: dict[str, jax.Array]  # {path: [g (g + 1) / 2]}, or {}
    weight: jax.Array  # [], of examples or clients; 0 where nothing is remembered


class Block(NamedTuple):
    """One layer, as the M messages see it: the clients', and behind them that of past rounds."""

    weights: jax.Array  # [M], over all of them summing to one
    inputs: jax.Array  # [M, a, a]
    outputs: jax.Array | None  # [M, g, g]; None for the identity
    deltas: jax.Array  # [M, a, g]


class System(NamedTuple):
    """A layer's sum of curvature and what solves with it."""

    block: Block
    values: jax.Array  # [a], eigenvalues of sum_m w_m A_m, ascending
    vectors: jax.Array  # [a, a]
    out_values: jax.Array  # [g], the same of sum_m w_m G_m, all one where it is the identity
    out_vectors: jax.Array | None  # [g, g]
    largest: jax.Array  # [], the largest eigenvalue of sum_m w_m A_m x G_m, for kfac by 20 power steps


def kronecker(
    *,
    layers: LayerOptions = LayerOptions(),
    form: Form = "damped",
    damping: Number = 1e-3,
    relative: bool = True,
    rcond: Number = 1e-5,
    at: Place = "local",
    limits: Limits = Limits(0.0, 0.0, 100.0, 0.0),
    past: PastRounds = PastRounds(),
    late: LateUpdates = LateUpdates(),
    weighting: Weighting = "examples",
) -> Aggregator:
    """The aggregation rule by the clients' Kronecker factors; what its `info` holds says `INFO_OF_LAYERS`.

    Example:
      rule = kronecker(layers=LayerOptions("kfac"), damping=0.01, relative=False)   # for clients' `LayerFactors`

    Args:
      layers: how, see `LayerOptions`.
      form, damping, relative, rcond: see `fisher_informed.fipa`. For kfac `pinv` is `tikhonov` with a damping of
        `rcond` times the largest eigenvalue, as conjugate gradients know no eigenvalues to cut.
      at: where clients see the curvature: `local`, their trained parameters, as published of all three kinds, or
        `broadcast`, those that they have received, as FIPA's own sketches and where they step by it.
      limits: of them all; the step's explosion gives way to the mean.
      past: `none`, or `prior`: decayed sums, which only resist. Those of A are exact; of a sum of A_m x G_m the means
        of A_m and of G_m are kept.
      late: only its staleness counts.
      weighting: `examples` or `uniform`.

    Raises:
      ValueError: a name is not known, or a number out of its range; in `apply`, uploads without layer factors.
    """
    kind = lookup(KINDS, layers.kind, "aggregator.layers.kind")
    _check(layers, form, weighting, past, late.staleness)
    numbers = {"limits.max_step": limits.max_step, "limits.max_divergence": limits.max_divergence}
    numbers |= {"damping": damping, "rcond": rcond, "limits.explosion": limits.explosion}
    numbers |= {"past.decay": past.decay} if past.kind == "prior" else {}
    contracts.at_least(0, **numbers, **{"limits.trace_cap": limits.trace_cap})

    def init(params):
        dtype = trees.ravel(trees.widened(contracts.floating(params, "params"))).dtype
        hyper = {name: jnp.array(value, dtype) for name, value in numbers.items()}
        return hyper, (_nothing_remembered(params, kind.needs_outputs, dtype) if past.kind == "prior" else ())

    def apply(received: Received, state, params):
        if not isinstance(received.sketch, LayerFactors):
            raise ValueError("kronecker needs uploads.sketch, LayerFactors of the clients' layers")
        hyper, remembered = state
        clients, size = weights_of(received, params, weighting, late.staleness)
        with jax.default_matmul_precision("highest"):
            factors, told = _capped(received, clients, kind, layers.shrink, limits.trace_cap)
            weights, scale, told_past = _with_past(clients, size, remembered, hyper)
            deltas = jax.tree.map(lambda leaf: scale * leaf, trees.widened(received.delta))
            systems = _systems(factors, remembered, weights, deltas, params)
            mean = trees.weighted_sum(weights[: len(clients)], deltas)
            beta, floor = _damping(systems, form, relative, kind.needs_outputs, hyper)
            found, residual = _solved(systems, form, beta, floor, layers.iterations)
            step, bounded = _bounded(systems, found, mean, received, hyper)
            remembered = _kept(remembered, factors, weights, size, hyper)
        info = told | told_past | bounded | {"damping": beta, "solve_residual": residual}
        average = trees.weighted_sum(clients, trees.widened(received.delta))  # without what is remembered
        return step, (hyper, remembered), info | compare(step, average, received)

    def announce(state):
        return {"damping": state[0]["damping"]}

    needs = Needs("layers" if kind.needs_outputs else "layer_inputs", at)
    return Aggregator(init, apply, needs, tuple(numbers), announce=announce)


class _Kind(NamedTuple):
    """What a kind takes of the clients' factors."""

    needs_outputs: bool = False
    shrinks: bool = False


KINDS = {"foof": _Kind(), "kfac": _Kind(needs_outputs=True), "regmean": _Kind(shrinks=True)}


def _check(layers: LayerOptions, form: Form, weighting: Weighting, past: PastRounds, staleness: float) -> None:
    """Refuses, with a ValueError, names that are not known and what such a rule cannot do."""
    lookup(FORMS, form, "aggregator.form")
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    contracts.at_least(0, **{"shrink": layers.shrink, "late.staleness": staleness})
    contracts.at_least(1, iterations=layers.iterations)
    if past.kind not in ("none", "prior"):
        raise ValueError(
            f"aggregator.past.kind: 'kronecker' remembers decayed sums, 'prior', or 'none', got {past.kind!r}"
        )
    if past.kind == "prior":
        check_decay(past.decay)
    if past.adaptive:
        raise ValueError("aggregator.past.adaptive: is for the rule 'fipa', not for 'kronecker'; set it to False")


def _nothing_remembered(params: Any, outputs: bool, dtype) -> LayerPast:
    """The past before the first round, of all that may be layers."""

    def blank(axis: int):
        sides = {path: layer.shape[axis] for path, layer in layers_of(params).items()}
        return {path: jnp.zeros([side * (side + 1) // 2], dtype) for path, side in sides.items()}

    return LayerPast(blank(0), blank(1) if outputs else {}, jnp.zeros([], dtype))


def _capped(received: Received, weights, kind: _Kind, shrink: float, cap: float) -> tuple[LayerFactors, dict]:
    """(the factors of those who take part, no client's trace above `cap` times the median; who was scaled down)."""
    factors = trees.widened(trees.zero_unless(received.took_part, received.sketch))
    inputs, outputs = factors.inputs, factors.outputs if kind.needs_outputs else {}
    if kind.shrinks:
        inputs = {path: _shrunk(half, shrink) for path, half in inputs.items()}
    if not cap:
        return LayerFactors(inputs, outputs), {}

    def trace(halves, path):
        return jnp.sum(diagonal_of(halves[path]), axis=-1) if path in halves else jnp.ones([])

    traces = trees.total(trace(inputs, path) * trace(outputs, path) for path in inputs)
    most = cap * median_trace(traces, jnp.where(traces > 0, weights, 0))  # of those who have sent any
    over = traces > most
    factor = jnp.where(over, trees.ratio(most, traces), 1)[:, None]
    return LayerFactors({path: factor * half for path, half in inputs.items()}, outputs), {"capped": over}


def _shrunk(half: jax.Array, shrink: float) -> jax.Array:
    """Packed matrices [C, a (a + 1) / 2] with what is off their diagonals times `shrink`."""
    diagonal = diagonal_of(jnp.arange(half.shape[-1]))
    return (shrink * half).at[:, diagonal].set(half[:, diagonal])


def _with_past(weights, size, past, hyper: dict):
    """(weights [M] of clients and past, what the clients' updates are scaled by, info).

    In the first round the cohort's own curvature stands in for the past's, as in `past_rounds.prior`.
    """
    if past == ():
        return weights, 1.0, {}
    before = hyper["past.decay"] * past.weight
    share = trees.ratio(before, size + before)
    scale = jnp.where(before > 0, 1, 1 - hyper["past.decay"])
    return jnp.append((1 - share) * weights, share), scale, {"past_share": share}


def _systems(factors: LayerFactors, past, weights, deltas, params) -> dict[Layer, System]:
    """Each layer's system, of those that the clients have sent."""
    leaves, layers = trees.paths(deltas), layers_of(params)

    def of_all(halves: dict, remembered: dict, path: str) -> jax.Array:
        rows = halves[path] if past == () else jnp.concatenate([halves[path], remembered[path][None]])
        return jax.vmap(unpacked)(rows)

    found = {}
    for path in factors.inputs:
        layer = layers[path]
        matrices = jax.vmap(lambda one, layer=layer: matrix_of(layer, one))(leaves)
        matrices = matrices if past == () else jnp.pad(matrices, ((0, 1), (0, 0), (0, 0)))
        old = ({}, {}) if past == () else (past.inputs, past.outputs)
        outputs = of_all(factors.outputs, old[1], path) if path in factors.outputs else None
        found[layer] = _system(Block(weights, of_all(factors.inputs, old[0], path), outputs, matrices))
    return found


def _system(block: Block) -> System:
    values, vectors = jnp.linalg.eigh(jnp.einsum("m,mab->ab", block.weights, block.inputs))
    values = jnp.maximum(values, 0)
    if block.outputs is None:
        ones = jnp.ones(block.deltas.shape[-1:], values.dtype)
        return System(block, values, vectors, ones, None, values[-1])
    out_values, out_vectors = jnp.linalg.eigh(jnp.einsum("m,mgh->gh", block.weights, block.outputs))
    start = vectors[:, -1:] * out_vectors[:, -1][None]

    def power(_, pair):
        image = _curved(block, pair[0])
        length = trees.length(image)
        return trees.ratio(image, length), length

    _, largest = jax.lax.fori_loop(0, POWER_STEPS, power, (start, values[-1]))
    return System(block, values, vectors, jnp.maximum(out_values, 0), out_vectors, largest)


POWER_STEPS = 20  # from the means' top eigenvectors, for the largest eigenvalue of a sum of Kronecker products


def _curved(block: Block, matrix: jax.Array) -> jax.Array:
    """[a, g], sum_m w_m A_m X_m G_m of matrices [M, a, g], or of one for all."""
    many = jnp.broadcast_to(matrix, block.deltas.shape)
    if block.outputs is None:
        return jnp.einsum("m,mab,mbg->ag", block.weights, block.inputs, many)
    image = jnp.einsum("mab,mbg->mag", block.inputs, many)
    return jnp.einsum("m,mag,mgh->ah", block.weights, image, block.outputs)


def _damping(systems: dict[Layer, System], form: Form, relative: bool, kfac: bool, hyper: dict):
    """(beta [], the eigenvalue [] up to which nothing is let through)."""
    largest = jnp.max(jnp.stack([system.largest for system in systems.values()]))
    if form == "pinv":
        cut = hyper["rcond"] * largest
        return (cut, jnp.zeros_like(cut)) if kfac else (jnp.zeros_like(cut), cut)
    beta = hyper["damping"] * (largest if relative else 1)
    return beta, jnp.where(beta > 0, 0, 10 * jnp.finfo(largest.dtype).eps * largest)


def _solved(systems: dict[Layer, System], form: Form, beta, floor, iterations: int):
    """({layer: step [a, g]}, the largest relative residual of conjugate gradients [])."""
    found, residuals = {}, [jnp.zeros_like(beta)]
    for layer, system in systems.items():
        block = system.block
        base = jnp.einsum("m,mag->ag", block.weights, block.deltas)
        base = base if form == "damped" else jnp.zeros_like(base)
        pull = _curved(block, block.deltas - base[None])
        solution, residual = _divided(system, pull, beta, floor, iterations)
        found[layer] = base + solution
        residuals.append(residual)
    return found, jnp.max(jnp.stack(residuals))


def _divided(system: System, pull: jax.Array, beta, floor, iterations: int):
    """((H + beta I)^-1 pull [a, g], its relative residual []): by eigenvectors, or conjugate gradients about them."""

    def by_means(matrix):
        """Divides by the Kronecker product of the means, which the sum is where all clients are alike."""
        inside = system.vectors.T @ matrix
        inside = inside if system.out_vectors is None else inside @ system.out_vectors
        curvature = system.values[:, None] * system.out_values[None]
        inside = jnp.where(curvature >= floor, trees.ratio(inside, curvature + beta), 0)
        outside = system.vectors @ inside
        return outside if system.out_vectors is None else outside @ system.out_vectors.T

    if system.block.outputs is None:
        return by_means(pull), jnp.zeros_like(beta)

    def damped(matrix):
        return _curved(system.block, matrix) + beta * matrix

    tolerance = 10 * float(jnp.finfo(pull.dtype).eps)
    solution, _ = jax.scipy.sparse.linalg.cg(damped, pull, tol=tolerance, maxiter=iterations, M=by_means)
    return solution, trees.ratio(trees.length(damped(solution) - pull), trees.length(pull))


def _bounded(systems, found: dict[Layer, jax.Array], mean, received: Received, hyper: dict):
    """(the step in the parameters' tree after its bounds, info)."""
    like, chosen = trees.paths(mean), {}
    for layer, matrix in found.items():
        chosen |= leaves_of(layer, matrix, like)
    full, average = trees.replace(mean, chosen), trees.ravel(mean)
    longest = jnp.max(trees.length(received.deltas, axis=1))
    vector, explosion = trees.ravel(full), hyper["limits.explosion"]
    failed = ~sound(vector, jnp.where(explosion > 0, explosion * longest, jnp.inf))
    full = jax.tree.map(lambda one, other: jnp.where(failed, other, one), full, mean)
    length = trees.length(jnp.where(failed, average, vector))
    leaves = trees.paths(full)
    curve = trees.total(
        jnp.vdot(matrix, _curved(system.block, matrix))
        for matrix, system in ((matrix_of(layer, leaves), system) for layer, system in systems.items())
    )
    most, divergence = hyper["limits.max_step"] * longest, 2 * hyper["limits.max_divergence"]
    by_length = jnp.where((most > 0) & (length > most), trees.ratio(most, length), 1)
    over = (divergence > 0) & (curve > divergence)
    factor = jnp.minimum(by_length, jnp.where(over, trees.root(trees.ratio(divergence, curve)), 1))
    step = jax.tree.map(lambda leaf: factor * leaf, full)
    return step, {"divergence": factor**2 * curve / 2, "fallback": 2 * failed.astype(jnp.int32)}


def _kept(past, factors: LayerFactors, weights, size, hyper: dict):
    """Past and present as one; after a round without anybody it only fades."""
    if past == ():
        return ()

    def joined(old: dict, new: dict):
        both = {path: jnp.concatenate([half, old[path][None]]) for path, half in new.items()}
        return old | {path: jnp.einsum("m,mk->k", weights, rows) for path, rows in both.items()}

    before = hyper["past.decay"] * past.weight
    grown = jnp.where(before > 0, before + size, size / (1 - hyper["past.decay"]))
    after = LayerPast(joined(past.inputs, factors.inputs), joined(past.outputs, factors.outputs), grown)
    faded = past._replace(weight=before)
    return jax.tree.map(lambda new, old: jnp.where(size > 0, new, old), after, faded)
