"""Errors that a user can act on."""

import difflib
import errno
from collections.abc import Iterable

# Exit codes of the programs.
FAILED = 1  # A verification found something.
BAD_INPUT = 2  # Anything that the user can put right.
INTERRUPTED = 75  # A run that can go on: EX_TEMPFAIL, "try again later".
ABORTED = 130  # Anything else after Ctrl-C, as shells have it.

_LONGEST = 1400  # Characters of a line.
_LONGEST_VALUE = 300  # Characters of a value in a message.

# What to do about errors of the operating system.
_REMEDIES = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "free space within your quota, or choose another folder",
    errno.EROFS: "choose a folder on a file system that can be written to",
    errno.EACCES: "check its permissions, or choose another path",
    errno.EPERM: "check its permissions, or choose another path",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


class UserError(Exception):
    """Bad input: one line that says what, where, the valid choices and the remedy.

    The command-line programs print the line and exit with code 2, without a traceback.
    """


class Interrupted(BaseException):
    """A run that was asked to stop and did, having saved all; the same command continues it.

    It comes out of a signal's handler, so that it may be raised anywhere: as KeyboardInterrupt is, it is no
    `Exception`, which code that reads a damaged file, say, would take for a damage.
    """


def one_line(text: object, longest: int = _LONGEST) -> str:
    """As one line of printable characters; of a long one its two ends."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


def closest(name: str, choices: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the choice nearest to `name`, or "" if none is near."""
    matches = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def choose(field: str, value: object, choices: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{field}={value!r}: unknown{closest(value, choices)}; choices: {', '.join(choices)}")


def shown(value: object, *, plain: bool = False) -> str:
    """Returns the value's `repr` (`plain`: its text) on one line, without the middle of a long one."""
    return one_line((str if plain else repr)(value), _LONGEST_VALUE)


def told(error: Exception) -> str | None:
    """Returns what to tell the user of an error, or None of one that is a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)  # Of JAX, on a device.
    ):
        reason = shown(error, plain=True)
        return f"out of memory ({reason}); lower config.batch_size or config.eval_batch_size"
    if isinstance(error, OSError) and error.errno is not None:  # Those without are of libraries.
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno)
        return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")
    return None
