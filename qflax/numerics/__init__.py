"""Pure functions on arrays: number formats, rounding and its gradients."""

from qflax.numerics.division import quotient
from qflax.numerics.gradients import floor_at, power_of_two, scale_gradient
from qflax.numerics.integer import CLIP_GRADIENTS, Estimator, IntegerFormat
from qflax.numerics.rounding import ROUNDING_MODES, round_to_integer
from qflax.numerics.surrogates import SURROGATES

__all__ = [
    "CLIP_GRADIENTS",
    "ROUNDING_MODES",
    "SURROGATES",
    "Estimator",
    "IntegerFormat",
    "floor_at",
    "power_of_two",
    "quotient",
    "round_to_integer",
    "scale_gradient",
]
