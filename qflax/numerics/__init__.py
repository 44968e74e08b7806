"""Pure functions on arrays: number formats, rounding and its gradients."""

from qflax.numerics.accumulator import accumulator_extremes, data_type_width, norm_width, width_of_extremes
from qflax.numerics.accumulator_aware import (
    AccumulatorBudget,
    accumulator_aware_codes,
    code_sums,
    within_accumulator,
)
from qflax.numerics.arithmetic import full_precision, on_cpu, product, quotient, total
from qflax.numerics.convolution import convolve
from qflax.numerics.gradients import floor_at, power_of_two, scale_gradient, straight_through, sum_to_shape
from qflax.numerics.integer import CLIP_GRADIENTS, Estimator, IntegerFormat
from qflax.numerics.minifloat import MINIFLOAT_SURROGATES, MinifloatEstimator, MinifloatFormat
from qflax.numerics.mixed_precision import (
    LearnedInteger,
    bit_width,
    highest_code,
    quantize_range,
    quantize_to_range,
    round_straight_through,
)
from qflax.numerics.operation import PRIMITIVE, Operation
from qflax.numerics.projection import project_onto_l1_ball
from qflax.numerics.rounding import ROUNDING_MODES, round_to_integer
from qflax.numerics.surrogates import SURROGATES
from qflax.numerics.varying import vary_alike

__all__ = [
    "CLIP_GRADIENTS",
    "MINIFLOAT_SURROGATES",
    "PRIMITIVE",
    "ROUNDING_MODES",
    "SURROGATES",
    "AccumulatorBudget",
    "Estimator",
    "IntegerFormat",
    "LearnedInteger",
    "MinifloatEstimator",
    "MinifloatFormat",
    "Operation",
    "accumulator_aware_codes",
    "accumulator_extremes",
    "bit_width",
    "code_sums",
    "convolve",
    "data_type_width",
    "floor_at",
    "full_precision",
    "highest_code",
    "norm_width",
    "on_cpu",
    "power_of_two",
    "product",
    "project_onto_l1_ball",
    "quantize_to_range",
    "quotient",
    "quantize_range",
    "round_straight_through",
    "round_to_integer",
    "scale_gradient",
    "straight_through",
    "sum_to_shape",
    "total",
    "vary_alike",
    "width_of_extremes",
    "within_accumulator",
]
