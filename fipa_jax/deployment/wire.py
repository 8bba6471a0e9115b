"""What travels between a server and its clients? Named arrays as bytes, which show when they are damaged.

The bytes have the layout of safetensors, which other languages read too: the length of a header (8 bytes, little
endian), the header (JSON: each array's type, shape and place; texts in `__metadata__`), the arrays' entries one after
another. Whoever reads them needs NumPy alone, and ml_dtypes for bfloat16. Nothing is unpickled, and nothing of what a
header claims is believed before it is checked: no array is made that the bytes at hand do not fill.

The arrays of a `Message`, by name:

    broadcast   params/PATH   the trainable parameters
                due           [] bool, where not all clients of a round send curvature: whether whoever reads this does
                run           [8] uint8, where clients keep something from round to round: another in each run
                told/NAME     what the rule announces: its damping [], or its belief, told/posterior/precision [P]
                asked/0, ...  what a rule asks along: its common basis, and how many columns are in use; with a budget
                              the least eigenvalue that is sent, []
    upload      delta/PATH    the client's new minus the broadcast parameters
                num_examples  [], of the client
                local_loss    [], the mean training loss over its steps
                loss, damping                   [], where the rule asks for them, see `aggregate.Uploads`
                sketch/eigenvalues, basis       [K] and [P, K], the K pairs of the sketch that are not zero
                sketch/rank                     [], R, with how many pairs it was asked for
                sketch/report/...               of the sketch; its residuals are those of the K pairs
                diagonal/values                 [P]
                image/values                    [P, s], of the common basis
                core/values                     [k (k + 1) / 2], within it: the upper half, by rows, of k columns in use
                layers/inputs/PATH, outputs/PATH  halves of a layer's symmetric factors, see `curvature.LayerFactors`

What is sent in few bits has two arrays for one, NAME/integers and NAME/scales, an update of few entries delta/places
and delta/values: see `deployment.packing`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

FORMAT, VERSION = "fipa_jax", "4"
KINDS = ("broadcast", "upload")
NOBODY = -1  # the client of a broadcast, which is for all of them
LONGEST_HEADER = 2**24  # bytes
MOST_AXES = 16
# The types of arrays, as safetensors calls them.
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
NAMES = {name: code for code, name in TYPES.items()}
ABOUT = "__metadata__"  # where safetensors keeps texts


class Malformed(ValueError):
    """The bytes are no message, or not this federation's; says why."""


class Message(NamedTuple):
    """What travels."""

    kind: str  # of `KINDS`
    fingerprint: str  # of the parameters that it is about, see `fingerprint`
    round: int  # that it begins, or that it answers
    client: int  # whose upload it is; `NOBODY` of a broadcast
    arrays: dict[str, np.ndarray]  # {name: array}


def fingerprint(params: Mapping[str, Any], frozen: Mapping[str, np.ndarray] | None = None, config: str = "") -> str:
    """What tells two agreements apart: SHA-256 of what is trained, by paths, types and shapes, and of frozen values.

    Example:
      fingerprint({"Dense_0/kernel": np.zeros([3, 4], np.float32)})

    Args:
      params: {path: array, or its shape and type} of what is trained.
      frozen: {path: array} of what is not: clients that have others would send answers to another question.
      config: what they work by, in words of any kind.
    """
    total = hashlib.sha256()
    for path in sorted(params):
        total.update(f"{path}\t{_name_of(params[path].dtype)}\t{[*map(int, params[path].shape)]}\n".encode())
    for path in sorted(frozen or {}):
        leaf = np.ascontiguousarray((frozen or {})[path])
        total.update(f"{path}\t{leaf.dtype.name}\t{[*leaf.shape]}\n".encode())
        total.update(leaf.reshape(-1).view(np.uint8))
    total.update(config.encode())
    return total.hexdigest()


def pack(message: Message) -> bytes:
    """The bytes of a message.

    Example:
      unpack(pack(message)) == message, up to the order of its arrays.

    Raises:
      ValueError: an array's type is none of `TYPES`.
    """
    # The widest first, so that each array begins at a multiple of its entries' size.
    arrays = sorted(message.arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, parts, end = {}, [], 0
    for name, array in arrays:
        code, begin, end = NAMES.get(array.dtype.name), end, end + array.nbytes
        if code is None:
            raise ValueError(f"{name}: arrays of {array.dtype} do not travel; these do: {', '.join(NAMES)}")
        header[name] = {"dtype": code, "shape": [*array.shape], "data_offsets": [begin, end]}
        parts.append(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)))
    texts = {"format": FORMAT, "version": VERSION, "kind": message.kind, "fingerprint": message.fingerprint}
    texts |= {"round": str(message.round), "client": str(message.client)}
    views = [part.reshape(-1).view(np.uint8).data for part in parts]
    header[ABOUT] = texts | {"sha256": _digest(header | {ABOUT: texts}, views)}
    written = _canonical(header)
    written += b" " * (-len(written) % 8)  # the entries begin at a multiple of 8
    return b"".join([len(written).to_bytes(8, "little"), written, *views])


def unpack(blob: bytes) -> Message:
    """The message of some bytes; its arrays are views of them, and read-only.

    Raises:
      Malformed: whatever is wrong with them.
    """
    try:
        return _unpack(memoryview(blob).cast("B"))
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise Malformed(f"it cannot be read: {type(error).__name__}: {error!s:.200}") from None


def _unpack(blob: memoryview) -> Message:
    """The same, with whatever error of Python's."""
    header, data = _split(blob)
    about = header.pop(ABOUT, None)
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise Malformed("its header has no __metadata__")
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        got = f"{about.get('format')!s:.20} {about.get('version')!s:.20}"
        raise Malformed(f"it is of format {got}, needed {FORMAT} {VERSION}: other versions of fipa_jax are at work")
    _check_places(header, len(data))
    written = about.pop("sha256", None)
    if _digest(header | {ABOUT: about}, [data]) != written:
        raise Malformed("it was damaged on its way: it is not what its SHA-256 says")
    arrays = {name: _array(entry, data) for name, entry in header.items()}
    kind = about["kind"]
    if kind not in KINDS:
        raise Malformed(f"it is a {kind!s:.20}, needed one of {', '.join(KINDS)}")
    return Message(kind, about["fingerprint"], int(about["round"]), int(about["client"]), arrays)


def client_of(blob: bytes) -> int:
    """The client whose upload this says it is, from its header alone; whether it was damaged shows when it is read.

    Raises:
      Malformed: there is no such header.
    """
    try:
        return int(_split(memoryview(blob).cast("B"))[0][ABOUT]["client"])
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Malformed(f"its header does not say who sent it: {type(error).__name__}") from None


def expect(blob: bytes, kind: str, fingerprint: str) -> Message:
    """The message of some bytes, of this kind and about these parameters.

    Raises:
      Malformed: it is another.
    """
    message = unpack(blob)
    if message.kind != kind:
        raise Malformed(f"it is a message of kind {message.kind}, needed {kind}")
    if message.fingerprint != fingerprint:
        raise Malformed(
            "it is about other parameters, or of another config: paths, types, shapes, the values of what is not "
            "trained, or the fields that clients work by differ; let server and clients have the same config, method "
            "and first model"
        )
    return message


def kept_pairs(eigenvalues: np.ndarray) -> np.ndarray:
    """[R] bool: the pairs that travel. A NaN does, so that whoever receives it can see it."""
    return ~(np.asarray(eigenvalues) == 0)


def _split(blob: memoryview) -> tuple[dict, memoryview]:
    """(the header, the arrays' entries)."""
    if len(blob) < 8:
        raise Malformed(f"it has {len(blob)} bytes, and its header's length alone takes 8")
    length = int.from_bytes(blob[:8], "little")
    if length > min(LONGEST_HEADER, len(blob) - 8):
        raise Malformed(f"its header would have {length} bytes, of {len(blob) - 8} there are")
    header = json.loads(bytes(blob[8 : 8 + length]), object_pairs_hook=_without_doubles, parse_constant=_refuse)
    if not isinstance(header, dict):
        raise Malformed("its header is no JSON object")
    return header, blob[8 + length :]


def _without_doubles(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise Malformed("its header names a thing twice")
    return dict(pairs)


def _refuse(text: str):
    raise Malformed(f"its header holds {text}")


def _check_places(header: dict, size: int) -> None:
    """Looks that the arrays lie one after another, and fill the entries at hand to the last byte."""
    end = 0
    for name, entry in sorted(header.items(), key=_place):
        begin, stop = entry["data_offsets"]
        shape = entry["shape"]
        if entry["dtype"] not in TYPES:
            raise Malformed(f"{name:.100}: its type is {entry['dtype']!s:.20}, needed one of {', '.join(TYPES)}")
        if not _sound(shape) or len(shape) > MOST_AXES or math.prod(shape) > size:
            raise Malformed(f"{name:.100}: its shape is {shape!s:.100}, of {size} bytes there are")
        if begin != end or stop - begin != math.prod(shape) * _dtype(entry["dtype"]).itemsize:
            raise Malformed(f"{name:.100}: its place is {begin} to {stop}, needed its shape's size from {end} on")
        end = stop
    if end != size:
        raise Malformed(f"its arrays have {end} bytes, and {size} are there")


def _place(item: tuple[str, Any]) -> list:
    """Where an array lies: [begin, end]; raises where its entry is not as it should be."""
    name, entry = item
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{name:.100}: needed dtype, shape and data_offsets, got {entry!s:.100}")
    if not _sound(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise Malformed(f"{name:.100}: its place is {entry['data_offsets']!s:.100}")
    return entry["data_offsets"]


def _sound(numbers: Any) -> bool:
    """Whether these are integers that can count entries; a bool is none."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _array(entry: dict, data: memoryview) -> np.ndarray:
    """An array whose place was checked."""
    begin, stop = entry["data_offsets"]
    dtype = _dtype(entry["dtype"])
    if begin == stop:
        return np.zeros(entry["shape"], dtype)
    array = np.frombuffer(data[begin:stop], dtype.newbyteorder("<")).reshape(entry["shape"])
    if entry["dtype"] == "BOOL" and np.any(array.view(np.uint8) > 1):
        raise Malformed("a truth value is neither 0 nor 1")
    return array.astype(dtype, copy=False)  # in this machine's byte order


def _dtype(code: str) -> np.dtype:
    """The NumPy type of a safetensors type."""
    if code == "BF16":
        import ml_dtypes  # comes with jax; who sends no bfloat16 can do without

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(TYPES[code])


def _name_of(dtype: Any) -> str:
    return np.dtype(dtype).name


def _digest(header: dict, entries: Iterable) -> str:
    """SHA-256 of a header, its own left out, and of the arrays' entries."""
    total = hashlib.sha256(_canonical(header))
    for view in entries:
        total.update(view)
    return total.hexdigest()


def _canonical(header: dict) -> bytes:
    """A header as the same bytes whoever writes them: sorted names, no blanks, ASCII."""
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
