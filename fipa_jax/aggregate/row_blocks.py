"""How are arrays of many rows read? In blocks of rows, one after another; large ones on all devices at once.

Small arrays are one run of blocks. From `SPREAD_FROM` rows on, padded with zeros by `padded`, they are `SEGMENTS` runs
side by side, whose results are joined two by two, always in the same order: so that one device that reads all of them
and several that read their share come to the same bits. Over a mesh each device holds the rows of its own segments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fipa_jax.derivatives import vary_with

SEGMENTS = 64  # also the most devices that share the rows
SPREAD_FROM = 2**16  # rows; fewer are read by every device alike

Rows = Sequence[Any]  # trees of arrays [P] or [C, P, ...], or None; of all of them the same rows are read together


class Spread(NamedTuple):
    """That rows are padded so that they can be spread, and the devices that share them, along an axis `clients`."""

    mesh: Mesh | None = None


def padded(size: int) -> int:
    """The rows that `size` become, so that they can be spread: with zeros behind them."""
    return size if size < SPREAD_FROM else size + -size % SEGMENTS


def segments_of(size: int) -> int:
    """The runs of blocks that so many rows are read in."""
    return SEGMENTS if size >= SPREAD_FROM and size % SEGMENTS == 0 else 1


def fill_up(array: jax.Array, size: int) -> jax.Array:
    """The rows of an array [P] or [C, P, ...] with zeros behind them, `size` in all."""
    axis = _axis(array)
    widths = [(0, size - array.shape[axis] if each == axis else 0) for each in range(array.ndim)]
    return array if not widths[axis][1] else jnp.pad(array, widths)


def row_block(size: int, length: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first row, [length] bool: which rows are new) of the block at `start`.

    The last block's start is moved back so that all have one length; what it repeats is not new.
    """
    begin = jnp.minimum(start, size - length)
    return begin, begin + jnp.arange(length, dtype=jnp.int32) >= start


def over_row_blocks(rows: Rows, length: int, visit: Callable, initial: Any, each_by_itself: bool = False) -> Any:
    """carry <- visit(rows, start, carry) over blocks of so many rows, one after another.

    Args:
      rows: read by `visit`, which is given them anew in each step.
      visit: see `row_block` for what a start means.
      initial: the first carry.
      each_by_itself: whether the reverse sweep of a derivative, where there is one, computes each step anew.
    """
    size = size_of(rows)
    if length == size:
        return visit(rows, jnp.int32(0), initial)

    # int32, as int64 would outlive the scope of `factorisations.arithmetic` where a vmap traces this anew.
    steps = -(-size // length)
    initial = vary_with(initial, rows)
    if each_by_itself:
        body = jax.checkpoint(lambda carry, i: (visit(rows, i * length, carry), None))
        return jax.lax.scan(body, initial, jnp.arange(steps, dtype=jnp.int32))[0]

    def body(i, carry):
        # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
        given, inner = carry
        given, i = jax.lax.optimization_barrier((given, i))
        return given, visit(given, i * length, inner)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, (rows, initial))[1]


def reduce_rows(
    common: Any, rows: Rows, read: Callable[[Any, Rows], Any], join: Callable[[Any, Any], Any], mesh: Mesh | None = None
) -> Any:
    """read(common, rows) of all rows, or of each segment, whose results are joined two by two.

    Args:
      common: what is the same for all rows.
      rows: see `Rows`.
      read: of rows [P'] of a segment; usually a loop of `over_row_blocks`.
      join: (one result, the next segments' one) -> their result.
      mesh: devices with an axis `clients`, over which the rows are spread; None for one.
    """

    def together(results, devices: int):
        joined = _two_by_two(results, join, SEGMENTS // devices)
        if devices == 1:
            return joined
        every = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, "clients"), joined)
        return _two_by_two(every, join, devices)

    return _by_segments(common, rows, read, together, PartitionSpec(), mesh)


def map_rows(common: Any, rows: Rows, read: Callable[[Any, Rows], jax.Array], mesh: Mesh | None = None) -> jax.Array:
    """[P, ...], read(common, rows) [P', ...] of all rows, or of each segment, one after another; as spread as the rows.

    Args: see `reduce_rows`.
    """

    def side_by_side(results, devices: int):
        return results.reshape(-1, *results.shape[2:])

    return _by_segments(common, rows, read, side_by_side, PartitionSpec("clients"), mesh)


def spec_of(array: jax.Array) -> PartitionSpec:
    """How an array's rows lie on the devices of a mesh."""
    return PartitionSpec("clients") if _axis(array) == 0 else PartitionSpec(None, "clients")


def can_share(mesh: Mesh | None, size: int) -> bool:
    """Whether the devices of a mesh share so many rows: a power of two of them, and enough rows."""
    return segments_of(size) > 1 and _sharing(mesh) > 1


def size_of(rows: Rows) -> int:
    """P."""
    first = jax.tree.leaves(rows)[0]
    return first.shape[_axis(first)]


def _axis(array: jax.Array) -> int:
    return min(array.ndim - 1, 1)


def _sharing(mesh: Mesh | None) -> int:
    """The devices that share the rows: all of a mesh, if their number divides `SEGMENTS`; else each reads all."""
    devices = 1 if mesh is None else mesh.shape["clients"]
    return devices if SEGMENTS % devices == 0 else 1


def _by_segments(
    common: Any, rows: Rows, read: Callable, gather: Callable, out: PartitionSpec, mesh: Mesh | None
) -> Any:
    """read(common, rows) of short rows; of long ones gather(segments' results, devices) on each device.

    Args:
      out: how what is gathered lies on the devices.
    """
    segments, devices = segments_of(size_of(rows)), _sharing(mesh)
    if segments == 1:
        return read(common, rows)

    def local(common, rows):
        return gather(_each_segment(functools.partial(read, common), rows, segments // devices), devices)

    if devices == 1:
        return local(common, rows)
    specs = PartitionSpec(), jax.tree.map(spec_of, rows)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(common, rows)


def _each_segment(read: Callable, rows: Rows, number: int) -> Any:
    """read(rows) of each of so many segments, one after another, stacked."""
    length = size_of(rows) // number

    def one(place):
        def cut(array):
            return jax.lax.dynamic_slice_in_dim(array, place * length, length, axis=_axis(array))

        return read(jax.tree.map(cut, rows))

    return jax.lax.map(one, jnp.arange(number, dtype=jnp.int32))


def _two_by_two(stacked: Any, join: Callable, number: int) -> Any:
    """The results [number, ...] joined, neighbours first; `number` is a power of two."""
    while number > 1:
        number //= 2
        first, second = (jax.tree.map(lambda leaf, odd=odd: leaf[odd::2], stacked) for odd in (0, 1))
        stacked = jax.lax.map(lambda pair: join(*pair), (first, second))
    return jax.tree.map(lambda leaf: leaf[0], stacked)
