"""How do many sketches become one? By the factor F of H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m   [P, D], D = C R

What each direction is multiplied by, such as the pseudo-inverse, is a filter of H's eigenvalues: see `solvers`.
F itself is never held: `merge` passes over blocks of its rows, factorises F^T F = V diag(lam) V^T and projects the
updates; `solve`, `quadratic` and `top` pass over them once more. Beside the uploads only one block is alive. Sketches
of several ranks, such as the clients' and those of past rounds, stand side by side in F as `Part`s.

All but `top` has derivatives, in what the parts hold and in the filter: those of functions of F^T F, which have no
eigenvector in them and so are right where eigenvalues coincide.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fipa_jax import backend
from fipa_jax.aggregate.factorisations import METHODS, arithmetic, dot, dot_all, whole
from fipa_jax.aggregate.row_blocks import map_rows, over_row_blocks, reduce_rows, row_block, segments_of
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.derivatives import refusing, vary_with, with_derivative_of
from fipa_jax.lookup import lookup
from fipa_jax.trees import root, total

Merge = Literal["auto", "gram", "qr", "tsqr"]  # how F^T F is factorised: a name in `METHODS`, or as `choose` says
BLOCK = 2**22  # entries of F in one block of rows
ROUNDING = 10.0  # singular values of F below so many eps of the largest are noise of the data
DOUBLE = ("cpu", "cuda", "gpu", "rocm")  # backends with float64 arithmetic


class Part(NamedTuple):
    """Sketches of one rank, and what each one's curvature is applied to: deltas - base - moved."""

    weights: jax.Array  # [C]; one of weight 0 may hold anything, NaN included
    sketch: Sketch  # eigenvalues [C, R], basis [C, P, R] in any floating-point dtype
    deltas: jax.Array  # [C, P]; of weight 0 too it must be finite
    moved: jax.Array | None = None  # [C, P]; None for zero


class Filter(NamedTuple):
    """What each direction is multiplied by: 1 / (lam + shift) where the eigenvalue lam of H is above least, else 0."""

    shift: jax.Array | float  # []
    least: jax.Array | float  # []

    def of(self, eigenvalues: jax.Array) -> jax.Array:
        """[D], of eigenvalues [D]."""
        keep = (eigenvalues > self.least) & ~(eigenvalues + self.shift <= 0)  # a shift of NaN must show
        return jnp.where(keep, 1 / jnp.where(keep, eigenvalues + self.shift, 1), 0)

    def with_noise(self) -> "Filter":
        """Without the floor, if it is shifted: a direction of noise adds nothing, but what it turns into does."""
        return self._replace(least=jnp.where(self.shift > 0, -1, self.least))

    def slopes(self, eigenvalues: jax.Array) -> jax.Array:
        """[D, D], (f(lam_i) - f(lam_j)) / (lam_i - lam_j), and f'(lam_i) where they coincide."""
        values = self.of(eigenvalues)
        # Of two that pass it is -f(lam_i) f(lam_j), however near they are; one that does not is on the other side.
        mixed = (values[:, None] > 0) != (values[None] > 0)
        gaps = jnp.where(mixed, eigenvalues[:, None] - eigenvalues[None], 1)
        return jnp.where(mixed, (values[:, None] - values[None]) / gaps, -values[:, None] * values[None])


class Noise(NamedTuple):
    """Shares of H's largest eigenvalue below which there is only rounding.

    F comes with an error of eps of its largest singular value; eigenvalues of F^T F, formed, have one of eps of theirs.
    """

    direction: float  # of the direction F v, by the arithmetic
    eigenvalue: float  # of the eigenvalue, by the arithmetic and the way of factorising
    data: float  # of the direction, if what stands in F was itself rounded to the precision of the updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """F by its blocks of columns, and its singular value decomposition F = U diag(lam)^{1/2} V^T without U.

    A pytree of arrays, which can leave a jit.
    """

    bases: list  # of each part [C, P, R], as they came
    scales: list  # of each part [C, R], sqrt(w_m lam_m)
    ways: list  # of each part its (deltas, moved), as they came
    base: jax.Array | None  # [P], what the targets are seen from and `solve` adds
    eigenvalues: jax.Array  # [D], descending: H's, the squares of F's singular values; float64 where there is any
    right: jax.Array  # [D, D], V^T
    projected: jax.Array  # [D], V^T F^T targets
    length: int = dataclasses.field(metadata={"static": True})  # rows in a block of a pass over F
    squared: bool = dataclasses.field(metadata={"static": True})  # whether they are of F^T F, formed
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})  # see `merge`

    @property
    def spectrum(self) -> jax.Array:
        """[D], the eigenvalues in the precision of the updates."""

        def value(factor: Factor):
            return factor.eigenvalues.astype(factor.scales[0].dtype)

        def smooth(factor: Factor):  # v^T (F^T F) v
            turned = dot_all(dot_all(factor.right, _products(factor)[0]), factor.right.T)
            return jnp.diag(turned).astype(factor.scales[0].dtype)

        return with_derivative_of(smooth, value, self._scope)(self)

    @property
    def noise(self) -> "Noise":
        """What of the spectrum is rounding."""
        given, wide = (float(jnp.finfo(array.dtype).eps) for array in (self.scales[0], self.right))
        width = self.eigenvalues.size
        direction = (wide * width) ** 2
        return Noise(direction, max(direction, wide * width if self.squared else 0.0), (given * width) ** 2)

    def _scope(self):
        return arithmetic(self.right.dtype)


def merge(
    parts: Sequence[Part], method: Merge = "auto", base: jax.Array | None = None, mesh: Mesh | None = None
) -> Factor:
    """Factorises the merged curvature, in float64 arithmetic where the device has it.

    With nearly collinear clients the entries of F c cancel to eps / beta of their size, and the rounding of z is
    amplified as much: in float32 alone steps are off by 1e-4. The uploads are read in their own precision all the same,
    and the step has that of the weights.

    Args:
      parts: what stands side by side in F; D is the sum of their C R.
      base: [P], see `Part`; None for zero.
      method: how F^T F is factorised, `auto` picks by `choose`. `qr`: the triangle of F at once (the paper's merge).
        `tsqr`: the triangle of each block stacked on the one before. `gram`: F^T F summed over blocks.
      mesh: devices that share the rows, where there are enough of them: see `row_blocks`.

    Raises:
      ValueError: the method is not known.
    """
    check(method)
    dtype, bases = parts[0].weights.dtype, [part.sketch.basis for part in parts]
    scales, ways = [_scale(part, dtype) for part in parts], [(part.deltas, part.moved) for part in parts]
    size, width = bases[0].shape[1], sum(scale.size for scale in scales)
    if method == "auto":
        method = choose(size, width, dtype, backend.kind())
    rows = size // segments_of(size)
    length = rows if method == "qr" else min(rows, max(BLOCK // width, 2 * width))
    wide = jnp.float64 if backend.kind() in DOUBLE else dtype
    # The decomposition has no derivatives; `solve` and the others have, from the parts alone.
    fixed = jax.lax.stop_gradient((bases, scales, ways, base))

    with arithmetic(wide):
        reduced, projected = _pass(*fixed, Reading(length, wide, method, mesh))
        eigenvalues, right = METHODS[method].factorise(reduced)
        found = eigenvalues, right, dot(right, projected)
        return Factor(bases, scales, ways, base, *found, length, method == "gram", mesh)


def solve(factor: Factor, inverse: Filter) -> jax.Array:
    """base + F V diag(inverse(lam)) V^T F^T targets [P]: a function of H applied to sum_m w_m H_m targets_m / lam."""

    def value(factor: Factor, inverse: Filter):
        return combine(factor, dot(factor.right.T, inverse.of(factor.eigenvalues) * factor.projected))

    def smooth(factor: Factor, inverse: Filter):
        coefficients = _filtered(*_products(factor), inverse, factor.eigenvalues, factor.right)
        return combine(factor, coefficients, each_by_itself=True)

    return with_derivative_of(smooth, value, factor._scope)(factor, Filter(*map(jnp.asarray, inverse)))


def quadratic(factor: Factor, vector: jax.Array) -> jax.Array:
    """vector^T H vector [] of a vector [P]."""

    def value(factor: Factor, vector, each_by_itself=False):
        return total(jnp.sum(part**2) for part in image(factor, vector, each_by_itself)).astype(factor.scales[0].dtype)

    smooth = functools.partial(value, each_by_itself=True)
    return with_derivative_of(smooth, value, factor._scope)(factor, vector)


def image(factor: Factor, vector: jax.Array, each_by_itself: bool = False) -> list:
    """F^T vector, of each part [C, R], within `arithmetic`."""
    wide, length = factor.right.dtype, factor.length

    def read(scales, rows):
        def visit(rows, start, total):
            bases, vector = rows
            begin, blocks = _blocks(bases, scales, length, start, wide)
            part = jax.lax.dynamic_slice_in_dim(vector, begin, length).astype(wide)
            along = [jax.lax.dot_general(block, part, (((1,), (0,)), ((), ()))) for block in blocks]
            return _added(total, along)

        blank = vary_with([jnp.zeros(scale.shape, wide) for scale in scales], scales, rows)
        return over_row_blocks(rows, length, visit, blank, each_by_itself)

    return reduce_rows(factor.scales, (factor.bases, vector), read, _added, factor.mesh)


def top(factor: Factor, rank: int) -> Sketch:
    """The first `rank` eigenpairs of H: eigenvalues [rank], basis [P, rank]; pairs beyond D, or of noise, are zero.

    Raises:
      TypeError: on differentiation, as eigenvectors are not differentiable where eigenvalues coincide.
    """

    def value(factor: Factor):
        dtype = factor.scales[0].dtype
        with factor._scope():
            kept = min(rank, factor.eigenvalues.size)
            values = factor.eigenvalues[:kept]
            # F V lam^{-1/2}. What is at rounding level beside the largest has no direction.
            floor = max((ROUNDING * jnp.finfo(dtype).eps) ** 2, factor.noise.eigenvalue)
            sound = values > floor * factor.eigenvalues[0]
            scaled = factor.right[:kept].T * jnp.where(sound, 1 / jnp.sqrt(jnp.where(sound, values, 1)), 0)[None]

            def rows_of(scaled, base, blocks):
                return dot_all(_side_by_side(blocks), scaled)

            basis = _fill_rows(factor, rows_of, (kept,), scaled)
            values = jnp.where(sound, values, 0).astype(dtype)
            pad = rank - kept
            return Sketch(jnp.pad(values, (0, pad)), jnp.pad(basis, ((0, 0), (0, pad))))

    blind = dataclasses.replace(factor, ways=jax.lax.stop_gradient(factor.ways), base=None)
    return refusing(value, NO_PAIRS)(blind)


NO_PAIRS = (
    "aggregator.past: what is remembered of a round's curvature, its eigenvectors, has no derivative in the sketches "
    "and num_examples; apply jax.lax.stop_gradient to these, or to the rule's new state"
)


def check(method: str) -> None:
    """Refuses a method of `merge` that is not known, with a ValueError."""
    lookup({"auto": choose} | METHODS, method, "aggregator.merge")


def choose(size: int, width: int, dtype, device: str) -> Literal["gram", "qr", "tsqr"]:
    """The rule of `auto`, for F [P, D].

    `gram` for float32 on devices with float64: its error, that of float64's square root, is below float32's rounding,
    and it runs at a product's speed. Otherwise, as a Gram matrix would lose half of the digits, `qr` where that takes a
    fraction of a second, and `tsqr` for more. (A Gram matrix summed with compensation would not do on devices without
    float64: its eigenvalues too would have to be found in more than float32.)
    """
    if dtype == jnp.float32 and device in DOUBLE:
        return "gram"
    return "qr" if size * width**2 <= 2**30 else "tsqr"


def _blocks(bases: list, scales: list, length: int, start: jax.Array, wide) -> tuple[jax.Array, list]:
    """(first row, rows [C, b, R] of each part's columns of F); what the last block repeats is zero."""
    begin, new = row_block(bases[0].shape[1], length, start)

    def rows(basis, scale):
        part = jax.lax.dynamic_slice_in_dim(basis, begin, length, axis=1).astype(wide)
        counts = new[None, :, None] & (scale > 0)[:, None, :]
        # Both before the product, as its derivative would be NaN where one of them is.
        return jnp.where(counts, part, 0) * jnp.where(scale > 0, scale, 0).astype(wide)[:, None, :]

    return begin, list(map(rows, bases, scales))


class Reading(NamedTuple):
    """How F is read; static."""

    length: int  # rows in a block
    wide: Any  # dtype of the arithmetic
    method: str  # a name in `METHODS`
    mesh: Mesh | None
    each_by_itself: bool = False  # see `over_row_blocks`


def _pass(bases: list, scales: list, ways: list, base, how: Reading):
    """(the sum of F's blocks by `METHODS` [D, D], F^T targets [D])."""
    add, join, _ = METHODS[how.method]
    width = sum(scale.size for scale in scales)

    def read(scales, rows):
        def visit(rows, start, carry):
            bases, ways, base = rows
            reduced, projected = carry
            begin, blocks = _blocks(bases, scales, how.length, start, how.wide)
            targets = [_targets(way, base, begin, how.length, how.wide) for way in ways]
            return add(reduced, _side_by_side(blocks)), _added(projected, map(_along, blocks, targets))

        blank = jnp.zeros([width, width], how.wide), [jnp.zeros(scale.shape, how.wide) for scale in scales]
        return over_row_blocks(rows, how.length, visit, vary_with(blank, scales, rows), how.each_by_itself)

    def joined(one, other):
        return join(one[0], other[0]), _added(one[1], other[1])

    reduced, projected = reduce_rows(scales, (bases, ways, base), read, joined, how.mesh)
    return reduced, jnp.concatenate([part.reshape(-1) for part in projected])


def _added(one: Iterable, other: Iterable) -> list:
    return [first + second for first, second in zip(one, other, strict=True)]


def _targets(way: tuple, base, begin: jax.Array, length: int, wide) -> jax.Array:
    """[C, b], deltas - base - moved of a block of rows."""

    def rows(array):
        return jax.lax.dynamic_slice_in_dim(array, begin, length, axis=-1).astype(wide)

    deltas, moved = way
    seen = rows(deltas) if base is None else rows(deltas) - rows(base)[None]
    return seen if moved is None else seen - rows(moved)


def _products(factor: Factor) -> tuple[jax.Array, jax.Array]:
    """(F^T F [D, D], F^T targets [D]), of which derivatives can be taken."""
    how = Reading(factor.length, factor.right.dtype, "gram", factor.mesh, each_by_itself=True)
    gram, projected = _pass(factor.bases, factor.scales, factor.ways, factor.base, how)
    return whole(gram), projected


@jax.custom_jvp
def _filtered(gram, projected, inverse: Filter, eigenvalues, right) -> jax.Array:
    """f(G) z [D], for the filter f, G = F^T F = V diag(lam) V^T and z = F^T targets."""
    return dot(right.T, inverse.with_noise().of(eigenvalues) * dot(right, projected))


@_filtered.defjvp
def _filtered_jvp(given, tangents):
    """By Daleckii and Krein: d f(G) = V (slopes * V^T dG V) V^T, without the eigenvectors' own derivatives."""
    _, projected, inverse, eigenvalues, right = given
    every, turned = inverse.with_noise(), dot(right, projected)
    turn = every.slopes(eigenvalues) * dot_all(dot_all(right, tangents[0]), right.T)
    moved = dot(turn, turned) + every.of(eigenvalues) * dot(right, tangents[1])
    moved -= tangents[2].shift * inverse.of(eigenvalues) ** 2 * turned
    return _filtered(*given), dot(right.T, moved)


def combine(factor: Factor, coefficients: jax.Array, each_by_itself: bool = False) -> jax.Array:
    """base + F coefficients [P], rounded once: where the base is large, they cancel."""
    edges = np.cumsum([0, *(scale.size for scale in factor.scales)])
    of_part = [
        coefficients[a:b].reshape(scale.shape) for a, b, scale in zip(edges, edges[1:], factor.scales, strict=False)
    ]

    def rows_of(of_part, base, blocks):
        products = [
            jax.lax.dot_general(rows, c, (((0, 2), (0, 1)), ((), ()))) for rows, c in zip(blocks, of_part, strict=True)
        ]
        return total(products if base is None else [*products, base])

    return _fill_rows(factor, rows_of, (), of_part, factor.base, each_by_itself)


def _fill_rows(
    factor: Factor, rows_of: Callable, trailing: tuple, common: Any, base: Any = None, each_by_itself: bool = False
) -> jax.Array:
    """[P, *trailing] in the updates' precision: of each block rows_of(common, the base's part, rows of F)."""
    length, dtype, wide = factor.length, factor.scales[0].dtype, factor.right.dtype

    def read(common, rows):
        scales, given = common
        size = rows[0][0].shape[1]

        def visit(rows, start, filled):
            bases, base = rows
            begin, blocks = _blocks(bases, scales, length, start, wide)
            part = None if base is None else jax.lax.dynamic_slice_in_dim(base, begin, length).astype(wide)
            new = rows_of(given, part, blocks)
            # The rows that the last block repeats are zero in it: they must not be written.
            old = jax.lax.dynamic_slice_in_dim(filled, begin, length)
            fresh = row_block(size, length, start)[1].reshape(-1, *[1] * (new.ndim - 1))
            return jax.lax.dynamic_update_slice_in_dim(filled, jnp.where(fresh, new.astype(dtype), old), begin, 0)

        blank = vary_with(jnp.zeros([size, *trailing], dtype), common, rows)
        return over_row_blocks(rows, length, visit, blank, each_by_itself)

    return map_rows((factor.scales, common), (factor.bases, base), read, factor.mesh)


def _scale(part: Part, dtype) -> jax.Array:
    """sqrt(w_m lam_m) [C, R]."""
    eigenvalues = part.sketch.eigenvalues.astype(dtype)
    # A zero eigenvalue may come out of a solver as a slightly negative one.
    eigenvalues = jnp.where(part.weights[:, None] > 0, jnp.maximum(eigenvalues, 0), 0)
    return root(part.weights[:, None] * eigenvalues)


def _along(rows: jax.Array, target: jax.Array) -> jax.Array:
    """[C, R]: each client's rows [C, b, R] times its target [C, b]."""
    return jax.lax.dot_general(rows, target, (((1,), (1,)), ((0,), (0,))))


def _side_by_side(blocks: list) -> jax.Array:
    """[b, D], a block of F."""
    return jnp.concatenate([jnp.transpose(rows, (1, 0, 2)).reshape(rows.shape[1], -1) for rows in blocks], axis=1)
