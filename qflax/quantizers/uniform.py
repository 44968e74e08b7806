"""Spec of the uniform integer quantizer."""

import dataclasses

from qflax.errors import choose, require
from qflax.numerics import CLIP_GRADIENTS, Estimator, IntegerFormat
from qflax.quantizers.checks import (
    check_flag,
    check_momentum,
    check_number,
    check_range_fields,
    check_scale_value,
    check_whole,
)
from qflax.quantizers.statistics import STATISTICS_KINDS

# How the scale comes about, with the clipping gradient and the range statistic that its paper uses.
SCALES = {
    "constant": ("after_rounding", "absmax"),
    "static": ("after_rounding", "mse"),
    "statistic": ("straight_through", "absmax"),
    "ema": ("after_rounding", "percentile"),
    "lsq": ("before_rounding", "mean"),
    "log2": ("after_rounding", "mse"),
    "range": ("after_rounding", "percentile"),
    "pact": ("straight_through", "percentile"),
    "dorefa": ("straight_through", "absmax"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform integer quantizer of 1 to 16 bits.

    | scale     | meaning                                                                              |
    |-----------|--------------------------------------------------------------------------------------|
    | constant  | `scale_value`, never changed                                                         |
    | static    | range calibrated by `statistic`, then frozen                                         |
    | statistic | range recomputed from the weights at every step                                      |
    | ema       | running average of the batch's range, frozen in evaluation                           |
    | lsq       | learned scale (Esser et al. 2020); asymmetric: LSQ+ (Bhalgat et al. 2020)            |
    | log2      | learned log2 of the scale; with `power_of_two` as TQT (Jain et al. 2020) but for a ceil  |
    | range     | learned end(s) of the range, as in Brevitas                                          |
    | pact      | learned clipping level, gradient from clipped elements only (Choi et al. 2018)       |
    | dorefa    | weights through tanh, scaled to [-1, 1] (Zhou et al. 2016), on the odd-symmetric grid |

    Attributes:
      bits: 1 to 16.
      scale: see above.
      signed: None leaves it to the layer: weights are signed, a ReLU's output is not.
      narrow: leave out the lowest signed code; None is True for weights, False for activations.
      symmetric: False adds an integer zero point (activations, per tensor).
      granularity: `per_tensor`, or `per_channel` along the last axis.
      statistic: how ranges are chosen (`statistics.symmetric_range`); None is the scale's own.
      percentile: in percent, for `statistic="percentile"`.
      momentum: weight of the new batch in the running average of `ema`.
      scale_value: the scale of `constant`.
      power_of_two: round scales to powers of two, straight-through.
      rounding, surrogate, strength: see `numerics.Estimator`.
      clip_gradient: see `numerics.Estimator.clip`; None is the scale's own.
    """

    bits: int
    scale: str = "lsq"
    signed: bool | None = None
    narrow: bool | None = None
    symmetric: bool = True
    granularity: str = "per_tensor"
    statistic: str | None = None
    percentile: float = 99.999
    momentum: float = 0.1
    scale_value: float | None = None
    power_of_two: bool = False
    rounding: str = "half_even"
    surrogate: str = "identity"
    strength: float | None = None
    clip_gradient: str | None = None

    def __post_init__(self):
        what = "a uniform quantizer has 1 to 16 bits; for float leave the quantizer out (None)"
        check_whole(self, "bits", 1, 16, what)
        choose("scale", self.scale, SCALES)
        check_range_fields(self, STATISTICS_KINDS)
        if self.clip_gradient is not None:
            choose("clip_gradient", self.clip_gradient, CLIP_GRADIENTS)
        check_flag(self, "signed", "narrow", or_none=True)
        check_flag(self, "symmetric", "power_of_two")
        check_momentum(self)
        check_number(self, "strength", or_none=True)
        require(
            self.granularity == "per_tensor" or self.scale not in ("constant", "dorefa"),
            f"granularity='per_channel' with scale={self.scale!r}: that scale is one for all channels",
        )
        check_scale_value(self)
        require(
            self.strength is None or self.surrogate != "identity",
            f"strength={self.strength!r} with surrogate='identity': that one has none",
        )
        self._check_asymmetric()
        _ = self.estimator  # Raises if there is no such estimator.

    def _check_asymmetric(self):
        if self.symmetric:
            return
        allowed = ("static", "ema", "lsq", "range")
        require(
            self.scale in allowed,
            f"symmetric=False with scale={self.scale!r}: choices: {', '.join(allowed)}",
        )
        require(
            self.bits > 1 or not self.signed,
            "symmetric=False with bits=1 and signed=True: the codes -1 and +1 leave no zero point",
        )
        require(
            self.granularity == "per_tensor",
            "symmetric=False with granularity='per_channel': a zero point is per tensor",
        )
        require(
            self.statistic in (None, "absmax", "percentile", "mse"),
            f"symmetric=False with statistic={self.statistic!r}: choices: absmax, percentile, mse",
        )
        require(
            self.rounding != "toward_zero",
            "symmetric=False with rounding='toward_zero': what is rounded has the zero point added, so that "
            "its zero is not that of the data; choices: half_even, floor, ceil, stochastic",
        )

    @property
    def estimator(self) -> Estimator:
        """Gradient rules."""
        return Estimator(
            rounding=self.rounding,
            surrogate=self.surrogate,
            strength=self.strength,
            clip=self.clip_gradient or SCALES[self.scale][0],
        )

    @property
    def range_statistic(self) -> str:
        """The range statistic in force."""
        if self.statistic is None and not self.symmetric and SCALES[self.scale][1] == "mean":
            return "mse"  # LSQ's mean says nothing about an offset; LSQ+ starts from the error.
        return self.statistic or SCALES[self.scale][1]

    def number_format(self, *, signed: bool, narrow: bool) -> IntegerFormat:
        """The integer format; the arguments are the layer's choices where the spec has none."""
        if not self.symmetric:
            signed = False  # The zero point covers the sign.
        signed = signed if self.signed is None else self.signed
        narrow = narrow if self.narrow is None else self.narrow
        return IntegerFormat(bits=self.bits, signed=signed, narrow=signed and narrow)
