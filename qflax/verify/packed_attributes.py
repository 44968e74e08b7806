"""What the nodes of packed files must look like: attributes and numbers of inputs of every operation."""

import functools
import typing

from qflax.verify.executor import BINARY, UNARY
from qflax.verify.formats import ROUNDINGS, Format, IntegerFormat, MinifloatFormat


def whole(value: object, least: int | None = None) -> int:
    """A JSON number without a fraction; ValueError if it is none, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or least is not None and value < least:
        raise ValueError(f"{value!r} is no whole number{'' if least is None else f' of {least} or more'}")
    return value


positive = functools.partial(whole, least=1)
natural = functools.partial(whole, least=0)


def accumulator_bits(value: object) -> int:
    """A promised width."""
    if positive(value) > 64:
        raise ValueError(f"accumulator_bits={value}: at most 64 can be promised")
    return value


def tuple_of(parse, value: object, length: int | None = None) -> tuple:
    """A JSON list of what `parse` accepts."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{value!r} is no list{'' if length is None else f' of {length}'}")
    return tuple(parse(item) for item in value)


def format_of(fields: dict[str, typing.Any]) -> Format:
    """A number format of JSON."""
    fields = dict(fields)
    kind = fields.pop("kind")
    names = {
        "integer": {"bits": positive, "signed": _flag, "narrow": _flag},
        "minifloat": {
            **dict.fromkeys(("exponent_bits", "mantissa_bits", "bias"), whole),
            **dict.fromkeys(("signed", "subnormals", "saturate"), _flag),
            "specials": str,
        },
    }.get(kind)
    if names is None:
        raise ValueError(f"format of kind {kind!r} is unknown; kinds: integer, minifloat")
    if sorted(fields) != sorted(names):
        raise ValueError(f"format {kind} has {sorted(fields)}; it must have {sorted(names)}")
    fields = {name: parse(fields[name]) for name, parse in names.items()}
    return IntegerFormat.of(**fields) if kind == "integer" else MinifloatFormat(**fields)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _rounding(value: object) -> str:
    if value not in ROUNDINGS:
        raise ValueError(f"rounding {value!r} is unknown; choices: {', '.join(ROUNDINGS)}")
    return value


def _index(value: object) -> int | None:
    return None if value is None else whole(value)


_pair = functools.partial(tuple_of, positive, length=2)
_border = functools.partial(tuple_of, natural, length=2)
_borders = functools.partial(tuple_of, _border)
_axes = functools.partial(tuple_of, natural)
_indices = functools.partial(tuple_of, _index)
_places = {"strides": _pair, "padding": functools.partial(tuple_of, _border, length=2)}

# Operation -> parsers of its attributes, possible numbers of inputs.
ATTRIBUTES = {
    "quantize": ({"format": format_of, "rounding": _rounding}, (2, 3)),
    "conv": ({**_places, "dilation": _pair, "groups": positive}, (2,)),
    "dense": ({}, (2,)),
    **dict.fromkeys(BINARY, ({}, (2,))),
    **dict.fromkeys(UNARY, ({}, (1,))),
    "select": ({}, (3,)),
    "power": ({"exponent": whole}, (1,)),
    **dict.fromkeys(("max_pool", "sum_pool"), ({**_places, "window": _pair}, (1,))),
    **dict.fromkeys(("sum", "max"), ({"axes": _axes}, (1,))),
    "pad": ({"padding": _borders}, (1,)),
    "slice": (dict.fromkeys(("start", "stop", "step"), _indices), (1,)),
    "reshape": ({"shape": functools.partial(tuple_of, functools.partial(whole, least=-1))}, (1,)),
    "transpose": ({"permutation": _axes}, (1,)),
    "concatenate": ({"axis": natural}, range(1, 10000)),
}
