"""What do clients send, and which of it may take part? Each reason to leave a client out has a name and words.

What is checked are faults, not attacks: a client that is broken shows itself here, one that lies within the bounds of
what a sound client could send does not, and only the caps (`cap_traces`, and a rule's bound on the step) limit it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.curvature.sketch import Diagonal, Sketch

# Why a client is left out, in words.
REASONS = {
    "update_not_finite": "its update is not finite, or so long that the norm overflows",
    "sketch_not_finite": "its sketch is not finite",
    "curvature_negative": "its curvature has negative values beyond rounding",
    "basis_not_orthonormal": "the columns of its sketch's basis are not orthonormal",
    "loss_not_finite": "its loss at the broadcast parameters is not finite",
    "damping_invalid": "the damping of its own steps is negative or not finite",
    "examples_invalid": "its number of examples is negative, not finite or too large to be one",
}
# A basis that was rounded to bfloat16 on its way is off by less than 0.01, a column that is sent twice by 1.
ORTHONORMAL = 0.05  # bound on the entries of |U^T U v - v|, v random signs
BLOCK = 2**20  # entries of the bases that are looked at together


class Uploads(NamedTuple):
    """What a round's C clients send; every array has a leading clients axis."""

    delta: Any  # parameter pytree [C, ...]: the client's new minus the broadcast parameters
    num_examples: jax.Array  # [C]; a client with 0 takes no part
    # Stacked, P in the order of jax.tree.leaves: eigenvalues [C, R] and basis [C, P, R], or values [C, P].
    sketch: Sketch | Diagonal | None = None
    loss: jax.Array | None = None  # [C], the clients' mean losses at the broadcast parameters, if the rule wants them
    damping: jax.Array | None = None  # [C], beta_m: (H_m + beta_m I) delta_m = -gradient, nearly, if the rule wants it
    # What the server knows itself: who they are, if the rule remembers them, and of late clients; None where nobody is.
    ids: jax.Array | None = None  # [C] int32, each of those that take part once
    age: jax.Array | None = None  # [C] int32, rounds ago at which the client started
    moved: Any = None  # parameter pytree [C, ...]: the present parameters minus those that the client started from


def screen(uploads: Uploads, params, weighting: str, staleness: float = 0.0, max_drift=0.0):
    """Checks shapes, and leaves out the clients that must not take part: without examples, or at fault.

    Args:
      params: parameter pytree, whose tree and shapes the updates must have.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      staleness: s, where clients are late: a weight falls with the client's age by (1 + age)^-s.
      max_drift: a late client whose own answers have moved by more, see `drift`, takes no part; 0 for no bound.

    Returns:
      (weights [C]; what they are shares of, [], the examples or clients that take part, late ones for less; uploads
      with the updates of those left out zeroed; info with `rejected` [C] bool, those at fault, `reasons` {name in
      `REASONS`: [C] bool}, `absent` [C] bool, those with 0 examples, which is no fault, and where clients are late
      `stale` [C] bool, those beyond max_drift, and `drift`, the largest of the others). If no client is left all
      weights are 0.

    Raises:
      ValueError: shapes do not fit.
    """
    _check_shapes(uploads, params)
    num_examples, dtype = jnp.asarray(uploads.num_examples), ravel_pytree(params)[0].dtype
    there = num_examples != 0  # NaN is not 0
    reasons = {name: there & found for name, found in _faults(uploads, num_examples, dtype).items()}
    rejected = jnp.any(jnp.stack(list(reasons.values())), axis=0)
    accepted, late = there & ~rejected, {}
    if uploads.moved is not None and isinstance(uploads.sketch, Sketch):
        drifted = jnp.where(accepted, drift(uploads.sketch, trees.ravel_stacked(uploads.moved)), 0)
        stale = (max_drift > 0) & ~(drifted <= max_drift)
        late = {"stale": stale, "drift": jnp.max(jnp.where(stale, 0, drifted))}
        accepted &= ~stale
    counts = num_examples if weighting == "examples" else there
    counts = jnp.where(accepted, counts, 0).astype(dtype) * freshness(uploads, staleness, dtype)
    total = jnp.sum(counts)
    weights = trees.ratio(counts, total)
    delta = trees.zero_unless(accepted, uploads.delta)
    damping = None if uploads.damping is None else jnp.where(accepted, uploads.damping, 0)
    info = {"rejected": rejected, "reasons": reasons, "absent": ~there} | late
    # The sketches are not zeroed, which would copy all of them: whoever reads them skips those of weight 0.
    return weights, total, uploads._replace(delta=delta, num_examples=num_examples, damping=damping), info


def drift(sketch: Sketch, moved: jax.Array) -> jax.Array:
    """[C], moved_m^T H_m moved_m / 2 of `moved` [C, P]: how far a client's own answers have moved since it began."""
    # In the basis' own dtype, or one of bfloat16 would be converted as a whole; for a bound that is exact enough.
    given = sketch.basis, moved.astype(sketch.basis.dtype)
    along = jnp.einsum("cpr,cp->cr", *given, precision="highest", preferred_element_type=moved.dtype)
    return jnp.sum(sketch.eigenvalues.astype(moved.dtype) * along**2, axis=1) / 2


def freshness(uploads: Uploads, staleness: float, dtype) -> jax.Array:
    """[C], (1 + age)^-s (Xie et al. 2019, section 5.2), or 1 where nobody is late."""
    return 1 if uploads.age is None else (1 + uploads.age.astype(dtype)) ** -staleness


def _faults(uploads: Uploads, num_examples, dtype) -> dict:
    """{name in `REASONS`: [C] bool}, of present and absent clients alike."""
    nowhere = jnp.zeros(num_examples.shape, bool)
    most = jnp.sqrt(jnp.finfo(dtype).max) / num_examples.size  # above it the sum could overflow, over rounds too
    # The norm as well as the entries: it can overflow where no entry does, and the step would.
    lengths = jax.vmap(optax.tree.norm)(uploads.delta)
    found = dict.fromkeys(REASONS, nowhere) | {
        "update_not_finite": ~jnp.isfinite(lengths),
        "examples_invalid": ~((num_examples >= 0) & (num_examples <= most)),
    }
    sketch = uploads.sketch
    if isinstance(sketch, Sketch):
        finite, distance = orthonormality(sketch)
        finite &= trees.is_finite(sketch.eigenvalues)
        if sketch.report is not None:
            finite &= ~sketch.report.flags["not_finite"]
        found |= {
            "sketch_not_finite": ~finite,
            "curvature_negative": _negative(sketch.eigenvalues),
            "basis_not_orthonormal": finite & ~(distance <= ORTHONORMAL),
        }
    elif isinstance(sketch, Diagonal):
        found |= {
            "sketch_not_finite": ~trees.is_finite(sketch.values),
            "curvature_negative": _negative(sketch.values),
        }
    if uploads.loss is not None:
        found["loss_not_finite"] = ~jnp.isfinite(uploads.loss)
    if uploads.damping is not None:
        found["damping_invalid"] = ~((uploads.damping >= 0) & jnp.isfinite(uploads.damping))
    return found


def _negative(values) -> jax.Array:
    """[C] bool: values [C, n] below zero by more than rounding, beside the client's largest, can explain."""
    tolerance = jnp.sqrt(jnp.finfo(values.dtype).eps)
    return jnp.min(values, axis=1) < -tolerance * jnp.max(values, axis=1)


def orthonormality(sketch: Sketch):
    """(finite [C] bool, distance [C]): whether the bases [C, P, R] are finite, and max_i |(U^T U - I) v|_i.

    One probe v of random signs, on the pairs that are kept: a column of length 1 + a gives 2 a, one that is sent twice
    gives 1, a sound basis its rounding. The bases are read once, block by block of rows: U^T U v = sum_b U_b^T U_b v.
    """
    clients, size, rank = sketch.basis.shape
    dtype = jnp.promote_types(sketch.basis.dtype, jnp.float32)
    signs = np.random.default_rng(0).choice([-1, 1], rank)  # the same in every round
    kept = sketch.eigenvalues > 0
    probe = jnp.where(kept, jnp.asarray(signs, dtype)[None], 0)
    length = min(size, max(BLOCK // (clients * rank), 1))
    along = lambda subscripts, *x: jnp.einsum(subscripts, *x, precision="highest")

    def body(i, carry):
        # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
        basis, finite, image = carry
        basis, i = jax.lax.optimization_barrier((basis, i))
        begin = jnp.minimum(i * length, size - length)
        part = jax.lax.dynamic_slice_in_dim(basis, begin, length, axis=1).astype(dtype)
        rows = along("cbr,cr->cb", part, probe)  # not finite where an entry is not, also of a pair left out
        finite &= jnp.all(jnp.isfinite(rows), axis=1)
        rows = jnp.where((begin + jnp.arange(length) >= i * length)[None], rows, 0)  # the last block repeats some
        return basis, finite, image + along("cbr,cb->cr", part, rows)

    start = sketch.basis, jnp.ones([clients], bool), jnp.zeros([clients, rank], dtype)
    _, finite, image = jax.lax.fori_loop(0, -(-size // length), body, start)
    return finite, jnp.max(jnp.where(kept, jnp.abs(image - probe), 0), axis=1)


def relative_traces(sketch: Sketch, weights) -> jax.Array:
    """[C], the sums of the clients' eigenvalues [C, R] over their lower median; 0 for clients of weight 0.

    While at most half of the clients are at fault, the median is no more than some sound client's. Where it is 0, as
    half of the clients have no curvature, all are 0.
    """
    there = weights > 0
    traces = jnp.where(there, jnp.sum(jnp.maximum(sketch.eigenvalues, 0), axis=1), 0)
    middle = jnp.sort(jnp.where(there, traces, jnp.inf))[jnp.maximum(jnp.sum(there) - 1, 0) // 2]
    known = (middle > 0) & jnp.isfinite(middle)
    return trees.ratio(traces, jnp.where(known, middle, 0))


def cap_traces(sketch: Sketch, relative: jax.Array, cap: float):
    """(sketch, capped [C] bool): eigenvalues scaled down so that no relative trace [C] is above `cap`; 0 for no cap."""
    if not cap:
        return sketch, jnp.zeros(relative.shape, bool)
    capped = relative > cap
    factor = jnp.where(capped, trees.ratio(cap, relative), 1).astype(sketch.eigenvalues.dtype)
    return sketch._replace(eigenvalues=sketch.eigenvalues * factor[:, None]), capped


def _check_shapes(uploads: Uploads, params):
    clients = jnp.shape(uploads.num_examples)
    if len(clients) != 1:
        raise ValueError(f"uploads.num_examples: needed shape [C], got {clients}")
    want = jax.tree.map(lambda leaf: clients + jnp.shape(leaf), params)
    got = jax.tree.map(jnp.shape, uploads.delta)
    if want != got:
        raise ValueError(f"uploads.delta: needed the parameters' tree with a leading clients axis, {want}, got {got}")
    for field in ("loss", "damping", "ids", "age"):
        given = getattr(uploads, field)
        if given is not None and jnp.shape(given) != clients:
            raise ValueError(f"uploads.{field}: needed shape {clients}, got {jnp.shape(given)}")
    if uploads.moved is not None and jax.tree.map(jnp.shape, uploads.moved) != want:
        raise ValueError(f"uploads.moved: needed {want}, got {jax.tree.map(jnp.shape, uploads.moved)}")
    size = ravel_pytree(params)[0].size
    if isinstance(uploads.sketch, Diagonal) and uploads.sketch.values.shape != (*clients, size):
        raise ValueError(f"uploads.sketch: needed values {(*clients, size)}, got {uploads.sketch.values.shape}")
    if isinstance(uploads.sketch, Sketch):
        eigenvalues, basis = uploads.sketch.eigenvalues.shape, uploads.sketch.basis.shape
        if eigenvalues[:1] != clients or len(eigenvalues) != 2 or basis != (*clients, size, *eigenvalues[1:]):
            raise ValueError(
                f"uploads.sketch: needed eigenvalues [C, R] and basis [C, P, R] with C = {clients[0]}, P = {size}, "
                f"got {eigenvalues} and {basis}"
            )


def collect(sent: Sequence[Uploads], params) -> tuple[Uploads, dict[int, str]]:
    """Stacks what single clients have sent; one that does not fit becomes a client without examples.

    For clients that are other programs: what arrives may have any tree, shape, rank or dtype.

    Args:
      sent: of each client, without the leading clients axis. `ids`, `age` and `moved`, the server's own, are left
        out, for it to set.
      params: parameter pytree, whose tree and shapes the updates must have.

    Returns:
      (uploads [C, ...], {place of a client that does not fit: why, in words}). The kind and the rank of the sketches
      are those that most of the others have.

    Raises:
      ValueError: no client fits.
    """
    sent = [one._replace(ids=None, age=None, moved=None) for one in sent]
    wrong = {place: why for place, one in enumerate(sent) if (why := _misfit(one, params))}
    kinds = {place: _kind(one) for place, one in enumerate(sent) if place not in wrong}
    if not kinds:
        raise ValueError(f"uploads: none of {len(sent)} clients fits the parameters: {wrong}")
    usual = Counter(kinds.values()).most_common(1)[0][0]
    wrong |= {place: f"sent {kind}, most sent {usual}" for place, kind in kinds.items() if kind != usual}
    blank = jax.tree.map(np.zeros_like, next(one for place, one in enumerate(sent) if place not in wrong))
    stacked = [blank if place in wrong else one for place, one in enumerate(sent)]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *stacked), wrong


def _misfit(one: Uploads, params) -> str:
    """What of a single client's upload does not fit the parameters, in words; "" if all fits."""
    sketch, want = one.sketch, jax.tree.map(np.shape, params)
    if not isinstance(sketch, Sketch | Diagonal | None):
        return f"its sketch is a {type(sketch).__name__}, needed Sketch, Diagonal or None"
    sent = sketch._replace(report=None) if isinstance(sketch, Sketch) else sketch
    try:
        shapes = jax.tree.map(np.shape, one._replace(sketch=sent))
        sent_numbers = one.delta, sent, one.loss, one.damping
        dtypes = {jnp.result_type(leaf).name for leaf in jax.tree.leaves(sent_numbers)}
    except (TypeError, ValueError) as error:
        return f"holds what is no array: {error}"
    if shapes.delta != want:
        return f"its update has the tree or shapes {shapes.delta}, needed {want}"
    if any(shape not in ((), None) for shape in (shapes.num_examples, shapes.loss, shapes.damping)):
        got = f"{shapes.num_examples}, {shapes.loss} and {shapes.damping}"
        return f"num_examples, loss and damping need to be numbers, got shapes {got}"
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return f"needed floating-point numbers, got {', '.join(sorted(dtypes))}"
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if isinstance(sketch, Diagonal) and shapes.sketch.values != (size,):
        return f"its diagonal has the shape {shapes.sketch.values}, needed {(size,)}"
    if isinstance(sketch, Sketch):
        eigenvalues, basis = shapes.sketch.eigenvalues, shapes.sketch.basis
        if len(eigenvalues) != 1 or basis != (size, *eigenvalues):
            return f"its sketch has eigenvalues {eigenvalues} and basis {basis}, needed [R] and [{size}, R]"
    return ""


def _kind(one: Uploads) -> str:
    """What kind of curvature a client has sent; those that are stacked share it."""
    loss = "" if one.loss is None else ", with its loss"
    loss += "" if one.damping is None else ", with its damping"
    if not isinstance(one.sketch, Sketch):
        return f"{'no sketch' if one.sketch is None else 'a diagonal'}{loss}"
    return f"a sketch of rank {len(one.sketch.eigenvalues)}{' with a report' if one.sketch.report else ''}{loss}"
