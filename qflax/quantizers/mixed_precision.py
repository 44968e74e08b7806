"""Mixed precision: quantizers that learn their bit width.

Uhlich et al. 2020, "Mixed Precision DNNs: All you need is a good parametrization".
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import choose, require
from qflax.numerics import (
    IntegerFormat,
    LearnedInteger,
    bit_width,
    highest_code,
    power_of_two,
    product,
    quantize_range,
    quantize_to_range,
    quotient,
    round_straight_through,
)
from qflax.quantizers.base import Quantizer
from qflax.quantizers.checks import check_flag, check_positive, check_range_fields, check_whole
from qflax.quantizers.collections import STATISTICS
from qflax.quantizers.oscillation import MOST_BITS
from qflax.quantizers.quantized_array import QuantizedArray, quantized_array
from qflax.quantizers.statistics import STATISTICS_KINDS

# Parametrization -> what is learned; the third number follows from the two.
PARAMETRIZATIONS = {
    "step_range": ("step", "x_max"),
    "bits_step": ("bits", "step"),
    "bits_range": ("bits", "x_max"),
}
STARTS = ("calibrated", "paper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Uniform quantizer with a learned bit width.

    The numbers step d, range x_max and bits b hang together by x_max = d (2^(b-1) - 1), unsigned
    d (2^b - 1); two of them are learned.

    | parametrization | learned  |                                                                |
    |-----------------|----------|----------------------------------------------------------------|
    | step_range      | d, x_max | the paper's choice: gradients of like size that do not compete |
    | bits_step       | b, d     |                                                                |
    | bits_range      | b, x_max |                                                                |

    A size penalty in the loss (`training.penalties`) makes widths shrink; without one they have no reason
    to. Once they are frozen, b is a constant and what remains is a quantizer with a learned step.

    Attributes:
      bits: to start from, if the bounds of step and range allow it.
      parametrization: see above.
      min_bits: None is 2 if signed, else 1.
      max_bits: at most 16.
      min_step, max_step, min_range, max_range: bounds of d and x_max; those of b go before them.
      signed: None leaves it to the layer: weights are signed, a ReLU's output is not.
      granularity: `per_tensor`, or `per_channel` (also of the widths) along the last axis.
      power_of_two: round steps to powers of two, straight-through.
      start: `calibrated`: x_max by `statistic`; `paper`: of weights the largest power of two for d with
        which the largest weight is clipped by less than half, of activations d = 1/8.
      statistic: how the first range is chosen (`statistics.symmetric_range`).
      percentile: in percent, for `statistic="percentile"`.
    """

    bits: int
    parametrization: str = "step_range"
    min_bits: int | None = None
    max_bits: int = 8
    min_step: float = 2.0**-12
    max_step: float = 1.0
    min_range: float = 2.0**-8
    max_range: float = 255.0
    signed: bool | None = None
    granularity: str = "per_tensor"
    power_of_two: bool = False
    start: str = "calibrated"
    statistic: str = "mse"
    percentile: float = 99.999

    def __post_init__(self):
        choose("parametrization", self.parametrization, PARAMETRIZATIONS)
        choose("start", self.start, STARTS)
        check_flag(self, "signed", or_none=True)
        check_flag(self, "power_of_two")
        check_range_fields(self, STATISTICS_KINDS)
        check_whole(self, "max_bits", 1, 16, "a learned width has at most 16 bits")
        lowest = 1 if self.min_bits is None else self.min_bits
        if self.min_bits is not None:
            check_whole(self, "min_bits", 1, self.max_bits, f"must be from 1 to max_bits={self.max_bits}")
        check_whole(
            self, "bits", lowest, self.max_bits, f"starts outside {lowest} to max_bits={self.max_bits} bits"
        )
        check_positive(self, "min_step", "max_step", "min_range", "max_range")
        for name in ("step", "range"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            require(low < high, f"min_{name}={low!r}: must be below max_{name}={high!r}")

    @property
    def range_statistic(self) -> str:
        """The range statistic in force."""
        return self.statistic


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WidthConstraint:
    """Bounds of step, range and width, which depend on each other.

    Attributes:
      spec: has the bounds.
      signed: whether one bit is the sign.
    """

    spec: MixedPrecision
    signed: bool

    @property
    def min_bits(self) -> int:
        """Least width."""
        return 1 + self.signed if self.spec.min_bits is None else self.spec.min_bits

    def project(self, parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The nearest parameters with a width in bounds; NaN stays NaN."""
        spec, projected = self.spec, {}
        if "bits" in parameters:
            projected["bits"] = jnp.clip(parameters["bits"], self.min_bits, spec.max_bits)
        if "x_max" in parameters:
            projected["x_max"] = jnp.clip(parameters["x_max"], spec.min_range, spec.max_range)
        if "step" in parameters:
            projected["step"] = jnp.clip(parameters["step"], spec.min_step, spec.max_step)
        if spec.parametrization == "step_range":
            finest = projected["x_max"] / self._highest(spec.max_bits)
            coarsest = projected["x_max"] / self._highest(self.min_bits)
            projected["step"] = jnp.clip(projected["step"], finest, coarsest)
        return projected

    def limit_gradients(
        self, gradients: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Those of step and range within one step, so that a size penalty cannot throw them about.

        Those of a width stay within one bit.
        """
        if "step" in parameters:
            step = parameters["step"]
        else:
            step = parameters["x_max"] / highest_code(jnp.round(parameters["bits"]), self.signed)
        limits = {"bits": 1.0, "step": step, "x_max": step}
        return {name: jnp.clip(g, -limits[name], limits[name]) for name, g in gradients.items()}

    def _highest(self, bits: int) -> int:
        return 2 ** (bits - self.signed) - 1


class MixedPrecisionQuantizer(Quantizer):
    """Puts an array on the grid of a `MixedPrecision` spec.

    Variables (float32; [] or, per channel, [channels]): in `quantizer_params` two of `step`, `x_max` and
    `bits`; in `quantizer_stats` the observed range `x_max` with `count`, the width `bits` of the last
    training pass, and `frozen` (bool), since when `bits` is the width for good (see `freeze_widths`); of
    weights that then freeze when they oscillate also the record `oscillation`.

    While a range is learned beside a step it need not be a multiple of it: values beyond are `x_max`, off
    the grid. Frozen, the step is `x_max` divided by the highest code, and all values are on the grid.
    """

    @property
    def format(self) -> IntegerFormat:
        """The format to start from."""
        signed = self._has_sign
        return IntegerFormat(bits=self.spec.bits, signed=signed, narrow=signed)

    @nn.compact
    def __call__(self, x: jax.Array, inputs: jax.Array | QuantizedArray | None = None) -> QuantizedArray:
        """Quantizes `x` of any floating dtype; the value is float32. `inputs` are not looked at."""
        del inputs
        x = x.astype(jnp.float32)
        constraint = WidthConstraint(self.spec, self._has_sign)
        for name in ("bits", "min_bits"):
            width = getattr(self.spec, name)
            require(
                width is None or width >= 1 + self._has_sign,
                f"{'/'.join(self.path)}: {name}={width}: signed data has at least 2",
            )
        start = constraint.project(self._start(x))
        learned = {name: self._learned(name, value) for name, value in start.items()}
        self._constrain(constraint)
        step, x_max, highest, bits = self._grid(learned, constraint.min_bits)
        fmt = LearnedInteger(bits=bits, signed=self._has_sign)
        if self._calibrating and not self.weights:
            return QuantizedArray(x, x / step, step, jnp.zeros(()), fmt)
        highest = jax.lax.stop_gradient(highest)
        x = self._held(x, step, x)
        value = quantize_to_range(x, step, x_max, signed=self._has_sign, highest=highest)
        self._report_deviation(x, value, x_max)
        # The same once more, which compilers notice.
        given = *jax.lax.stop_gradient((x, step, x_max)), highest
        unscaled = quantize_range(*given, signed=self._has_sign)
        fixed = self.get_variable(STATISTICS, "frozen")
        self._watch(unscaled, jnp.round, fixed=fixed, narrow=bits <= MOST_BITS)
        return quantized_array(value, unscaled, step, fmt)

    @property
    def _freezes(self) -> bool:
        lowest = WidthConstraint(self.spec, self._has_sign).min_bits
        return self.weights and self.freezes_oscillating and lowest <= MOST_BITS

    @property
    def _has_sign(self) -> bool:
        return self.signed if self.spec.signed is None else self.spec.signed

    def _start(self, x: jax.Array) -> dict[str, jax.Array]:
        """The learned numbers as calibrated; only a calibration pass looks at `x`."""
        spec, highest = self.spec, self._starting_highest()
        x_max = jnp.ones((x.shape[-1],) if spec.granularity == "per_channel" else ())
        if self._calibrating or self.is_initializing():
            x_max = self._observed(x)[1]
        step = x_max / highest
        if spec.start == "paper":
            if self.weights:
                step = jnp.ldexp(jnp.ones_like(step), jnp.frexp(self._largest(x) / highest)[1] - 1)
            else:
                step = jnp.full_like(step, 2.0**-3)
            x_max = step * highest
        values = {"step": step, "x_max": x_max, "bits": jnp.full_like(step, spec.bits)}
        return {name: values[name] for name in PARAMETRIZATIONS[spec.parametrization]}

    def _starting_highest(self) -> jax.Array:
        """Highest code of the width to start from, or of the one that is frozen."""
        frozen = self.get_variable(STATISTICS, "frozen", False)
        bits = self.get_variable(STATISTICS, "bits", jnp.float32(self.spec.bits))
        return highest_code(jnp.where(frozen, bits, jnp.full_like(bits, self.spec.bits)), self._has_sign)

    def _largest(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1)) if self.spec.granularity == "per_channel" else None
        return jnp.maximum(jnp.max(jnp.abs(x), axes), self.spec.min_range)

    def _grid(self, learned: dict[str, jax.Array], min_bits: int) -> tuple[jax.Array, ...]:
        """Step, range, their ratio, and width."""
        spec, signed = self.spec, self._has_sign
        rounded = power_of_two if spec.power_of_two else lambda step: step
        if spec.parametrization == "step_range":
            step, x_max = rounded(learned["step"]), learned["x_max"]
            if spec.power_of_two:
                # Rounding the step may have made room for more steps than there may be, or for none.
                x_max = _within(x_max, step, step * (2 ** (spec.max_bits - signed) - 1))
            bits = self._width(_within(bit_width(step, x_max, signed), min_bits, spec.max_bits))
            highest = highest_code(jax.lax.stop_gradient(bits), signed)
            frozen = self.get_variable(STATISTICS, "frozen")
            step = jnp.where(frozen, rounded(quotient(learned["x_max"], highest)), step)
            x_max = jnp.where(frozen, product(step, highest), x_max)
            return step, x_max, jnp.where(frozen, highest, quotient(x_max, step)), bits
        bits = self._width(round_straight_through(learned["bits"]))
        highest = highest_code(bits, signed)
        step = rounded(learned["step"] if "step" in learned else quotient(learned["x_max"], highest))
        return step, product(step, highest), highest, bits

    def _width(self, learned: jax.Array) -> jax.Array:
        """The learned width, which training and calibration record, or the frozen one."""
        frozen = self.variable(STATISTICS, "frozen", lambda: jnp.zeros((), bool))
        width = self.variable(STATISTICS, "bits", lambda: learned)
        bits = jnp.where(frozen.value, width.value, learned)
        if self._training or self._calibrating:
            width.value = jax.lax.stop_gradient(bits)
        return bits


def _within(x: jax.Array, low: jax.Array | int, high: jax.Array | int) -> jax.Array:
    """Clips; at the bounds, where constraints put parameters, the gradient is still that of `x`."""
    return jnp.where(x > high, high, jnp.where(x < low, low, x))


def freeze_widths(quantizer_stats: Mapping, condition: jax.Array | bool = True) -> dict:
    """Statistics with all learned widths frozen, if `condition` holds, at those of the last training pass."""

    def freeze(path, value):
        return value | condition if path[-1].key == "frozen" else value

    return jax.tree_util.tree_map_with_path(freeze, quantizer_stats)


def widths_frozen(quantizer_stats: Mapping) -> jax.Array | None:
    """Whether all learned widths are frozen; None if there are none."""
    leaves = jax.tree_util.tree_leaves_with_path(quantizer_stats)
    flags = [jnp.all(value) for path, value in leaves if path[-1].key == "frozen"]
    return jnp.all(jnp.stack(flags)) if flags else None
