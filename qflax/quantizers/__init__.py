"""Quantizers: Linen modules that own scales and ranges, and the specs that describe them."""

from qflax.quantizers.calibration import calibrate
from qflax.quantizers.collections import PARAMETERS, STATISTICS
from qflax.quantizers.constraints import constrain
from qflax.quantizers.quantized_array import QuantizedArray, bits_of, value_of
from qflax.quantizers.rules import FLOAT, Quantization, Rule, quantization_from_config
from qflax.quantizers.spec import Uniform, spec_from_dict
from qflax.quantizers.uniform import UniformQuantizer

__all__ = [
    "FLOAT",
    "PARAMETERS",
    "STATISTICS",
    "Quantization",
    "QuantizedArray",
    "Rule",
    "Uniform",
    "UniformQuantizer",
    "bits_of",
    "calibrate",
    "constrain",
    "quantization_from_config",
    "spec_from_dict",
    "value_of",
]
