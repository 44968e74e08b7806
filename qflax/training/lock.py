"""One run at a time in a workdir."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator

from qflax.errors import UserError

_FILE = ".lock"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the workdir, if need be, and keeps other processes that ask for it out of it.

    The lock is the system's: it ends with the process, however that ends. A workdir that nothing was written
    into is taken away again.

    Raises:
      UserError: another process has it, or it cannot be made.
    """
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open(workdir / _FILE)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{workdir}: another run is writing here ({_holder(file)}); wait for its end, or choose "
                "another --workdir"
            ) from None
        _tell_others(file)
        try:
            yield
        finally:
            if made and [path.name for path in workdir.iterdir()] == [_FILE]:
                (workdir / _FILE).unlink()
                workdir.rmdir()


def _open(path: pathlib.Path):
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")


def _tell_others(file) -> None:
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"process": os.getpid(), "host": platform.node(), "since": since}, file)
    file.flush()


def _holder(file) -> str:
    try:
        holder = json.load(file)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has only begun"
