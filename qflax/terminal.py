"""What a program tells while it runs, for as long as somebody reads it."""

import errno
import os
import typing

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class Outlived:
    """A text stream that its writer outlives: when its reader is gone, what is written to it is lost.

    With `train.py 2>&1 | tee log` Ctrl-C ends tee, too; the run still has to be saved.
    """

    def __init__(self, stream: typing.TextIO):
        """Of a stream with a file descriptor."""
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes it, or loses it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave_if_gone(error)
            return len(text)

    def flush(self) -> None:
        """Writes what is left, or loses it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave_if_gone(error)

    def _leave_if_gone(self, error: OSError) -> None:
        if error.errno not in _GONE:  # A full disk, say, may have room later.
            return
        # What the stream still holds would fail again, at the latest when Python ends, which changes the exit
        # code.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
