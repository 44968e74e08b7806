"""Requests to stop: SIGTERM, as schedulers send it, and Ctrl-C."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from qflax.errors import Interrupted


class Interruption(contextlib.AbstractContextManager):
    """Turns signals into a request that the program attends to when it can save what it has.

    Within the context the first SIGTERM or SIGINT is noted. After it a SIGINT is what it always was, so that
    a second Ctrl-C ends the program at once; further SIGTERMs, which schedulers may repeat, change nothing.
    Outside of the main thread, which alone gets signals, nothing is ever requested.

    Of several processes a signal to one is a request to all, which JAX has them agree on: they stop after the
    same dispatch, and `at_once` waits for that, too.

    Attributes:
      requested: name of the signal that came, or None.
    """

    def __init__(self):
        """Nothing is requested."""
        self.requested, self._at_once, self._before = None, False, {}
        self._several = jax.process_count() > 1
        self._checks = itertools.count()  # JAX's agreement needs numbers that grow by one.
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
            if self._several:  # SIGTERM is JAX's.
                handlers = {signal.SIGINT: self._pass_on}
            for number, handler in handlers.items():
                if signal.getsignal(number) != signal.SIG_IGN:  # As of Ctrl-C in jobs in the background.
                    self._before[number] = signal.signal(number, handler)
            sys.unraisablehook = self._leave_noted
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable

    def _leave_noted(self, unraisable) -> None:
        """Python raises nothing out of callbacks of its own; the request stays, and is attended to later."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._unraisable(unraisable)

    def check(self) -> None:
        """Raises `Interrupted` if it was requested; of several processes all must call it equally often."""
        if self._several and multihost_utils.reached_preemption_sync_point(next(self._checks)):
            self.requested = "SIGTERM"
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
            if self.requested is not None:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = False

    def _pass_on(self, number: int, frame) -> None:
        """To JAX, which has all processes agree."""
        del number, frame
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame) -> None:
        del frame
        if self.requested is not None:
            return
        self.requested = signal.Signals(number).name
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        # Not print: the signal may have come in the midst of one. It may have ended who reads this, too.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), f"{self.requested}: stopping\n".encode())
        if self._at_once:
            raise Interrupted(self.requested)
