"""How do numbers that were rounded to few bits travel? As their integers, bit by bit, and a float32 for each block.

An update of few entries travels as these, and their places.

`curvature.few_bits` rounds, and gives what arrives, as a simulation needs it. From that the integers q and the blocks'
largest entries m can be read again: a block's largest entry always has the largest integer. Messages are packed behind
whatever made them, and unpacked before whatever reads them; neither knows of it. Instead of an array NAME there are

    NAME/integers   [K, n] uint8, of K vectors: q + l, of `bits` bits each, highest bit first, the last byte filled
    NAME/scales     [K, blocks] float32, m

of these vectors:

    delta           the whole update, K = 1: all parameters one after another; of few entries, delta/places [k] int32,
                    ascending, and delta/values [k] float32 of those that are not zero
    sketch/basis    its K columns
    core/values     K = 1: M_ij / sqrt(M_ii M_jj) above the diagonal, column by column; core/diagonal [k] beside it
    asked/0         the columns of the common basis that are in use

All but a core's are turned (`few_bits.turned`).

Of a core there are the k columns up to the last with any curvature, and nothing where all of it is zero: that client
was not asked. In floating point core/values [k (k + 1) / 2] is its upper half, row by row.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fipa_jax.curvature.common_basis import above_diagonal
from fipa_jax.curvature.few_bits import BLOCK, levels_of, turned, turned_back
from fipa_jax.deployment.wire import Malformed

DELTA, BASIS, CORE, DIAGONAL, ASKED = "delta", "sketch/basis", "core/values", "core/diagonal", "asked/0"
PLACES, VALUES = "delta/places", "delta/values"
Arrays = Mapping[str, np.ndarray]  # {name on the wire: array}
Forms = Mapping[str, Any]  # {name on the wire: what has a shape and a dtype}


class Bits(NamedTuple):
    """In how many bits an entry travels; 0 for floating point."""

    update: int = 0
    curvature: int = 0  # of a sketch's basis, or of a core
    asked: int = 0  # of the common basis
    kept: float = 0.0  # the share of an update's entries that travel at most, the others being zero; 0 for all


def packed(arrays: Arrays, bits: Bits) -> dict[str, np.ndarray]:
    """The arrays of a message as they travel.

    Example:
      packed({"delta/w": rounded_update}, Bits(update=8)) has the names delta/integers and delta/scales.

    Args:
      arrays: of what `curvature.few_bits` has rounded to so many bits.
      bits: see `Bits`.
    """
    sent = dict(arrays)
    if (bits.update or bits.kept) and (paths := _paths(arrays)):
        whole = np.concatenate([sent.pop(path).reshape(-1) for path in paths])
        sent |= _integers(DELTA, whole[None], bits.update) if bits.update else _entries(whole)
    if bits.curvature and BASIS in sent:
        sent |= _integers(BASIS, sent.pop(BASIS).T, bits.curvature)
    if CORE in sent:
        sent |= _of_core(sent.pop(CORE), bits.curvature)
    if bits.asked and ASKED in sent:
        basis = sent.pop(ASKED)
        sent |= _integers(ASKED, basis.T[np.any(basis != 0, axis=0)], bits.asked)
    return sent


def unpacked(arrays: Arrays, bits: Bits, forms: Forms) -> dict[str, np.ndarray]:
    """The arrays of a message as they were before `packed`.

    Args:
      arrays: as they came.
      bits: see `Bits`.
      forms: of what was asked for, of which those of packed arrays count.

    Raises:
      wire.Malformed: what came is not what `packed` makes of arrays of these forms.
    """
    read = dict(arrays)
    if (bits.update or bits.kept) and (paths := _paths(forms)):
        shapes = [forms[path].shape for path in paths]
        sizes = [int(np.prod(shape)) for shape in shapes]
        dtype = np.result_type(*(forms[path].dtype for path in paths))
        if bits.update:
            whole = _vectors(read, DELTA, sum(sizes), bits.update, np.float64, 1)[0]
        else:
            whole = _of_entries(read, sum(sizes), bits.kept, dtype)
        parts = np.split(whole, np.cumsum(sizes)[:-1])
        read |= {
            path: part.reshape(shape).astype(forms[path].dtype)
            for path, part, shape in zip(paths, parts, shapes, strict=True)
        }
    if bits.curvature and BASIS in forms:
        size, most = forms[BASIS].shape
        read[BASIS] = _vectors(read, BASIS, size, bits.curvature, forms[BASIS].dtype, most, fewer=True).T
    if CORE in forms:
        read[CORE] = _core(read, forms[CORE], bits.curvature)
    if bits.asked and ASKED in forms and f"{ASKED}/integers" in read:
        size, most = forms[ASKED].shape
        columns = _vectors(read, ASKED, size, bits.asked, forms[ASKED].dtype, most, fewer=True).T
        read[ASKED] = np.pad(columns, [(0, 0), (0, most - columns.shape[1])])
    return read


def _of_core(core: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """{name: array} of a core [s, s]."""
    used = np.flatnonzero(np.any(core != 0, axis=0))
    if not used.size:
        return {}
    core = core[: used[-1] + 1, : used[-1] + 1]
    if not bits:
        return {CORE: core[np.triu_indices(len(core))]}
    lengths, above = _lengths(np.diagonal(core)), above_diagonal(len(core))
    cosines = np.divide(core, lengths, out=np.zeros_like(core), where=lengths > 0)[above]
    return {DIAGONAL: np.diagonal(core)} | _integers(CORE, cosines[None], bits)


def _core(read: dict, form: Any, bits: int) -> np.ndarray:
    """[s, s], of what came of it, which is taken out of `read`; zero where nothing did."""
    name = DIAGONAL if bits else CORE
    part = read.pop(name, None)
    if part is None:
        return np.zeros(form.shape, form.dtype)
    columns = part.size if bits else (math.isqrt(8 * part.size + 1) - 1) // 2
    shape = (columns,) if bits else (columns * (columns + 1) // 2,)
    if part.dtype != form.dtype or part.shape != shape or columns > form.shape[0]:
        raise Malformed(f"{name}: it has sent {part.dtype} {[*part.shape]}, asked for {form.dtype} of {[*form.shape]}")
    above = above_diagonal(columns)
    core = np.zeros([columns, columns], form.dtype)
    if bits:
        core[above] = _vectors(read, CORE, len(above[0]), bits, form.dtype, 1)[0]
        core = np.diag(part) + (core + core.T) * _lengths(part)
    else:
        core[np.triu_indices(columns)] = part
        core[above[::-1]] = core[above]
    return np.pad(core, [(0, form.shape[0] - columns)])


def _lengths(diagonal: np.ndarray) -> np.ndarray:
    """[s, s], sqrt(M_ii M_jj)."""
    length = np.sqrt(np.maximum(diagonal, 0))
    return length[:, None] * length[None]


def _paths(arrays: Mapping[str, Any]) -> list[str]:
    """The names of an update's arrays, in the order in which `ravel` has them."""
    return sorted(name for name in arrays if name.startswith(f"{DELTA}/"))


def _entries(whole: np.ndarray) -> dict[str, np.ndarray]:
    """{name: array} of the entries of an update [P] that are not zero."""
    places = np.flatnonzero(whole)
    return {PLACES: places.astype(np.int32), VALUES: whole[places].astype(np.float32)}


def _of_entries(read: dict, size: int, share: float, dtype: Any) -> np.ndarray:
    """[size], of arrays that are taken out of `read`."""
    places, values = (read.pop(name, np.zeros(0)) for name in (PLACES, VALUES))
    most = math.ceil(share * size)
    if places.dtype != np.int32 or values.dtype != np.float32 or places.shape != values.shape or places.ndim != 1:
        got = f"{places.dtype} {[*places.shape]} and {values.dtype} {[*values.shape]}"
        raise Malformed(f"{PLACES}: it has sent {got}, asked for places int32 and as many values float32")
    if places.size > most or np.any(np.diff(places, prepend=-1) <= 0) or np.any(places >= size):
        raise Malformed(f"{PLACES}: needed at most {most} places, ascending, of {size}")
    whole = np.zeros(size, dtype)
    whole[places] = values
    return whole


def _integers(name: str, vectors: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """{name: array} of rounded vectors [K, size]. A block with a number that is not finite has a scale that is NaN."""
    number, size = vectors.shape
    integers = np.zeros([number, -(-size * bits // 8)], np.uint8)
    scales = np.zeros([number, -(-size // BLOCK)], np.float32)
    for vector, written, scale in zip(vectors, integers, scales, strict=True):  # one by one, for the memory
        with np.errstate(invalid="ignore"):  # what is not finite shows in the scale of its block
            turns = vector.astype(np.float64) if name == CORE else turned(vector.astype(np.float64))
        blocks = np.pad(turns, (0, -size % BLOCK)).reshape(-1, BLOCK)
        longest = np.max(np.abs(blocks), axis=1, initial=0)
        usable = np.isfinite(longest) & (longest > 0)
        places = np.rint(
            levels_of(bits) * (np.where(usable[:, None], blocks, 0) / np.where(usable, longest, 1)[:, None])
        )
        written[:] = _bit_by_bit(places.reshape(-1)[:size].astype(np.int32) + levels_of(bits), bits)
        scale[:] = np.where(np.isfinite(longest), longest, np.nan)
    return {f"{name}/integers": integers, f"{name}/scales": scales}


def _vectors(read: dict, name: str, size: int, bits: int, dtype: Any, most: int, fewer: bool = False) -> np.ndarray:
    """[K, size], of arrays that are taken out of `read`.

    Args:
      most: K.
      fewer: whether there may be less of them.
    """
    got = {part: read.pop(f"{name}/{part}", np.zeros(0)) for part in ("integers", "scales")}
    number = got["scales"].shape[0] if fewer and got["scales"].ndim == 2 else most
    needed = {
        "integers": ((number, -(-size * bits // 8)), np.dtype(np.uint8)),
        "scales": ((number, -(-size // BLOCK)), np.dtype(np.float32)),
    }
    for part, array in got.items():
        if number > most or (array.shape, array.dtype) != needed[part]:
            what = f"{array.dtype} {[*array.shape]}, asked for {needed[part][1]} {[most, needed[part][0][1]]}"
            raise Malformed(f"{name}/{part}: it has sent {what}{' or less' if fewer else ''}")
    vectors, levels = np.zeros([number, size], dtype), levels_of(bits)
    for vector, integers, scales in zip(vectors, got["integers"], got["scales"], strict=True):
        places = _whole(integers, size, bits) - levels
        if np.any(places > levels) or np.any(scales < 0) or np.any(np.isinf(scales)):
            raise Malformed(f"{name}: an integer or a scale is out of its range")
        turns = np.repeat(scales.astype(np.float64), BLOCK)[:size] * (places / levels)
        vector[:] = turns if name == CORE else turned_back(turns)
    return vectors


def _bit_by_bit(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[n] uint8, of integers [size] of so many bits."""
    if bits == 8:
        return numbers.astype(np.uint8)
    wide = numbers.astype(">u2")[:, None].view(np.uint8)  # [size, 2]
    return np.packbits(np.unpackbits(wide, axis=-1)[:, 16 - bits :])


def _whole(written: np.ndarray, size: int, bits: int) -> np.ndarray:
    """[size] int32, what `_bit_by_bit` was given."""
    if bits == 8:
        return written.astype(np.int32)
    each = np.unpackbits(written)[: size * bits].reshape(size, bits)
    wide = np.packbits(np.pad(each, [(0, 0), (16 - bits, 0)]), axis=-1)
    return np.ascontiguousarray(wide).view(">u2")[:, 0].astype(np.int32)
