"""Which uploads may take part? They are looked at once, before every rule; each reason to leave one out has a name.

What is checked are faults, not attacks: a client that is broken shows itself here, one that lies within the bounds of
what a sound client could send does not, and only the caps (`limits`) bound what it can do.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fipa_jax import trees
from fipa_jax.aggregate.row_blocks import over_row_blocks, reduce_rows, row_block, segments_of, size_of
from fipa_jax.aggregate.uploads import Message, Uploads, fitting
from fipa_jax.curvature import few_bits
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors, diagonal_of
from fipa_jax.curvature.sketch import Diagonal, Sketch
from fipa_jax.derivatives import vary_with

# Why a client is left out, in words.
REASONS = {
    "update_not_finite": "its update is not finite, or so long that the norm overflows",
    "sketch_not_finite": "its sketch is not finite",
    "curvature_negative": "its curvature has negative eigenvalues beyond rounding",
    "basis_not_orthonormal": "the columns of its sketch's basis are not orthonormal",
    "loss_not_finite": "its loss at the broadcast parameters is not finite",
    "damping_invalid": "the damping of its own steps is negative or not finite",
    "examples_invalid": "its number of examples is negative, not finite or too large to be one",
    "start_invalid": "its age is negative, or the way of the parameters since it started is not finite",
    "id_unknown": "its id is that of no client",
    "id_repeated": "its id is that of a client before it in the same round",
}
# A basis that was rounded to bfloat16 on its way is off by less than 0.01, a column that is sent twice by 1.
ORTHONORMAL = 0.05  # bound on the entries of |U^T U v - v|, v random signs
# What few bits add to it: so many standard deviations, but never so much that a column sent twice would pass.
DEVIATIONS, LOOSEST = 6, 0.5
BLOCK = 2**20  # entries of the bases that are looked at together


class Received(NamedTuple):
    """A round's uploads after screening, as a rule gets them; fields are those of `Uploads`, in float32 at least.

    Who takes no part has 0 for its number of examples, its update and all else but the ids and the sketch, so that a
    sum over all clients is one over those that do. Sketches are not zeroed, which would copy all of them: a rule reads
    those of `took_part` alone.
    """

    took_part: jax.Array  # [C] bool
    num_examples: jax.Array  # [C]
    delta: Any  # parameter pytree [C, ...]
    sketch: Message = None
    loss: jax.Array | None = None  # [C]
    damping: jax.Array | None = None  # [C]
    ids: jax.Array | None = None  # [C] int32
    age: jax.Array | None = None  # [C] int32
    moved: Any = None  # parameter pytree [C, ...]

    @property
    def deltas(self) -> jax.Array:
        """[C, P], the updates as rows."""
        return trees.ravel_stacked(self.delta)

    def only(self, keep: jax.Array) -> "Received":
        """The same with only those of `keep` [C] bool taking part."""
        took_part = self.took_part & keep
        zeroed = {name: getattr(self, name) for name in ("num_examples", "delta", "loss", "damping", "age", "moved")}
        # None, for what is absent, is a tree without leaves.
        return self._replace(took_part=took_part, **trees.zero_unless(took_part, zeroed))


def receive(uploads: Uploads, params: Any, mesh: Mesh | None = None, bits: int = 0) -> tuple[Received, dict]:
    """Checks shapes, and leaves out the clients that must not take part: without examples, or at fault.

    Args:
      uploads: of C clients, see `Uploads`.
      params: parameter pytree, whose tree and shapes the updates must have.
      mesh: devices that share the rows of long bases, see `row_blocks`.
      bits: of an entry of a sketch's basis as it was sent, see `curvature.few_bits`; 0 for floating point. Vectors that
        were rounded to few are less orthogonal.

    Returns:
      (received, info with `rejected` [C] bool, those at fault, `reasons` {name in `REASONS`: [C] bool}, and `absent`
      [C] bool, those with 0 examples, which is no fault).

    Raises:
      ValueError: shapes do not fit, or there are no such bits.

    Example:
      received, info = receive(Uploads(delta, num_examples), params)
      weights = received.num_examples / jnp.sum(received.num_examples)
      step = trees.weighted_sum(weights, received.delta)
    """
    if bits:
        few_bits.check(bits, "bits")
    uploads = fitting(uploads, params)
    num_examples = uploads.num_examples
    present = num_examples != 0  # NaN is not 0
    reasons = {name: present & fault for name, fault in _faults(uploads, num_examples, mesh, bits).items()}
    rejected = jnp.any(jnp.stack(list(reasons.values())), axis=0)
    received = Received(took_part=jnp.ones_like(present), **uploads._asdict()).only(present & ~rejected)
    return received, {"rejected": rejected, "reasons": reasons, "absent": ~present}


def without_place(received: Received, num_clients: int) -> tuple[Received, dict]:
    """Leaves out who has no place of its own, for a rule that keeps one for each of so many clients.

    Returns:
      (received, info with `reasons` {"id_unknown": [C] bool, "id_repeated": [C] bool}); all as it was, and no info,
      where there are no ids.
    """
    if received.ids is None or not num_clients:
        return received, {}
    ids, present = received.ids, received.took_part
    unknown = present & ~((ids >= 0) & (ids < num_clients))
    first = (
        jnp.full([num_clients], ids.size)
        .at[jnp.where(present & ~unknown, ids, num_clients)]
        .min(jnp.arange(ids.size), mode="drop")
    )
    repeated = present & ~unknown & (first[jnp.clip(ids, 0, num_clients - 1)] < jnp.arange(ids.size))
    return received.only(~(unknown | repeated)), {"reasons": {"id_unknown": unknown, "id_repeated": repeated}}


def with_refused(info: dict, refused: dict) -> dict:
    """The info of a screening, with what a rule says of the clients that it has left out besides.

    Args:
      refused: as `Aggregator.admit` says; of `reasons` {name in `REASONS`: [C] bool}, those that it adds.
    """
    if "reasons" not in refused:
        return info | refused
    before, rejected = info.get("reasons", {}), jnp.any(jnp.stack(list(refused["reasons"].values())), axis=0)
    added = {name: clients | before.get(name, False) for name, clients in refused["reasons"].items()}
    return info | refused | {"reasons": before | added, "rejected": rejected | info.get("rejected", False)}


def _faults(uploads: Uploads, num_examples: jax.Array, mesh: Mesh | None, bits: int) -> dict[str, jax.Array]:
    """{name in `REASONS`: [C] bool}, of present and absent clients alike."""
    dtype = jnp.result_type(*jax.tree.leaves(uploads.delta))
    most = _most(dtype, num_examples.size)
    # The norm as well as the entries: it can overflow where no entry does, and the step would.
    lengths = jax.vmap(optax.tree.norm)(uploads.delta)
    faults = dict.fromkeys(REASONS, jnp.zeros(num_examples.shape, bool)) | {
        "update_not_finite": ~jnp.isfinite(lengths),
        "examples_invalid": ~((num_examples >= 0) & (num_examples <= most)),
    }
    faults |= _faults_of_curvature(uploads.sketch, mesh, bits)
    if uploads.loss is not None:
        faults["loss_not_finite"] = ~jnp.isfinite(uploads.loss)
    if uploads.age is not None:
        faults["start_invalid"] = ~((uploads.age >= 0) & jnp.isfinite(uploads.age))
    if uploads.moved is not None:
        faults["start_invalid"] |= ~trees.is_finite(uploads.moved)
    if uploads.damping is not None:
        faults["damping_invalid"] = ~((uploads.damping >= 0) & jnp.isfinite(uploads.damping))
    return faults


def _faults_of_curvature(sketch: Message, mesh: Mesh | None, bits: int) -> dict[str, jax.Array]:
    if isinstance(sketch, Diagonal):
        return {
            "sketch_not_finite": ~trees.is_finite(sketch.values),
            "curvature_negative": _negative(sketch.values),
        }
    if isinstance(sketch, Image):  # what the client itself must refuse to send, as nobody sees it in a sum
        return {"sketch_not_finite": ~trees.is_finite(sketch.values)}
    if isinstance(sketch, Core):
        return {
            "sketch_not_finite": ~_is_summable(sketch.values),
            "curvature_negative": _indefinite(sketch.values),
        }
    if isinstance(sketch, LayerFactors):
        diagonals = [diagonal_of(half) for halves in sketch for half in halves.values()]
        return {
            "sketch_not_finite": ~trees.is_finite(sketch),
            "curvature_negative": jnp.any(jnp.stack([_negative(values) for values in diagonals]), axis=0),
        }
    if not isinstance(sketch, Sketch):
        return {}
    finite, distance = orthonormality(sketch, mesh)
    _, size, rank = sketch.basis.shape
    finite &= trees.is_finite(sketch.eigenvalues)
    if sketch.report is not None:
        finite &= ~sketch.report.flags["not_finite"]
    return {
        "sketch_not_finite": ~finite,
        "curvature_negative": _negative(sketch.eigenvalues),
        "basis_not_orthonormal": finite & ~(distance <= most_distance(size, rank, bits)),
    }


def _negative(values: jax.Array) -> jax.Array:
    """[C] bool: values [C, n] below zero by more than rounding, beside the client's largest, can explain."""
    tolerance = jnp.sqrt(jnp.finfo(values.dtype).eps)
    return jnp.min(values, axis=1) < -tolerance * jnp.max(values, axis=1)


def _most(dtype: Any, clients: int) -> jax.Array:
    """[], above which a sum over clients could overflow, over rounds too."""
    return jnp.sqrt(jnp.finfo(dtype).max) / clients


def _is_summable(values: jax.Array) -> jax.Array:
    """[C] bool: finite, and so small that sums of values [C, ...] over clients and rounds are too."""
    largest = jnp.max(jnp.abs(values), axis=tuple(range(1, values.ndim)))
    return largest <= _most(values.dtype, values.shape[0])  # False for NaN


def _indefinite(cores: jax.Array) -> jax.Array:
    """[C] bool: whether symmetric matrices [C, s, s] without a negative eigenvalue cannot have such entries.

    In those |M_ij| <= sqrt(M_ii M_jj); the rounding of few bits may take it 2 % beyond.
    """
    diagonal = jnp.diagonal(cores, axis1=1, axis2=2)
    lengths = jnp.sqrt(jnp.maximum(diagonal, 0))
    most = 1.02 * lengths[:, :, None] * lengths[:, None]
    rounding = jnp.sqrt(jnp.finfo(cores.dtype).eps) * jnp.max(diagonal, axis=1)
    return _negative(diagonal) | jnp.any(jnp.abs(cores) > most + rounding[:, None, None], axis=(1, 2))


def most_distance(size: int, rank: int, bits: int = 0) -> float:
    """What `orthonormality` may find of a basis [P, R] whose entries were sent in so many bits; 0 for floating point.

    Rounding at random adds to each vector one of length e = sqrt(1/6) 3 / l, where the largest entry of a block is
    three times the usual one, l = 2^(bits - 1) - 1. So U^T U has entries of e sqrt(2 / P) off its diagonal, and R of
    them, with random signs, add up to sqrt(3 R / P) / l.
    """
    if not bits:
        return ORTHONORMAL
    return min(ORTHONORMAL + DEVIATIONS * math.sqrt(3 * rank / size) / few_bits.levels_of(bits), LOOSEST)


def orthonormality(sketch: Sketch, mesh: Mesh | None = None) -> tuple[jax.Array, jax.Array]:
    """(finite [C] bool, distance [C]): whether the bases [C, P, R] are finite, and max_i |(U^T U - I) v|_i.

    One probe v of random signs, on the pairs that are kept: a column of length 1 + a gives 2 a, one that is sent twice
    gives 1, a sound basis its rounding. The bases are read once, block by block of rows: U^T U v = sum_b U_b^T U_b v.
    """
    clients, size, rank = sketch.basis.shape
    dtype = jnp.promote_types(sketch.basis.dtype, jnp.float32)
    signs = np.random.default_rng(0).choice([-1, 1], rank)  # the same in every round
    kept = sketch.eigenvalues > 0
    probe = jnp.where(kept, jnp.asarray(signs, dtype)[None], 0)
    length = min(size // segments_of(size), max(BLOCK // (clients * rank), 1))

    def read(probe, rows):
        def look(bases, start, carry):
            finite, image = carry
            begin, new = row_block(size_of(bases), length, start)
            part = jax.lax.dynamic_slice_in_dim(bases[0], begin, length, axis=1).astype(dtype)
            rows = jnp.einsum("cbr,cr->cb", part, probe, precision="highest")
            finite &= jnp.all(jnp.isfinite(rows), axis=1)  # not where an entry is not, also of a pair left out
            rows = jnp.where(new[None], rows, 0)  # the last block repeats some
            return finite, image + jnp.einsum("cbr,cb->cr", part, rows, precision="highest")

        blank = vary_with((jnp.ones([clients], bool), jnp.zeros([clients, rank], dtype)), probe)
        return over_row_blocks(rows, length, look, blank)

    def join(one, other):
        return one[0] & other[0], one[1] + other[1]

    finite, image = reduce_rows(probe, [sketch.basis], read, join, mesh)
    return finite, jnp.max(jnp.where(kept, jnp.abs(image - probe), 0), axis=1)
