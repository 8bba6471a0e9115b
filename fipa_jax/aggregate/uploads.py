"""What do clients send? One type for all rules, and how the messages of single clients become one stack of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import trees
from fipa_jax.aggregate.row_blocks import padded, segments_of
from fipa_jax.curvature import contracts
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors, layers_of
from fipa_jax.curvature.sketch import FLAGS, STORES, Diagonal, Report, Sketch
from fipa_jax.trees import HostArray


class Uploads(NamedTuple):
    """What a round's C clients send; every array has a leading clients axis. What is absent is None."""

    delta: Any  # parameter pytree [C, ...]: the client's new minus the broadcast parameters
    num_examples: jax.Array  # [C]; a client with 0 takes no part
    # Stacked, P in the order of jax.tree.leaves: eigenvalues [C, R] and basis [C, P, R], values [C, P], [C, P, s] or
    # [C, s, s]; of layers {path: [C, ...]}.
    sketch: Sketch | Diagonal | Image | Core | LayerFactors | None = None
    loss: jax.Array | None = None  # [C], the clients' mean losses at the broadcast parameters, if the rule wants them
    damping: jax.Array | None = None  # [C], beta_m: (H_m + beta_m I) delta_m = -gradient, nearly, if the rule wants it
    # What the server knows itself: who they are, if the rule remembers them, and of late clients; None where nobody is.
    ids: jax.Array | None = None  # [C] int32, each of those that take part once
    age: jax.Array | None = None  # [C] int32, rounds ago at which the client started
    moved: Any = None  # parameter pytree [C, ...]: the present parameters minus those that the client started from


Message = Sketch | Diagonal | Image | Core | LayerFactors | None  # what a client says of its curvature
KINDS = "Sketch, Diagonal, Image, Core, LayerFactors or None"
MOST_ID = np.iinfo(np.int32).max
NUMBERS = ("num_examples", "loss", "damping")  # one of each client


def fitting(uploads: Uploads, params: Any) -> Uploads:
    """Stacked uploads that fit each other and the parameters: in the parameters' own tree, in float32 at least.

    Updates, counts and eigenvalues of half precision are widened. A basis is not: it is read block by block.

    Args:
      params: parameter pytree, whose paths and shapes the updates must have.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    clients = np.shape(uploads.num_examples)
    if len(clients) != 1 or not clients[0]:
        raise ValueError(f"uploads.num_examples: needed shape [C] with C at least 1, got {clients}")
    contracts.floating(params, "params")
    numbers = {name: getattr(uploads, name) for name in (*NUMBERS, "ids", "age")}
    for field, value in numbers.items():
        if value is not None and (np.shape(value) != clients or not _is_real(value)):
            raise ValueError(f"uploads.{field}: needed {clients[0]} real numbers, got {contracts.kind(value)}")
    numbers["ids"] = None if uploads.ids is None else _ids_of(uploads.ids, clients[0])
    moved = None if uploads.moved is None else like_params(uploads.moved, params, clients, "uploads.moved")
    delta = like_params(uploads.delta, params, clients, "uploads.delta")
    if isinstance(uploads.sketch, LayerFactors):
        sketch = _fitting_layers(uploads.sketch, clients, params)
    else:
        sketch = _checked(uploads.sketch, clients, sum(np.size(leaf) for leaf in jax.tree.leaves(params)))
    counts = _uncut(uploads.num_examples)
    wide = jnp.promote_types(jax.dtypes.canonicalize_dtype(counts.dtype), jnp.float32)
    numbers["num_examples"] = jnp.asarray(counts.astype(wide))
    return Uploads(delta=delta, sketch=sketch, moved=moved, **trees.widened(numbers))


def _ids_of(ids: Any, clients: int) -> jax.Array:
    """[C] int32, -1 for what is none: it must not be cut to the id of another client."""
    if not jnp.issubdtype(getattr(ids, "dtype", jnp.result_type(ids)), jnp.integer):
        raise ValueError(f"uploads.ids: needed {clients} integers, got {contracts.kind(ids)}")
    ids = _uncut(ids)
    fits = (ids >= 0) & (ids <= min(MOST_ID, np.iinfo(ids.dtype).max))
    return jnp.where(fits, ids.astype(np.int32), -1)


def _uncut(numbers: Any) -> jax.Array | np.ndarray:
    """NumPy's numbers as they are: jax without x64 would cut integers of 64 bits to 32."""
    return numbers if isinstance(numbers, jax.Array) else np.asarray(numbers)


def like_params(tree: Any, params: Any, leading: tuple[int, ...], name: str) -> Any:
    """The floating-point tree in the parameters' structure, whose paths and shapes it must have, in float32 at least.

    Containers of another kind that hold the same paths, such as a frozen dictionary, are the same tree.

    Args:
      leading: the axes that every leaf has before those of the parameter.
      name: of the tree, for the error.

    Raises:
      ValueError: names the first path that differs.
    """
    got, want = dict(trees.with_paths(tree)), dict(trees.with_paths(params))
    for path in (*want, *got):
        if path not in got or path not in want:
            what = "is missing" if path in want else "is no parameter"
            raise ValueError(f"{name}: {trees.in_words(path)!r:.200} {what}")
    contracts.floating(tree, name)
    for path, leaf in want.items():
        needed, arrived = leading + jnp.shape(leaf), jnp.shape(got[path])
        if arrived != needed:
            raise ValueError(f"{name}: needed {needed} at {trees.in_words(path)!r:.200}, got {arrived}")
    structure = jax.tree.structure(params)
    return trees.widened(structure.unflatten([jnp.asarray(got[path]) for path in want]))


def _is_real(value: Any) -> bool:
    """Whether an array, or number, is of integers or floating-point numbers, which a bool is not."""
    try:
        dtype = jnp.result_type(value)
    except (TypeError, ValueError):  # a list, or what is no number at all
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _checked(sketch: Message, clients: tuple[int], size: int) -> Message:
    """A stacked sketch of C = `clients` clients and P = `size` that fits, its eigenvalues in float32 at least."""
    if isinstance(sketch, Diagonal):
        if jnp.shape(sketch.values) != (*clients, size):
            raise ValueError(f"uploads.sketch: needed values {(*clients, size)}, got {jnp.shape(sketch.values)}")
        return trees.widened(contracts.floating(sketch, "uploads.sketch"))
    if isinstance(sketch, Image):
        shape = jnp.shape(sketch.values)
        if len(shape) != 3 or shape[:2] != (*clients, size):
            raise ValueError(f"uploads.sketch: needed values [C, P, s] with {(*clients, size)}, got {shape}")
        return trees.widened(contracts.floating(sketch, "uploads.sketch"))
    if isinstance(sketch, Core):
        shape = jnp.shape(sketch.values)
        if len(shape) != 3 or shape[:1] != clients or shape[1] != shape[2]:
            raise ValueError(f"uploads.sketch: needed values [C, s, s] with C = {clients[0]}, got {shape}")
        return trees.widened(contracts.floating(sketch, "uploads.sketch"))
    if sketch is None:
        return None
    if not isinstance(sketch, Sketch):
        raise ValueError(f"uploads.sketch: needed {KINDS}, got {type(sketch).__name__}")
    eigenvalues, basis = jnp.shape(sketch.eigenvalues), jnp.shape(sketch.basis)
    shapes = [(*clients, rows, *eigenvalues[1:]) for rows in (size, padded(size))]  # see `row_blocks`
    if eigenvalues[:1] != clients or len(eigenvalues) != 2 or not eigenvalues[1] or basis not in shapes:
        raise ValueError(
            f"uploads.sketch: needed eigenvalues [C, R] and basis [C, P, R] with C = {clients[0]}, P = {size}, R at "
            f"least 1, got {eigenvalues} and {basis}"
        )
    contracts.floating((sketch.eigenvalues, sketch.basis), "uploads.sketch")
    return sketch._replace(eigenvalues=trees.widened(sketch.eigenvalues))


def _fitting_layers(factors: LayerFactors, leading: tuple[int, ...], params: Any) -> LayerFactors:
    """Layer factors of layers of the parameters, in float32 at least; A of all of them, G of all or of none."""
    shapes, inputs, outputs = layers_of(params), factors.inputs, factors.outputs
    for path in {*inputs, *outputs}:
        if path not in shapes or path not in inputs or (outputs and path not in outputs):
            raise ValueError(f"uploads.sketch: {path!r:.200} is no layer of these parameters, or a factor is missing")
    for halves, axis in ((inputs, 0), (outputs, 1)):
        for path, half in halves.items():
            side = shapes[path].shape[axis]
            needed = (*leading, side * (side + 1) // 2)
            if jnp.shape(half) != needed:
                raise ValueError(f"uploads.sketch: needed {needed} at {path!r:.200}, got {jnp.shape(half)}")
    if not inputs:
        raise ValueError("uploads.sketch: LayerFactors without a layer")
    return trees.widened(contracts.floating(factors, "uploads.sketch"))


def collect(sent: Sequence[Any], params: Any, like: Uploads | None = None) -> tuple[Uploads, dict[int, str]]:
    """Stacks what single clients have sent; one that does not fit becomes a client without examples.

    For clients that are other programs: what arrives may be any object at all, and nothing of it raises.

    Args:
      sent: what each client has sent, by right `Uploads` without the leading clients axis. `ids`, `age` and `moved`,
        the server's own, are left out, for it to set.
      params: parameter pytree, whose paths and shapes the updates must have.
      like: an upload, or its shapes, of the kind that is asked for: with a sketch of which rank, with a report, with a
        loss and so on. Without one it is the kind that most of those have sent which fit the parameters.

    Returns:
      (uploads [C, ...], {place of a client that does not fit: why, in words}). Where nobody fits and nothing says what
      was asked for, there is no sketch in them.

    Raises:
      ValueError: there are no clients.

    Example:
      uploads, wrong = collect([first, None, third], params)
      wrong is {1: "it has sent a NoneType, needed Uploads"}, and uploads.num_examples[1] is 0.
    """
    if not len(sent):
        raise ValueError("uploads: there are no clients to collect from")
    contracts.floating(params, "params")
    read, wrong = {}, {}
    for place, one in enumerate(sent):
        try:
            read[place] = _read(one, params)
        except _Misfit as misfit:
            wrong[place] = f"{misfit!s:.300}"
        except Exception as error:  # whatever an object of another program does when it is looked at
            wrong[place] = f"it cannot be read: {type(error).__name__}"
    kinds = {place: _kind(one) for place, one in read.items()}
    usual = Counter(kinds.values()).most_common(1)[0][0] if kinds and like is None else _kind(like)
    asked = "most sent" if like is None else "asked for"
    wrong |= {place: f"sent {kind}, {asked} {usual}" for place, kind in kinds.items() if kind != usual}
    fits = (one for place, one in read.items() if place not in wrong)
    blank = (like or next(fits, Uploads(None, jnp.float32(0))))._replace(delta=params)
    blank = jax.tree.map(lambda x: np.zeros(getattr(x, "shape", ()), jnp.result_type(x)), blank)
    stacked = [blank if place in wrong else read[place] for place in range(len(sent))]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *stacked), wrong


class _Misfit(Exception):
    """Why an upload does not fit, in words."""


def _read(one: Any, params: Any) -> Uploads:
    """One client's upload as NumPy arrays of the parameters' tree."""
    if not isinstance(one, Uploads):
        raise _Misfit(f"it has sent a {type(one).__name__}, needed Uploads")
    try:
        delta = like_params(jax.tree.map(_array, one.delta), params, (), "its update")
    except ValueError as error:
        raise _Misfit(str(error)) from error
    numbers = {name: getattr(one, name) for name in NUMBERS}
    read: dict[str, HostArray] = {k: None if value is None else _number(value, k) for k, value in numbers.items()}
    if read["num_examples"] is None:
        raise _Misfit("it does not say of how many examples it is")
    if isinstance(one.sketch, LayerFactors):
        sketch = _read_layers(one.sketch, params)
    else:
        sketch = _read_curvature(one.sketch, sum(np.size(leaf) for leaf in jax.tree.leaves(params)))
    return Uploads(delta=jax.tree.map(np.asarray, delta), sketch=sketch, **read)


def _read_curvature(sketch: Any, size: int) -> Message:
    """One client's sketch, diagonal, image or core for P = `size`."""
    if sketch is None:
        return None
    if isinstance(sketch, Diagonal):
        return Diagonal(_shaped(sketch.values, (size,), "its diagonal"))
    if isinstance(sketch, Image):
        columns = _array(sketch.values).shape[-1:]
        return Image(_shaped(sketch.values, (size, *columns), "its image"))
    if isinstance(sketch, Core):
        columns = _array(sketch.values).shape[-1:]
        return Core(_shaped(sketch.values, (*columns, *columns), "its core"))
    if not isinstance(sketch, Sketch):
        raise _Misfit(f"its sketch is a {type(sketch).__name__}, needed {KINDS}")
    rank = np.size(_array(sketch.eigenvalues))
    eigenvalues = _shaped(sketch.eigenvalues, (rank,), "the eigenvalues of its sketch")
    rows = padded(size) if _array(sketch.basis).shape[:1] == (padded(size),) else size  # see `row_blocks`
    basis = _shaped(sketch.basis, (rows, rank), "the basis of its sketch")
    return Sketch(eigenvalues, basis, _read_report(sketch.report, rank))


def _read_layers(factors: LayerFactors, params: Any) -> LayerFactors:
    """One client's layer factors."""
    if not all(isinstance(halves, dict) and all(isinstance(path, str) for path in halves) for halves in factors):
        raise _Misfit("its layer factors are no tables of arrays")
    read = LayerFactors(*({path: _array(half) for path, half in halves.items()} for halves in factors))
    try:
        _fitting_layers(read, (), params)
    except ValueError as error:
        raise _Misfit(str(error)) from error
    return read


def _read_report(report: Any, rank: int) -> Report | None:
    """One client's report on a sketch of R = `rank`."""
    if report is None:
        return None
    if not isinstance(report, Report):
        raise _Misfit(f"its report is a {type(report).__name__}, needed Report or None")
    if not isinstance(report.flags, dict) or set(report.flags) != set(FLAGS):
        raise _Misfit(f"its report has the flags {_names(report.flags)}, needed {_names(FLAGS)}")
    return Report(
        residuals=_shaped(report.residuals, (rank,), "the residuals of its report"),
        products=_number(report.products, "products").astype(np.int32),
        converged=_flag(report.converged, "converged"),
        trace=_number(report.trace, "trace"),
        trace_error=_number(report.trace_error, "trace_error"),
        flags={name: _flag(report.flags[name], name) for name in FLAGS},
    )


def _array(value: Any) -> HostArray:
    """A value that is an array or a number, as one that the server may look at."""
    if not isinstance(value, np.ndarray | np.generic | jax.Array | int | float) or isinstance(value, np.ma.MaskedArray):
        raise _Misfit(f"needed arrays, got a {type(value).__name__}")
    return np.asarray(value)


def _shaped(value: Any, shape: tuple[int, ...], name: str) -> HostArray:
    """An array of this shape in one of the dtypes in which floating-point numbers may be sent."""
    array = _array(value)
    if array.shape != shape or array.dtype.name not in STORES:
        raise _Misfit(f"{name}: needed floating-point numbers of shape {shape}, got {contracts.kind(array)}")
    return array.astype(STORES[array.dtype.name], copy=False)  # in this machine's byte order


def _number(value: Any, name: str) -> HostArray:
    """A real number in float32, or float64 where it was that; a bool is none."""
    array = _array(value)
    if array.shape or (array.dtype.kind not in "iu" and array.dtype.name not in STORES):
        raise _Misfit(f"{name}: needed a number, got {contracts.kind(array)}")
    return array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)


def _flag(value: Any, name: str) -> HostArray:
    array = _array(value)
    if array.shape or array.dtype != bool:
        raise _Misfit(f"{name}: needed true or false, got {contracts.kind(array)}")
    return np.asarray(bool(array))


def _names(table: Any) -> str:
    """The names in a table that may be anything, in some words."""
    return ", ".join(sorted(map(str, table)))[:200] if isinstance(table, dict) else type(table).__name__


def _kind(one: Uploads | None) -> str:
    """What kind of curvature a client has sent; those that are stacked share it."""
    if one is None:
        return "no sketch"
    loss = "" if one.loss is None else ", with its loss"
    loss += "" if one.damping is None else ", with its damping"
    if isinstance(one.sketch, Image | Core):
        name = {Image: "an image", Core: "a core"}[type(one.sketch)]
        return f"{name} of {one.sketch.values.shape[-1]} columns{loss}"
    if isinstance(one.sketch, LayerFactors):
        return f"{'both factors' if one.sketch.outputs else 'input factors'} of {sorted(one.sketch.inputs)}{loss}"
    if not isinstance(one.sketch, Sketch):
        return f"{'no sketch' if one.sketch is None else 'a diagonal'}{loss}"
    rows = " with rows to be spread" if segments_of(one.sketch.basis.shape[0]) > 1 else ""
    return (
        f"a sketch of rank {one.sketch.eigenvalues.shape[0]}{rows}{' with a report' if one.sketch.report else ''}{loss}"
    )
