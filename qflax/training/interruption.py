"""Requests to stop: SIGTERM, as schedulers send it, and Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from qflax.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(contextlib.AbstractContextManager):
    """Turns signals into a request that the program attends to when it can save what it has.

    Within the context the first SIGTERM or SIGINT is noted. After it a SIGINT is what it always was, so that
    a second Ctrl-C ends the program at once; further SIGTERMs, which schedulers may repeat, change nothing.
    Outside of the main thread, which alone gets signals, nothing is ever requested.

    Attributes:
      requested: name of the signal that came, or None.
    """

    def __init__(self):
        """Nothing is requested."""
        self.requested, self._at_once, self._before = None, False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if it was requested."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this, where there is nothing to save, a request raises `Interrupted` wherever it comes.

        Raises:
          Interrupted: also for one that came before.
        """
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame) -> None:
        del frame
        if self.requested is not None:
            return
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        # Not print: the signal may have come in the midst of one.
        os.write(sys.stderr.fileno(), f"{self.requested}: stopping\n".encode())
        if self._at_once:
            raise Interrupted(self.requested)
