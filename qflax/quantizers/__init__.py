"""Quantizers: Linen modules that own scales, ranges and widths, and the specs that describe them."""

from qflax.quantizers.accumulator_aware import AccumulatorAware, project_weights, set_accumulator_bits
from qflax.quantizers.base import Quantizer
from qflax.quantizers.calibration import CALIBRATIONS, apply_without_dropout, calibrate
from qflax.quantizers.collections import (
    CALIBRATION,
    CONSTRAINTS,
    DEVIATIONS,
    HELD,
    PARAMETERS,
    PENALTIES,
    PROJECTED,
    STATISTICS,
)
from qflax.quantizers.constraints import constrain, limit_gradients
from qflax.quantizers.integer_bias import IntegerBias
from qflax.quantizers.minifloat import Minifloat
from qflax.quantizers.mixed_precision import MixedPrecision, freeze_widths, widths_frozen
from qflax.quantizers.oscillation import frozen_share, set_oscillation_threshold
from qflax.quantizers.quantized_array import (
    QuantizedArray,
    bits_of,
    payload_of,
    quantized_array,
    value_of,
)
from qflax.quantizers.rules import FLOAT, Quantization, Rule, quantization_from_config
from qflax.quantizers.spec import KINDS, ROLES, Spec, quantizer_of, spec_from_dict
from qflax.quantizers.truncation import Truncation
from qflax.quantizers.uniform import Uniform

__all__ = [
    "CALIBRATION",
    "CALIBRATIONS",
    "CONSTRAINTS",
    "DEVIATIONS",
    "FLOAT",
    "HELD",
    "KINDS",
    "PARAMETERS",
    "PENALTIES",
    "PROJECTED",
    "ROLES",
    "STATISTICS",
    "AccumulatorAware",
    "IntegerBias",
    "Minifloat",
    "MixedPrecision",
    "Quantization",
    "QuantizedArray",
    "Quantizer",
    "Rule",
    "Spec",
    "Truncation",
    "Uniform",
    "bits_of",
    "apply_without_dropout",
    "calibrate",
    "constrain",
    "freeze_widths",
    "frozen_share",
    "limit_gradients",
    "payload_of",
    "project_weights",
    "quantization_from_config",
    "quantized_array",
    "quantizer_of",
    "set_accumulator_bits",
    "set_oscillation_threshold",
    "spec_from_dict",
    "value_of",
    "widths_frozen",
]
