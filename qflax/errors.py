"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable

_LONGEST = 2000  # Characters of a line.


class UserError(Exception):
    """Bad input: one line that says what, where, the valid choices and the remedy.

    The command-line programs print the line and exit with code 2, without a traceback.
    """


class Interrupted(Exception):
    """A run that was asked to stop and did, having saved all; the same command continues it."""


def one_line(text: object) -> str:
    """As one line of printable characters; of a long one its two ends."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


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
