"""Files that are there whole or not at all."""

import os
import pathlib


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Writes a file in place of what was there; whoever interrupts it leaves the old one or the new one.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
