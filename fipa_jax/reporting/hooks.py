"""Who is told of a run's rows: the writers that the config names, and a function of the user's."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from fipa_jax.reporting import console, metrics
from fipa_jax.reporting.writers import WRITERS, Run, Writer

Hook = Callable[[dict], Any]  # takes a row of metrics.jsonl
NOTHING = Writer(lambda row: None, lambda: None)


@contextlib.contextmanager
def told(workdir: Path, names: Sequence[str], runs: dict[str, Run], on_row: Hook | None) -> Iterator[Hook]:
    """A context with the function to call with every row of a run as it is written: it tells all who are to know.

    The rows that are there already, of a run that goes on, are told at once. So writers and `on_row` are told each row
    of the run exactly once, in order, whatever was told before the run was stopped. An error in one of them is a
    warning, said once: a writer is then left alone until the run goes on another time, `on_row` is called with the next
    row. KeyboardInterrupt in `on_row` ends the run. Only the first of several processes tells anybody.

    Args:
      workdir: of the run, with its metrics file.
      names: of the writers, `config.writers`.
      runs: the warm-up and the methods, by name.
      on_row: of the user's; gets a copy, to do with as it likes.
    """
    with contextlib.ExitStack() as opened:
        hooks = []
        if not jax.process_index():
            hooks = [opened.enter_context(_writer(name, workdir, runs)) for name in names]
            hooks += [warned_once("on_row (said once)", on_row)] if on_row else []

        def tell(row: dict) -> None:
            for hook in hooks:
                hook(row)

        for row in metrics.read(workdir / "metrics.jsonl") if hooks else ():
            tell(row)
        yield tell


@contextlib.contextmanager
def _writer(name: str, workdir: Path, runs: dict[str, Run]) -> Iterator[Hook]:
    """A context with what a writer is told by; it is closed at the end."""
    attempt = until_it_fails(f"config.writers: in {name!r}, from here on, the run")
    writer = attempt(WRITERS[name].open, workdir, runs) or NOTHING
    try:
        yield functools.partial(attempt, writer.write)
    finally:
        attempt(writer.close)


def until_it_fails(what: str) -> Callable:
    """`attempt(act, *args)`, which gives what act(*args) returns; after an error, a warning, it does nothing more.

    Args:
      what: is shown by it, for the warning.
    """
    works = True

    def call(act: Callable, *args: Any) -> Any:
        nonlocal works
        if not works:
            return None
        works = False
        result = act(*args)
        works = True
        return result

    return functools.partial(console.attempt, what, call)


def warned_once(what: str, hook: Hook) -> Hook:
    """The hook with a copy of each row, whose first error is a warning; it is called for the next row all the same.

    Args:
      what: is shown by it, for the warning.
    """
    failed = False

    def call(row: dict) -> None:
        nonlocal failed
        try:
            hook(copy.deepcopy(row))
        except Exception:
            first, failed = not failed, True
            if first:
                raise

    return functools.partial(console.attempt, what, call)
