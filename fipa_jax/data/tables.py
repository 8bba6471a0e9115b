"""Which columns of a table are inputs, targets and owners? Tables are read by pyarrow (extra `tables`).

A new kind of table is an entry of `READERS`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fipa_jax import installed

NUMBERING = r"|__index_level_\d+__"  # what pandas calls the numbers of a table's rows
MOST_WORDS = 50  # different ones in a column that becomes inputs, one for each


class Columns(NamedTuple):
    """Which columns of a table are what."""

    targets: tuple[str, ...] = ()  # their names; () for y
    inputs: tuple[str, ...] = ()  # () for all others
    client: str = "client"  # who owns a row, where the table says that; never an input


def read(file: str, path: Path, columns: Columns) -> dict[str, np.ndarray]:
    """{x [N, d], y [N, K] or [N] of words, client [N] where it is there} of a table.

    A column of numbers, or of true and false, is one input; one of words is one input for each of its words, 1 in the
    rows that hold it and 0 in others.

    Args:
      file: as the user has named it, for errors.
      path: of the table; its ending names the reader.

    Raises:
      ImportError: pyarrow is not installed.
      ValueError: the table cannot be read, lacks a column, one holds nothing in some rows, or one is two things.
    """
    targets = columns.targets or ("y",)
    taken = {*targets, columns.client}
    _check_once(targets, columns)
    names, column = _open(file, path)
    if columns.client != "client" and columns.client not in names:
        _refuse(file, f"has no column {columns.client!r}; it has {', '.join(names)}: see config.task.client")
    if not columns.inputs and (numbers := [name for name in names if re.fullmatch(NUMBERING, name)]):
        _refuse(file, f"has a column {numbers[0]!r}, a table's row numbers; leave it out (in pandas: index=False)")
    inputs = columns.inputs or tuple(name for name in names if name not in taken)
    for name in (*targets, *inputs):
        if name not in names:
            _refuse(file, f"has no column {name!r}; it has {', '.join(names)}: see config.task.targets")
    if not inputs:
        _refuse(file, "has no column besides its targets to learn them from")
    leave_out = f", or name in config.task.inputs those of {', '.join(names)} that it is to learn from"
    found = {"x": np.concatenate([_as_inputs(file, name, column(name, leave_out)) for name in inputs], axis=1)}
    found["y"] = _as_targets(file, targets, [column(name) for name in targets])
    if columns.client in names:
        owner = column(columns.client)
        found["client"] = owner if owner.dtype.kind in "iuU" else owner.astype(str)
    return found


def _check_once(targets: tuple[str, ...], columns: Columns) -> None:
    """Refuses a column that is named twice: a target, or the owner, among the inputs would tell the answer."""
    for field, names, others in (("targets", targets, ()), ("inputs", columns.inputs, targets)):
        for place, name in enumerate(names):
            also = "the owner, config.task.client" if name == columns.client else "a target" if name in others else ""
            also = f"config.task.{field} already" if name in names[:place] else also
            if also:
                raise ValueError(f"config.task.{field}: names {name!r}, which is {also}; name a column once")


def _refuse(file: str, what: str) -> NoReturn:
    """Raises the ValueError that says what is wrong with a table."""
    raise ValueError(f"config.task.file: {file!r} {what}")


def _open(file: str, path: Path) -> tuple[list[str], Callable[..., np.ndarray]]:
    """(names, column(name) [N]) of a table; only columns that are asked for need to be what can be learned from."""
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise ImportError(installed.missing("tables", f"config.task.file: reading {file!r}", "pyarrow")) from error
    try:
        table = READERS[path.suffix.lower()](path)
        names = table.column_names
    except (arrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        utf8 = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        _refuse(file, f"cannot be read as a {path.suffix} table: {str(error).splitlines()[0]}{utf8}")
    if len(set(names)) < table.num_columns:
        _refuse(file, f"has two columns of one name: {', '.join(names)}")
    return names, lambda name, or_else="": _column(file, name, table[name], or_else, arrow)


def _column(file: str, name: str, column: Any, or_else: str, arrow: Any) -> np.ndarray:
    """[N], a column without gaps, of numbers, of true and false, or of words; `or_else` is a further way out."""
    if arrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if arrow.types.is_binary(column.type):
        _refuse(file, f"has a column {name!r} whose words are not UTF-8; save the file as UTF-8{or_else}")
    of_words = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    gaps = column.is_null().to_numpy()
    array = column.fill_null("").to_numpy().astype(str) if of_words else column.to_numpy()
    gaps |= (array == "") if of_words else False
    if gaps.any():
        count, first = np.sum(gaps), np.argmax(gaps)
        _refuse(
            file, f"has nothing in {count} rows of column {name!r}, first in row {first}; fill or drop them{or_else}"
        )
    if array.dtype.kind not in "biufU":
        _refuse(file, f"has a column {name!r} of type {column.type}; make it numbers or words{or_else}")
    return array


def _as_inputs(file: str, name: str, column: np.ndarray) -> np.ndarray:
    """[N, columns] of float64: the numbers, or for each word whether the row holds it."""
    if column.dtype.kind != "U":
        return column.astype(np.float64)[:, None]
    words = np.unique(column)
    if len(words) > MOST_WORDS:
        _refuse(
            file,
            f"has {len(words)} different words in column {name!r}, more than {MOST_WORDS}: leave it out by "
            "config.task.inputs, or name it as config.task.client",
        )
    return (column[:, None] == words[None]).astype(np.float64)


def _as_targets(file: str, names: tuple[str, ...], columns: list[np.ndarray]) -> np.ndarray:
    """[N, K] of numbers, or [N] of words."""
    if len(columns) == 1:
        return columns[0]
    if any(column.dtype.kind == "U" for column in columns):
        _refuse(file, f"has words in one of the targets {', '.join(names)}: several targets need to be numbers")
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def _csv(path: Path) -> Any:
    """The table in a file of comma-separated values, whose first line names the columns.

    A word that stands for a gap, such as NA, is one, in columns of words and in quotes too.
    """
    from pyarrow import csv

    return csv.read_csv(path, convert_options=csv.ConvertOptions(strings_can_be_null=True))


def _parquet(path: Path) -> Any:
    """The table in a Parquet file."""
    from pyarrow import parquet

    return parquet.read_table(path)


READERS: dict[str, Callable[[Path], Any]] = {".csv": _csv, ".parquet": _parquet}  # ending -> path -> pyarrow's table
