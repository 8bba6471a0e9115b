"""A user's own data, read from an .npz file or a table that nobody has to trust: nothing in it is unpickled.

Every error names the file, what is wrong with it, and what to change.
"""

import difflib
import os
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from fipa_jax.data import tables
from fipa_jax.data.partition import BROKEN, why
from fipa_jax.files import local

NAMES = ("x", "y", "x_test", "y_test", "x_public", "client", "client_test")  # of the arrays that are known
RECIPE = 'np.savez("mine.npz", x=x, y=y)'


def read(file: str, columns: tables.Columns = tables.Columns()) -> dict[str, np.ndarray]:
    """{name: array} of what a file holds, checked: x, y, and where they are there the others of `NAMES`.

    Args:
      file: its path, `config.task.file`: an .npz of arrays by these names, or a table, see `tables.READERS`.
      columns: which columns of a table are what.

    Returns:
      x [N, d] in float64; y [N, K] in float64, or [N] of words; x_test and y_test alike;
      client [N] and client_test, integers or words; x_public [N, d], inputs that are nobody's.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a package that reading a table needs is not installed.
      ValueError: the file is no .npz of plain arrays that fit together, or no table with these columns.
    """
    path = local(file, "config.task.file")
    if not path.is_file():
        raise FileNotFoundError(f"config.task.file: no file at {file!r}; give the path of an .npz with arrays x and y")
    if path.suffix.lower() in tables.READERS:
        arrays = tables.read(file, path, columns)
    else:
        _check_no_columns(file, columns)
        arrays = _arrays(file, path)
    arrays |= _pair(file, arrays, "x", "y")
    if "x_test" in arrays:
        arrays |= _pair(file, arrays, "x_test", "y_test")
        _check_columns(file, arrays, ("x", "x_test"), ("y", "y_test"))
    if "x_public" in arrays:
        nobodys = {"x_public": arrays["x_public"], "nothing": np.zeros(len(arrays["x_public"]))}
        arrays["x_public"] = _pair(file, nobodys, "x_public", "nothing")["x_public"]
        _check_columns(file, arrays, ("x", "x_public"))
    if "client" in arrays:
        _check_client(file, "client", arrays["client"], len(arrays["x"]))
    if "client_test" in arrays:
        if "client" not in arrays or "x_test" not in arrays:
            refuse(file, "has client_test, but not both client and x_test; add them, or leave it out")
        _check_client(file, "client_test", arrays["client_test"], len(arrays["x_test"]))
        if unknown := sorted(set(arrays["client_test"].tolist()) - set(arrays["client"].tolist())):
            refuse(file, f"has test examples of client {unknown[0]!r}, who has none to train on")
    return arrays


def _check_no_columns(file: str, columns: tables.Columns) -> None:
    """Refuses columns by name where there are none."""
    for field in ("targets", "inputs"):
        if named := getattr(columns, field):
            raise ValueError(
                f"config.task.{field}: names columns of a table, and {file!r} holds arrays, all of x and y; set it to "
                f"(), got {named}"
            )
    if columns.client != "client":
        raise ValueError(
            f"config.task.client: names a column of a table, and {file!r} holds arrays, the owners in client; leave it "
            f"at 'client', got {columns.client!r}"
        )


def _arrays(file: str, path: Path) -> dict[str, np.ndarray]:
    """Those arrays of an .npz that are known."""
    with path.open("rb") as stream:
        archive = _open(file, stream)
        _check_spelling(file, archive.files)
        arrays = {name: _array(file, archive, name) for name in NAMES if name in archive.files}
    _check_complete(file, arrays)
    return arrays


def refuse(file: str, what: str) -> NoReturn:
    """Raises the ValueError that says what is wrong with the file of a user's arrays."""
    raise ValueError(f"config.task.file: {file!r} {what}") from None


def _open(file: str, stream: BinaryIO) -> np.lib.npyio.NpzFile:
    """The archive in an open file, if it is one, and lists as many arrays as it holds."""
    try:
        archive = np.load(stream, allow_pickle=False)
    except BROKEN as error:
        refuse(file, f"is no .npz archive{why(error)}, and nothing is unpickled; write one with {RECIPE}")
    if not isinstance(archive, np.lib.npyio.NpzFile):
        refuse(file, f"holds one bare array and is no .npz archive; write one with {RECIPE}")
    stream.seek(-12 - len(archive.zip.comment), os.SEEK_END)  # a number that zipfile does not look at
    if (count := int.from_bytes(stream.read(2), "little")) != len(archive.files):
        refuse(file, f"is damaged: it should hold {count} arrays, but lists {archive.files}; write it anew")
    return archive


def _check_spelling(file: str, names: list[str]) -> None:
    """Refuses a name that is nearly a known one."""
    for name in sorted({*names} - {*NAMES}):  # one flipped bit makes another name, too
        if near := difflib.get_close_matches(name, [*NAMES, *(f"{known}.npy" for known in NAMES)], 1, cutoff=0.8):
            refuse(file, f"has an array {name!r}; did you mean {near[0].removesuffix('.npy')!r}?")


def _check_complete(file: str, arrays: dict) -> None:
    """Refuses a file without x or y, and one with half a test set."""
    for name in ("x", "y"):
        if name not in arrays:
            refuse(file, f"has no array {name!r}; write one with {RECIPE}")
    if ("x_test" in arrays) != ("y_test" in arrays):
        refuse(file, "has one of x_test and y_test; add the other one, or leave both out")


def _array(file: str, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """One array of real numbers, or of words where there may be some."""
    try:
        array = archive[name]
    except BROKEN as error:
        refuse(file, f"has a {name!r} that cannot be read{why(error)}; nothing is unpickled: save plain numbers")
    words = "" if name.startswith("x") else "U"
    if array.dtype.kind not in "biuf" + words:
        refuse(file, f"has {name!r} of dtype {array.dtype}; save real numbers{' or words' if words else ''}")
    return array


def _pair(file: str, arrays: dict, inputs: str, targets: str) -> dict[str, np.ndarray]:
    """{name: array} of inputs [N, d] and targets [N, K] in float64, checked; numbers [N] become [N, 1]."""
    x, y = arrays[inputs], arrays[targets]
    if x.ndim != 2:
        refuse(file, f"has {inputs} of shape {list(x.shape)}; make it [N, d], a single column by x.reshape(-1, 1)")
    if y.ndim not in (1, 2):
        refuse(file, f"has {targets} of shape {list(y.shape)}; make it [N] or [N, K]")
    if len(x) != len(y):
        refuse(file, f"has {len(x)} rows in {inputs} but {len(y)} in {targets}; make them equal")
    if not x.size or not y.size:
        refuse(file, f"has {inputs} of shape {list(x.shape)} and {targets} of {list(y.shape)}: nothing is in there")
    if y.dtype.kind == "U" and y.ndim > 1:
        refuse(file, f"has words in {targets} of shape {list(y.shape)}; make it [N], one class for each example")
    pair = {inputs: x.astype(np.float64)}
    pair[targets] = y if y.dtype.kind == "U" else y.reshape(len(y), -1).astype(np.float64)
    for name, array in pair.items() if y.dtype.kind != "U" else [(inputs, pair[inputs])]:
        _check_finite(file, name, array)
    return pair


def _check_finite(file: str, name: str, array: np.ndarray) -> None:
    """Refuses NaN and infinity in an array [N, d]."""
    wrong = np.flatnonzero(~np.all(np.isfinite(array), axis=1))
    if wrong.size:
        refuse(file, f"has NaN or infinity in {wrong.size} rows of {name}, first in row {wrong[0]}; drop them")


def _check_columns(file: str, arrays: dict, *pairs: tuple[str, str]) -> None:
    """Refuses a test set, or public inputs, with other numbers of columns than the training set has."""
    for name, other in pairs:
        if arrays[name].ndim != arrays[other].ndim:
            refuse(file, f"has words in one of {name} and {other}; save both alike")
        wide, theirs = (arrays[each].shape[1:] or (1,) for each in (name, other))
        if theirs != wide:
            refuse(file, f"has {wide[0]} columns in {name} but {theirs[0]} in {other}; make them equal")


def _check_client(file: str, name: str, client: np.ndarray, num_examples: int) -> None:
    """Refuses owners that are not one integer or word for each example."""
    if client.dtype.kind not in "iuU" or client.shape != (num_examples,):
        refuse(
            file,
            f"has {name} of dtype {client.dtype} and shape {list(client.shape)}; make it integers or words "
            f"[{num_examples}]",
        )
