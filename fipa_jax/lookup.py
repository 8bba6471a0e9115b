"""Selection by name: the one place where a table is asked for an entry that a person has named."""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(table: Mapping[str, Entry], name: str, field: str) -> Entry:
    """The entry of a table; the error for a name that is not in it lists those that are, but for the empty name.

    Example:
      lookup({"sgd": 1, "adam": 2}, "adam", "local.optimizer") is 2.

    Args:
      table: {name: entry}.
      name: what was asked for.
      field: the config field, or the argument, that holds the name.

    Raises:
      ValueError: there is no such entry.
    """
    if name not in table:
        raise ValueError(f"{field}: unknown {name!r}; known: {', '.join(filter(None, sorted(table)))}")
    return table[name]
