"""Files that are there whole or not at all, and folders that Python imports from."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

from qflax.errors import require


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Has an `OSError` of writing name the file; the system's own tells only the reason."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, error.filename or str(path)) from None


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Writes a file in place of what was there; whoever interrupts it leaves the old one or the new one.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), unfinished.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def require_makeable(folder: pathlib.Path) -> None:
    """Raises `UserError` where no such folder can be made, or nothing can be written to it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    require(existing.is_dir(), f"{folder}: {existing} is no folder; choose another one")
    require(
        os.access(existing, os.W_OK | os.X_OK),
        f"{folder}: nothing can be written to {existing}; change its permissions, or choose another folder",
    )


def make_importable(*folders: pathlib.Path) -> None:
    """Has Python look for modules in folders, too, behind all others."""
    for folder in folders:
        if str(folder.absolute()) not in sys.path:
            sys.path.append(str(folder.absolute()))
