"""Files of unknown origin: they are read within limits, and what is damaged is a ValueError."""

import errno
import os
import stat
import struct
import typing
import zipfile
import zlib
from collections.abc import Sequence

ELEMENTS = 2**26  # Of any array; the largest of a ResNet for ImageNet has 2^22.
TOTAL = 2**29  # Elements of all arrays that are kept.
INFLATED = 2**28  # Bytes of an archive's members, unless the archive itself is larger.
_AXES = 64  # NumPy has no more.
_ENCRYPTED = 1  # Bit of a member's flags.


def open_file(path: str | os.PathLike) -> typing.BinaryIO:
    """The opened file; OSError where there is none, or a pipe or device, which may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is no regular file")
    return open(path, "rb")


def size_of(shape: Sequence[int], least: int = 1) -> int:
    """Elements of an array; ValueError if there cannot be such an array, or it is larger than any need be."""
    if len(shape) > _AXES:
        raise ValueError(f"{len(shape)} axes are more than {_AXES}")
    size = 1
    for n in shape:
        if isinstance(n, bool) or not isinstance(n, int) or n < least:
            raise ValueError(f"{n!r} is no whole number of {least} or more")
        size *= n
        if max(size, n) > ELEMENTS:
            raise ValueError(f"an array of more than {ELEMENTS:,} elements")
    return size


class Archive:
    """Members of a ZIP archive, each read whole.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the archive is damaged, or its members are larger than `INFLATED`.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = open_file(path)
        try:
            self._archive = _told(zipfile.ZipFile, self._file)
            members = self._archive.infolist()
            self._members = {member.filename: member for member in members}
            if len(self._members) < len(members):
                raise ValueError("two members have the same name")
            limit = max(INFLATED, os.fstat(self._file.fileno()).st_size)
            if sum(member.file_size for member in members) > limit:
                raise ValueError(f"its members have more than {limit:,} bytes")
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_):
        self._archive.close()
        self._file.close()

    @property
    def names(self) -> list[str]:
        """Of the members."""
        return list(self._members)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A member of at most `limit` bytes."""
        if name not in self._members:
            raise ValueError(f"there is no {name}")
        member = self._members[name]
        if limit is not None and member.file_size > limit:
            raise ValueError(f"{name} has {member.file_size:,} bytes, more than {limit:,}")
        # Other methods are inflated without a limit.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by a method that is not read")
        if member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted")
        data = _told(self._read, member)
        if len(data) != member.file_size:
            raise ValueError(f"{name} has {len(data)} bytes, not {member.file_size}")
        return data

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        with self._archive.open(member) as file:
            return file.read(member.file_size)  # Without a number all of a bomb would be inflated.


def _told(function: typing.Callable, *arguments) -> typing.Any:
    """The result; what the library raises of damaged data becomes a ValueError."""
    try:
        return function(*arguments)
    except (
        *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, OSError),
        *(NotImplementedError, RuntimeError, OverflowError, IndexError, KeyError),
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from None
