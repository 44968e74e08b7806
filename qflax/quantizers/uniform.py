"""The uniform integer quantizer as a Linen module."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.numerics import IntegerFormat, floor_at, power_of_two, quotient, scale_gradient
from qflax.quantizers.collections import PARAMETERS, STATISTICS
from qflax.quantizers.quantized_array import QuantizedArray
from qflax.quantizers.spec import Uniform
from qflax.quantizers.statistics import asymmetric_range, symmetric_range

SMALLEST_RANGE = 1e-10


class UniformQuantizer(nn.Module):
    """Puts an array on the grid of a `Uniform` spec.

    Variables (float32; [] or, per channel, [channels]):

    | scale       | `quantizer_params`                             |
    |-------------|------------------------------------------------|
    | lsq         | `scale`; asymmetric also `x_min`               |
    | log2        | `log2_scale`                                   |
    | range, pact | `x_max`; asymmetric range: `width` and `x_min` |
    | static, ema | -                                              |

    and for all of these in `quantizer_stats` the observed range, `x_max` and if asymmetric `x_min`, and
    `count`, the number of batches that it comes from.

    They are placeholders until a calibration pass (`calibration.calibrate`) has set them. While
    calibrating, activations pass through unquantized, so that every range is that of the float network
    behind quantized weights.

    Attributes:
      spec: the quantizer.
      weights: True for a kernel [..., channels], False for activations [batch, ..., channels].
      signed: whether the data is signed, where the spec leaves it open.
      axis_name: mapped axis over which a batch's range is reduced, or None.
    """

    spec: Uniform
    weights: bool
    signed: bool = True
    axis_name: str | None = None

    @property
    def format(self) -> IntegerFormat:
        """Number format of the codes."""
        return self.spec.number_format(signed=self.signed, narrow=self.weights)

    @nn.compact
    def __call__(self, x: jax.Array) -> QuantizedArray:
        """Quantizes `x` of any floating dtype; the value is float32."""
        spec, fmt = self.spec, self.format
        self._check()
        x = x.astype(jnp.float32)
        if spec.scale == "dorefa":
            x = _dorefa_weights(x)
        scale, zero_point = self._grid(x)
        if spec.scale == "pact":
            x = _pact_clip(x, scale * fmt.threshold, fmt.signed)
            scale = jax.lax.stop_gradient(scale)
        if self._calibrating and not self.weights:
            return QuantizedArray(value=x, scale=scale, zero_point=zero_point, format=fmt)
        stochastic = spec.rounding == "stochastic" and self.has_rng("quantization")
        key = self.make_rng("quantization") if stochastic else None
        value = fmt.fake_quant(x, scale, zero_point, estimator=spec.estimator, key=key)
        return QuantizedArray(value=value, scale=scale, zero_point=zero_point, format=fmt)

    @property
    def _calibrating(self) -> bool:
        return self.is_mutable_collection(PARAMETERS) and not self.is_initializing()

    @property
    def _averaging(self) -> bool:
        """Whether this is a training pass of a running average."""
        training = self.is_mutable_collection(STATISTICS) and not self.is_initializing()
        return self.spec.scale == "ema" and training and not self._calibrating

    def _check(self):
        where, scale = "/".join(self.path), self.spec.scale
        require(
            not (self.format.bipolar and self.spec.rounding != "half_even"),
            f"{where}: rounding={self.spec.rounding!r}: a signed bit has no rounding mode but half_even",
        )
        if self.weights:
            require(self.spec.symmetric, f"{where}: symmetric=False is for activations, not weights")
            return
        require(
            scale not in ("statistic", "dorefa"),
            f"{where}: scale={scale!r} is for weights; for activations use ema, static or a learned one",
        )

    def _grid(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point."""
        spec, fmt = self.spec, self.format
        zero = jnp.zeros((), jnp.float32)
        if spec.scale == "constant":
            return self._rounded(jnp.float32(spec.scale_value)), zero
        if spec.scale == "dorefa":
            return self._rounded(jnp.float32(1 / fmt.threshold)), zero
        if spec.scale == "statistic":
            x_max = floor_at(self._range(x), SMALLEST_RANGE)
            return self._rounded(quotient(x_max, fmt.threshold)), zero
        # A learned scale needs the observed range to start from and never again.
        needed = spec.scale in ("static", "ema") or self._calibrating or self.is_initializing()
        x_min, x_max = self._observed(x) if needed else (0.0, 1.0)
        if spec.symmetric:
            return self._rounded(self._symmetric_scale(x, x_max)), zero
        return self._asymmetric_grid(x, x_min, x_max)

    def _symmetric_scale(self, x: jax.Array, x_max: jax.Array) -> jax.Array:
        spec, threshold = self.spec, self.format.threshold
        if spec.scale == "lsq":
            scale = self._learned("scale", quotient(x_max, threshold))
            return self._lsq_gradient(floor_at(jnp.abs(scale), SMALLEST_RANGE), x)
        if spec.scale == "log2":
            return jnp.exp2(self._learned("log2_scale", jnp.log2(quotient(x_max, threshold))))
        if spec.scale in ("range", "pact"):
            x_max = self._learned("x_max", x_max)
        return quotient(floor_at(jnp.abs(x_max), SMALLEST_RANGE), threshold)

    def _asymmetric_grid(
        self, x: jax.Array, x_min: jax.Array, x_max: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        spec, fmt = self.spec, self.format
        steps, width = fmt.num_codes - 1, x_max - x_min
        if spec.scale == "lsq":
            scale = self._learned("scale", quotient(width, steps))
            scale = self._lsq_gradient(floor_at(jnp.abs(scale), SMALLEST_RANGE), x)
            x_min = self._lsq_gradient(self._learned("x_min", x_min), x)
        else:
            if spec.scale == "range":
                width, x_min = self._learned("width", width), self._learned("x_min", x_min)
            scale = quotient(floor_at(jnp.abs(width), SMALLEST_RANGE), steps)
        scale = self._rounded(scale)
        x_min = jnp.where(x_min > 0, -x_min, x_min)
        # An integer zero point keeps zero exactly representable, which padding and exports need;
        # rounding is straight-through and clipping stops the gradient, as for the codes.
        return scale, fmt.fake_quant(fmt.lowest - x_min / scale, jnp.ones(()))

    def _learned(self, name: str, calibrated: jax.Array) -> jax.Array:
        """A trained number; a calibration pass sets it."""
        variable = self.variable(PARAMETERS, name, lambda: calibrated)
        if self._calibrating:
            variable.value = jax.lax.stop_gradient(calibrated)
        return variable.value

    def _observed(self, x: jax.Array) -> tuple[jax.Array | float, jax.Array]:
        """Lower and upper end of the range that was observed so far; before anything was, 1 is the upper.

        Calibration takes the mean over its batches, of absolute maxima the extremes. A running average
        copies its first batch, and quantizes each training batch by that batch's own range.
        """
        shape = (x.shape[-1],) if self.spec.granularity == "per_channel" else ()
        start = {"x_max": jnp.ones} if self.spec.symmetric else {"x_min": jnp.zeros, "x_max": jnp.ones}
        ends = {name: self.variable(STATISTICS, name, init, shape) for name, init in start.items()}
        count = self.variable(STATISTICS, "count", lambda: jnp.zeros((), jnp.int32))
        current = {name: end.value for name, end in ends.items()}
        if self._calibrating or self._averaging:
            batch = self._batch_range(x)
            for name, end in ends.items():
                end.value = self._merged(name, end.value, batch[name], count.value)
                current[name] = batch[name] if self._averaging else end.value
            count.value += 1
        return current.get("x_min", 0.0), current["x_max"]

    def _merged(self, name: str, old: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
        if self._averaging:
            merged = old + self.spec.momentum * (new - old)
        elif self._extremes:
            merged = jnp.minimum(old, new) if name == "x_min" else jnp.maximum(old, new)
        else:
            merged = old + (new - old) / (count + 1)
        return jnp.where(count == 0, new, merged)

    @property
    def _extremes(self) -> bool:
        return self.spec.range_statistic == "absmax"

    def _batch_range(self, x: jax.Array) -> dict[str, jax.Array]:
        """Ends of one batch's range, on all devices; of data without any extent up to 1."""
        statistic, percentile = self.spec.range_statistic, self.spec.percentile
        if self.spec.symmetric:
            high = jax.lax.stop_gradient(self._range(x))
            ends = {"x_max": jnp.where(high > 0, high, 1.0)}
        else:
            low, high = asymmetric_range(x, statistic, self.format, percentile=percentile)
            ends = {"x_min": low, "x_max": jnp.where(high > low, high, 1.0)}
        if self.axis_name is None:
            return ends
        if not self._extremes:
            return jax.lax.pmean(ends, self.axis_name)
        wider = {"x_min": jax.lax.pmin, "x_max": jax.lax.pmax}
        return {name: wider[name](value, self.axis_name) for name, value in ends.items()}

    def _range(self, x: jax.Array) -> jax.Array:
        return symmetric_range(
            x,
            self.spec.range_statistic,
            self.format,
            per_channel=self.spec.granularity == "per_channel",
            percentile=self.spec.percentile,
        )

    def _lsq_gradient(self, parameter: jax.Array, x: jax.Array) -> jax.Array:
        """Scales the gradient by 1 / sqrt(elements * highest code), elements of one example or channel."""
        count = x.size if self.weights else x.size // x.shape[0]
        count //= max(parameter.size, 1)
        return scale_gradient(parameter, 1 / math.sqrt(max(count, 1) * self.format.highest))

    def _rounded(self, scale: jax.Array) -> jax.Array:
        return power_of_two(scale) if self.spec.power_of_two else scale


def _dorefa_weights(w: jax.Array) -> jax.Array:
    """tanh(w) / max abs(tanh(w)), in [-1, 1] (Zhou et al. 2016, eq. 9 before quantization)."""
    squashed = jnp.tanh(w)
    return squashed / jnp.maximum(jnp.max(jnp.abs(squashed)), SMALLEST_RANGE)


def _pact_clip(x: jax.Array, x_max: jax.Array, signed: bool) -> jax.Array:
    """Clips at the learned level, which gets the clipped elements' gradient (Choi et al. 2018, eq. 3)."""
    clipped = jnp.where(x >= x_max, x_max, x)
    if not signed:
        return jnp.where(clipped < 0, 0.0, clipped)
    return jnp.where(clipped <= -x_max, -x_max, clipped)
