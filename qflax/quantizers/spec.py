"""Specs by kind: immutable descriptions of quantizers, validated when made."""

import dataclasses
import types
from collections.abc import Mapping

from qflax.errors import UserError, choose, closest
from qflax.quantizers.accumulator_aware import AccumulatorAware, AccumulatorAwareQuantizer
from qflax.quantizers.base import Quantizer
from qflax.quantizers.integer_bias import IntegerBias
from qflax.quantizers.minifloat import Minifloat
from qflax.quantizers.mixed_precision import MixedPrecision, MixedPrecisionQuantizer
from qflax.quantizers.scaled import ScaledQuantizer
from qflax.quantizers.truncation import Truncation, TruncationQuantizer
from qflax.quantizers.uniform import Uniform

Spec = Uniform | Minifloat | MixedPrecision | AccumulatorAware | Truncation | IntegerBias

KINDS = {
    "uniform": Uniform,
    "minifloat": Minifloat,
    "mixed_precision": MixedPrecision,
    "accumulator_aware": AccumulatorAware,
    "truncation": Truncation,
    "integer_bias": IntegerBias,
}

_GRIDS = ("uniform", "minifloat", "mixed_precision")

# Role -> kinds of quantizers that it may have; the first is meant where none is named.
ROLES = types.MappingProxyType(
    {
        "weights": (*_GRIDS, "accumulator_aware"),
        "activations": (*_GRIDS, "truncation"),
        "outputs": _GRIDS,
        "biases": ("integer_bias",),
    }
)

_MODULES = {
    Uniform: ScaledQuantizer,
    Minifloat: ScaledQuantizer,
    MixedPrecision: MixedPrecisionQuantizer,
    AccumulatorAware: AccumulatorAwareQuantizer,
    Truncation: TruncationQuantizer,
}


def kind_of(spec: Spec) -> str:
    """The kind of a spec."""
    return next(kind for kind, cls in KINDS.items() if type(spec) is cls)


def quantizer_of(spec: Spec, **attributes) -> Quantizer:
    """The module that puts arrays on the grid of `spec`; `attributes` as of `Quantizer`."""
    return _MODULES[type(spec)](spec=spec, **attributes)


def spec_from_dict(fields: Mapping | None, role: str, where: str) -> Spec | None:
    """Makes a spec from a config's mapping `{"kind": "uniform", "bits": 4, ...}`.

    Args:
      fields: None, or a mapping with the spec's fields; `kind` defaults to the role's first.
      role: one of `ROLES`.
      where: the config field, for messages.

    Raises:
      UserError: unknown kind, unknown or missing field, impossible value.
    """
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}={fields!r}: must be None or a mapping of spec fields")
    fields = dict(fields)
    kind = fields.pop("kind", ROLES[role][0])
    try:
        choose("kind", kind, ROLES[role])
        names = [field.name for field in dataclasses.fields(KINDS[kind])]
        for name in fields:
            if name not in names:
                raise UserError(f"{name}: no such field{closest(name, names)}; choices: {', '.join(names)}")
        for field in dataclasses.fields(KINDS[kind]):
            needed = field.default is dataclasses.MISSING
            if needed and field.name not in fields:
                raise UserError(f"{field.name}: missing; a quantizer of kind {kind!r} needs it")
        return KINDS[kind](**fields)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
