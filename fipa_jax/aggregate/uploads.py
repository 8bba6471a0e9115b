"""What do clients send? One type for all rules, and how the messages of single clients become one stack of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature.sketch import Diagonal, Sketch


class Uploads(NamedTuple):
    """What a round's C clients send; every array has a leading clients axis. What is absent is None."""

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


NUMBERS = ("num_examples", "loss", "damping")  # one of each client


def check_shapes(uploads: Uploads, params: Any) -> None:
    """Checks that stacked uploads fit each other and the parameters.

    Args:
      params: parameter pytree, whose tree and shapes the updates must have.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    clients = jnp.shape(uploads.num_examples)
    if len(clients) != 1:
        raise ValueError(f"uploads.num_examples: needed shape [C], got {clients}")
    want = jax.tree.map(lambda leaf: clients + jnp.shape(leaf), params)
    got = jax.tree.map(jnp.shape, uploads.delta)
    if want != got:
        raise ValueError(f"uploads.delta: needed the parameters' tree with a leading clients axis, {want}, got {got}")
    for field in ("loss", "damping", "ids", "age"):
        value = getattr(uploads, field)
        if value is not None and jnp.shape(value) != clients:
            raise ValueError(f"uploads.{field}: needed shape {clients}, got {jnp.shape(value)}")
    if uploads.moved is not None and jax.tree.map(jnp.shape, uploads.moved) != want:
        raise ValueError(f"uploads.moved: needed {want}, got {jax.tree.map(jnp.shape, uploads.moved)}")
    _check_curvature(uploads.sketch, clients, sum(np.size(leaf) for leaf in jax.tree.leaves(params)))


def _check_curvature(sketch: Sketch | Diagonal | None, clients: tuple[int], size: int) -> None:
    if isinstance(sketch, Diagonal) and sketch.values.shape != (*clients, size):
        raise ValueError(f"uploads.sketch: needed values {(*clients, size)}, got {sketch.values.shape}")
    if isinstance(sketch, Sketch):
        eigenvalues, basis = sketch.eigenvalues.shape, sketch.basis.shape
        if eigenvalues[:1] != clients or len(eigenvalues) != 2 or basis != (*clients, size, *eigenvalues[1:]):
            raise ValueError(
                f"uploads.sketch: needed eigenvalues [C, R] and basis [C, P, R] with C = {clients[0]}, P = {size}, "
                f"got {eigenvalues} and {basis}"
            )


def collect(sent: Sequence[Uploads], params: Any) -> tuple[Uploads, dict[int, str]]:
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
    fitting = [blank if place in wrong else one for place, one in enumerate(sent)]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *fitting), wrong


def _misfit(one: Uploads, params: Any) -> str:
    """What of a single client's upload does not fit the parameters, in words; "" if all fits."""
    if not isinstance(one.sketch, Sketch | Diagonal | None):
        return f"its sketch is a {type(one.sketch).__name__}, needed Sketch, Diagonal or None"
    sketch = one.sketch._replace(report=None) if isinstance(one.sketch, Sketch) else one.sketch
    try:
        shapes = jax.tree.map(np.shape, one._replace(sketch=sketch))
        numbers = one.delta, sketch, one.loss, one.damping
        dtypes = {jnp.result_type(leaf).name for leaf in jax.tree.leaves(numbers)}
    except (TypeError, ValueError) as error:
        return f"holds what is no array: {error}"
    want = jax.tree.map(np.shape, params)
    if shapes.delta != want:
        return f"its update has the tree or shapes {shapes.delta}, needed {want}"
    if any(getattr(shapes, field) not in ((), None) for field in NUMBERS):
        got = f"{shapes.num_examples}, {shapes.loss} and {shapes.damping}"
        return f"num_examples, loss and damping need to be numbers, got shapes {got}"
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return f"needed floating-point numbers, got {', '.join(sorted(dtypes))}"
    return _misfit_of_curvature(shapes.sketch, sum(np.size(leaf) for leaf in jax.tree.leaves(params)))


def _misfit_of_curvature(shapes: Sketch | Diagonal | None, size: int) -> str:
    """The same of the shapes of a client's sketch or diagonal, for P = `size`."""
    if isinstance(shapes, Diagonal) and shapes.values != (size,):
        return f"its diagonal has the shape {shapes.values}, needed {(size,)}"
    if isinstance(shapes, Sketch):
        eigenvalues, basis = shapes.eigenvalues, shapes.basis
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
