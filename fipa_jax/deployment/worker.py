"""How does a client stay warm between two messages? It answers on a Unix socket, in a process that goes on living.

Some transports start a process for every message (Flower's SuperNode does), in which jax would be imported, and the
round compiled, each time anew. That process then only relays: `ask` needs the standard library alone. What travels
over the socket are bytes, with their length before them, which nobody unpickles; its file is the user's own.
"""

import contextlib
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from absl import logging

DONE, FAILED = b"+", b"-"  # the first byte of an answer
LARGEST = 2**31 - 1  # bytes of a message


class Failed(RuntimeError):
    """The worker could not answer; says the kind of error alone, for its text may hold data."""


def serve(answer: Callable[[bytes], bytes], path: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Answers messages one after another, until the process ends.

    Example:
      serve(site.work, Path("/run/user/1000/hospital.sock"))

    Args:
      answer: a message -> its answer. What it raises is logged here, and the next message waited for.
      path: of the socket; readable by this user alone.
      stop: is asked after each answer.

    Raises:
      OSError: the path is not free: another worker answers there, or it is too long for a socket (about 100 bytes).
    """
    _clear(path)
    before = os.umask(0o177)
    try:
        listener = Listener(str(path), "AF_UNIX", backlog=16)
    finally:
        os.umask(before)
    with listener:
        while True:
            with contextlib.suppress(OSError, EOFError), listener.accept() as connection:  # whoever asked is gone
                _answer(answer, connection)
            if stop():
                return


def ask(path: Path, message: bytes, patience: float = 60.0) -> bytes:
    """A worker's answer.

    Args:
      path: of its socket.
      message: for it.
      patience: seconds in which it may still be starting.

    Raises:
      Failed: it could not answer; its own log says why.
      OSError: nobody answers at the path.
    """
    end = time.monotonic() + patience
    while True:
        try:
            connection = Client(str(path), "AF_UNIX")
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)
    with connection:
        connection.send_bytes(message)
        got = connection.recv_bytes(LARGEST)
    if got[:1] != DONE:
        raise Failed(got[1:].decode(errors="replace"))
    return got[1:]


def _answer(answer: Callable[[bytes], bytes], connection: Connection) -> None:
    """Answers one message, or says which kind of error it met."""
    message = connection.recv_bytes(LARGEST)
    start = time.perf_counter()
    try:
        got = DONE + answer(message)
        logging.info("%d bytes answered by %d in %.6f seconds", len(message), len(got), time.perf_counter() - start)
    except Exception as error:
        logging.exception("a message could not be answered")
        got = FAILED + type(error).__name__.encode()
    connection.send_bytes(got)


def _clear(path: Path) -> None:
    """Removes the socket of a worker that is no more; refuses where one answers."""
    if not path.exists():
        return
    try:
        Client(str(path), "AF_UNIX").close()
    except ConnectionRefusedError:
        path.unlink()
        return
    raise FileExistsError(f"{path}: another worker answers there")
