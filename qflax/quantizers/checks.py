"""Checks of single fields that several specs have."""

import typing

from qflax.errors import choose, require

GRANULARITIES = ("per_tensor", "per_channel")

_SMALLEST, _LARGEST = 1e-30, 1e9  # Within them products of a few are float32.


def check_flag(spec: typing.Any, *names: str, or_none: bool = False) -> None:
    """Raises `UserError` unless the fields are True or False, or None if allowed."""
    for name in names:
        value = getattr(spec, name)
        choices = "None, True or False" if or_none else "True or False"
        ok = isinstance(value, bool) or (or_none and value is None)
        require(ok, f"{name}={value!r}: must be {choices}")


def check_number(spec: typing.Any, *names: str, or_none: bool = False) -> None:
    """Raises `UserError` unless the fields are finite numbers, or None if allowed."""
    for name in names:
        value = getattr(spec, name)
        what = f"must be a number, at most {_LARGEST:g}"
        require(_is_number(value) or (or_none and value is None), f"{name}={value!r}: {what}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def check_positive(spec: typing.Any, *names: str) -> None:
    """Raises `UserError` unless the fields are positive numbers."""
    check_number(spec, *names)
    for name in names:
        value = getattr(spec, name)
        require(value >= _SMALLEST, f"{name}={value!r}: must be positive, at least {_SMALLEST:g}")


def check_whole(spec: typing.Any, name: str, low: int, high: int, what: str) -> None:
    """Raises `UserError(f"{name}=...: {what}")` unless the field is a whole number in a range."""
    value = getattr(spec, name)
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(ok, f"{name}={value!r}: {what}")


def check_several_passes(what: str, batches: typing.Iterable) -> None:
    """Raises `UserError` if batches are an iterator, which is used up after one pass."""
    require(
        iter(batches) is not batches,
        f"{what}: batches can be passed over only once, and this takes several passes; give a list, or an "
        "object whose iter() starts anew",
    )


def check_range_fields(spec: typing.Any, statistics: typing.Sequence[str]) -> None:
    """Checks `granularity`, `statistic` (None is the default) and `percentile`."""
    choose("granularity", spec.granularity, GRANULARITIES)
    if spec.statistic is not None:
        choose("statistic", spec.statistic, statistics)
    check_number(spec, "percentile")
    require(0 < spec.percentile <= 100, f"percentile={spec.percentile!r}: must be in (0, 100]")


def check_momentum(spec: typing.Any) -> None:
    """Checks `momentum`, which is left alone but for a running average."""
    check_number(spec, "momentum")
    value, default = spec.momentum, type(spec).momentum
    require(0 < value <= 1, f"momentum={value!r}: must be in (0, 1]")
    ok = spec.scale == "ema" or value == default
    require(ok, f"momentum={value!r}: only scale='ema' has one; elsewhere leave it at {default}")


def check_scale_value(spec: typing.Any) -> None:
    """Checks that `scale_value` is there for a constant scale, and only then."""
    value = spec.scale_value
    if spec.scale != "constant":
        require(value is None, f"scale_value={value!r}: only scale='constant' takes a value")
        return
    ok = _is_number(value) and value >= _SMALLEST
    bounds = f"{_SMALLEST:g} to {_LARGEST:g}"
    require(ok, f"scale_value={value!r}: scale='constant' needs a positive number, {bounds}")
