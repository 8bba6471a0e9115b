"""How a run is stopped: a signal is noted, the round finished and saved; a second signal ends the process at once."""

import os
import signal
import threading
import time

from absl import logging

NUMBERS = (signal.SIGTERM, signal.SIGINT)
ECHO = 0.5  # seconds within which the same signal is the same wish: a terminal and a parent may both send it


class Stopped(Exception):
    """The run was asked to stop, and is saved."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.number = number  # of the signal


class Signals:
    """A context in which `asked` is the number of the signal that asked the run to stop; 0 before.

    A thread listens, as Python's own handlers wait until a compiled program returns, which may take minutes. Outside
    the main thread, where no handler can be set, signals do what they did.
    """

    def __init__(self):
        self.asked = 0

    def __enter__(self) -> "Signals":
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = {number: signal.signal(number, _ignore) for number in NUMBERS}
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._in_main_thread:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._writer)  # which ends the thread
            self._thread.join()

    def _listen(self, reader: int) -> None:
        """Hears each signal, of which Python writes the number as a byte, until the pipe is closed."""
        self._heard_at = 0.0
        with open(reader, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                if byte[0] in NUMBERS:
                    self._hear(byte[0])

    def _hear(self, number: int) -> None:
        """Notes the first signal; ends the process at the second one, unless it is the first one's echo."""
        now = time.monotonic()
        if self.asked == number and now < self._heard_at + ECHO:
            return
        if self.asked:
            os._exit(128 + number)
        self.asked, self._heard_at = number, now
        name = signal.Signals(number).name
        logging.warning("%s: finishing the round and saving it; a second signal ends the run at once", name)


def _ignore(number: int, frame) -> None:
    """Does nothing, as a handler: the thread hears the signal."""
