"""What do clients keep between rounds, when there are too many of them for the device? Rows on the host."""

from typing import Any

import jax
import numpy as np


class HostStore:
    """The stores of the clients seen so far, on the host; all others have the blank one.

    It grows with the clients seen, not with the population.

    Args:
      blank: pytree of arrays, the store of a client that was never seen.
    """

    def __init__(self, blank: Any):
        self._blank = jax.tree.map(np.asarray, jax.device_get(blank))
        self._row_of: dict[int, int] = {}  # client id -> row
        self._rows = self._blanks(0)

    def __len__(self) -> int:
        """The number of clients seen."""
        return len(self._row_of)

    def rows(self, ids) -> Any:
        """The stores of the clients `ids` [C], stacked [C, ...]: NumPy arrays of their own."""
        found = self._blanks(len(ids))
        seen = [(place, self._row_of[id_]) for place, id_ in enumerate(np.asarray(ids).tolist()) if id_ in self._row_of]
        if seen:
            places, rows = map(list, zip(*seen, strict=True))
            for out, stacked in zip(jax.tree.leaves(found), jax.tree.leaves(self._rows), strict=True):
                out[places] = stacked[rows]
        return found

    def put(self, ids, rows) -> None:
        """Keeps `rows` [C, ...] as the stores of the clients `ids` [C]."""
        places = [self._row_of.setdefault(id_, len(self._row_of)) for id_ in np.asarray(ids).tolist()]
        self._reserve(len(self._row_of))
        for stacked, new in zip(jax.tree.leaves(self._rows), jax.tree.leaves(rows), strict=True):
            stacked[places] = np.asarray(new)

    def snapshot(self) -> dict:
        """{"ids": [S], "rows": copies of their stores [S, ...]} of the clients seen."""
        number = len(self)
        return {
            "ids": np.fromiter(self._row_of, np.int64, number),
            "rows": jax.tree.map(lambda rows: rows[:number].copy(), self._rows),
        }

    def blank_of(self, number: int) -> dict:
        """What a `snapshot` after so many clients looks like."""
        return {"ids": np.zeros(number, np.int64), "rows": self._blanks(number)}

    def _reserve(self, number: int) -> None:
        """Makes room for so many rows; doubling, each row is copied twice at most in the mean."""
        have = len(jax.tree.leaves(self._rows)[0]) if jax.tree.leaves(self._rows) else number
        if number > have:
            more = self._blanks(max(number, 2 * have) - have)
            self._rows = jax.tree.map(lambda old, new: np.concatenate([old, new]), self._rows, more)

    def _blanks(self, number: int) -> Any:
        return jax.tree.map(lambda leaf: np.repeat(leaf[None], number, axis=0), self._blank)
