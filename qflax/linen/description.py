"""What of a model is quantized how, what is left alone, and why."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from qflax.errors import UserError
from qflax.quantizers import Quantization, Spec
from qflax.quantizers.spec import kind_of

_collected = contextvars.ContextVar("collected", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A layer of a model, or another place where it may be quantized.

    Attributes:
      path: `/` between module names.
      what: class of the layer, name of the function, ...
      specs: role -> quantizer, None for float; empty where no rule can quantize anything.
      note: why something is left alone.
    """

    path: str
    what: str
    specs: Mapping[str, Spec | None] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found; its text is a table.

    Attributes:
      places: in the order in which the model calls them.
      problems: rules that match nothing, a line each.
    """

    places: Sequence[Place]
    problems: Sequence[str]

    def __str__(self) -> str:
        rows = [("path", "what", "quantized", "left alone")]
        for place in self.places:
            quantized = [f"{role}: {_text(spec)}" for role, spec in place.specs.items() if spec is not None]
            rows.append((place.path, place.what, "; ".join(quantized), place.note))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def _text(spec: Spec) -> str:
    """The kind, and every field that differs from the default."""
    changed = [
        f"{field.name}={getattr(spec, field.name)}"
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != field.default
    ]
    return " ".join([kind_of(spec), *changed])


@contextlib.contextmanager
def collecting() -> Iterator[list[Place]]:
    """Within this, quantized models that are called add their places to the list."""
    places = []
    token = _collected.set(places)
    try:
        yield places
    finally:
        _collected.reset(token)


def tell(places: Sequence[Place]) -> bool:
    """Adds places to the list that is being collected; whether there is one."""
    if _collected.get() is None:
        return False
    _collected.get().extend(places)
    return True


def check(quantization: Quantization, places: Sequence[Place]) -> None:
    """Raises `UserError` for a rule, or a role of one, that applies to none of the places."""
    quantization.check((role, place.path) for place in places for role in place.specs)


def problems(quantization: Quantization, places: Sequence[Place]) -> list[str]:
    """What is wrong with each rule."""
    found = []
    for i, rule in enumerate(quantization.rules):
        try:
            check(dataclasses.replace(quantization, rules=(rule,)), places)
        except UserError as error:
            found.append(str(error).replace("rules[0]", f"rules[{i}]", 1))
    return found
