"""Files that are there whole or not at all."""

import os
import pathlib
import tempfile

from qflax.errors import require


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Writes a file beside its place and then moves it there, so that no reader ever finds a part of it.

    Args:
      path: of the file; one that is there already is replaced.
      data: all of its content; text becomes UTF-8.
    """
    mode = "wb" if isinstance(data, bytes) else "w"
    encoding = None if isinstance(data, bytes) else "utf-8"
    unfinished = tempfile.NamedTemporaryFile(
        mode, encoding=encoding, prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent, delete=False
    )
    try:
        with unfinished as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished.name, 0o666 & ~_umask())  # Temporary files are their owner's alone.
        os.replace(unfinished.name, path)
    except BaseException:
        os.unlink(unfinished.name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_makeable(folder: pathlib.Path) -> None:
    """Raises `UserError` where no such folder can be made or written to, before anything is computed for it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    require(existing.is_dir(), f"{folder}: {existing} is a file; choose another folder")
    require(
        os.access(existing, os.W_OK | os.X_OK),
        f"{folder}: nothing can be written to {existing}; change its permissions, or choose another folder",
    )
