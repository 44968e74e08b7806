"""Spec of the minifloat quantizer."""

import dataclasses

from qflax.errors import choose, require
from qflax.numerics import (
    CLIP_GRADIENTS,
    MINIFLOAT_SURROGATES,
    ROUNDING_MODES,
    MinifloatEstimator,
    MinifloatFormat,
)
from qflax.quantizers.checks import check_flag, check_momentum, check_range_fields, check_scale_value

MINIFLOAT_SCALES = ("constant", "static", "statistic", "ema", "log2", "range")
MINIFLOAT_STATISTICS = ("absmax", "percentile", "mse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minifloat:
    """Quantizer to a small floating-point format eXmY, X the exponent bits and Y the mantissa bits.

    | scale     | meaning                                                            |
    |-----------|--------------------------------------------------------------------|
    | constant  | `scale_value`, never changed; 1 is the plain format                |
    | static    | range calibrated by `statistic`, then frozen                       |
    | statistic | range recomputed from the weights at every step                    |
    | ema       | running average of the batch's range, frozen in evaluation         |
    | log2      | learned log2 of the scale                                          |
    | range     | learned range                                                      |

    A range `x_max` has the scale `x_max / max`, with the largest value of the format.

    Attributes:
      exponent_bits, mantissa_bits, bias, specials: see `numerics.MinifloatFormat`.
      scale: see above.
      scale_value: of `constant`, and only of that; None is 1 there.
      signed: False leaves out the sign bit; None is True, as in all standard formats.
      subnormals: see `numerics.MinifloatFormat`.
      granularity: `per_tensor`, or `per_channel` along the last axis.
      statistic: how ranges are chosen: `absmax`, `percentile` or `mse`.
      percentile: in percent, for `statistic="percentile"`.
      momentum: weight of the new batch in the running average of `ema`.
      power_of_two: round scales to powers of two, straight-through.
      rounding, surrogate: see `numerics.MinifloatEstimator`.
      clip_gradient: see `numerics.MinifloatEstimator.clip`.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    specials: str = "none"
    scale: str = "constant"
    scale_value: float | None = None
    signed: bool | None = None
    subnormals: bool = True
    granularity: str = "per_tensor"
    statistic: str = "absmax"
    percentile: float = 99.999
    momentum: float = 0.1
    power_of_two: bool = False
    rounding: str = "half_even"
    surrogate: str = "identity"
    clip_gradient: str = "after_rounding"

    def __post_init__(self):
        choose("scale", self.scale, MINIFLOAT_SCALES)
        check_range_fields(self, MINIFLOAT_STATISTICS)
        choose("clip_gradient", self.clip_gradient, CLIP_GRADIENTS)
        check_flag(self, "signed", or_none=True)
        check_flag(self, "subnormals", "power_of_two")
        check_momentum(self)
        require(
            self.granularity == "per_tensor" or self.scale != "constant",
            "granularity='per_channel' with scale='constant': that scale is one for all channels",
        )
        if self.scale != "constant" or self.scale_value is not None:
            check_scale_value(self)
        choose("rounding", self.rounding, ROUNDING_MODES)
        choose("surrogate", self.surrogate, MINIFLOAT_SURROGATES)
        self.number_format(signed=True, narrow=False)  # Raises if there is no such format.

    @property
    def symmetric(self) -> bool:
        """True: floating point has its zero where it is."""
        return True

    @property
    def unscaled(self) -> bool:
        """Whether the format is used as it is."""
        return self.scale == "constant" and self.scale_value in (None, 1)

    @property
    def estimator(self) -> MinifloatEstimator:
        """Gradient rules."""
        return MinifloatEstimator(rounding=self.rounding, surrogate=self.surrogate, clip=self.clip_gradient)

    @property
    def range_statistic(self) -> str:
        """The range statistic in force."""
        return self.statistic

    def number_format(self, *, signed: bool, narrow: bool) -> MinifloatFormat:
        """The format; what the layer knows of the data's sign does not matter."""
        del signed, narrow
        return MinifloatFormat(
            exponent_bits=self.exponent_bits,
            mantissa_bits=self.mantissa_bits,
            bias=self.bias,
            specials=self.specials,
            signed=self.signed is not False,
            subnormals=self.subnormals,
        )
