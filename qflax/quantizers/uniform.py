"""The uniform integer quantizer as a Linen module."""

import math
from collections.abc import Callable

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

    | scale       | `quantizer_params`                            | `quantizer_stats`             |
    |-------------|-----------------------------------------------|-------------------------------|
    | lsq         | `scale`; asymmetric also `x_min`              | `count`                       |
    | log2        | `log2_scale`                                  | `count`                       |
    | range, pact | `x_max`; asymmetric range: `width` and `x_min` | `count`                      |
    | static, ema | -                                             | `count`, `x_max` or `width` and `x_min` |

    They are placeholders until a calibration pass (`calibration.calibrate`) has set them; `count` is the
    number of batches that it has seen. While calibrating, activations pass through unquantized, so that
    every range is that of the float network behind quantized weights.

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
        count = self.variable(STATISTICS, "count", lambda: jnp.zeros((), jnp.int32))
        if spec.symmetric:
            grid = self._rounded(self._symmetric_scale(x, count.value)), zero
        else:
            grid = self._asymmetric_grid(x, count.value)
        if self._calibrating or self._averaging:
            count.value += 1
        return grid

    def _symmetric_scale(self, x: jax.Array, count: jax.Array) -> jax.Array:
        spec, threshold = self.spec, self.format.threshold

        def scale():
            return quotient(_or_one(self._range(x)), threshold)

        if spec.scale == "lsq":
            learned = self._stored(PARAMETERS, "scale", scale, count, x)
            return self._lsq_gradient(floor_at(jnp.abs(learned), SMALLEST_RANGE), x)
        if spec.scale == "log2":
            return jnp.exp2(self._stored(PARAMETERS, "log2_scale", lambda: jnp.log2(scale()), count, x))
        collection = PARAMETERS if spec.scale in ("range", "pact") else STATISTICS
        x_max = self._stored(collection, "x_max", lambda: _or_one(self._range(x)), count, x)
        return quotient(floor_at(jnp.abs(x_max), SMALLEST_RANGE), threshold)

    def _asymmetric_grid(self, x: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        spec, fmt = self.spec, self.format
        steps = fmt.num_codes - 1
        collection = PARAMETERS if spec.scale in ("lsq", "range") else STATISTICS

        extent, unit = ("scale", steps) if spec.scale == "lsq" else ("width", 1)
        seen_low = self.get_variable(collection, "x_min", 0.0)
        seen_high = seen_low + self.get_variable(collection, extent, 0.0) * unit

        def ends():
            low, high = asymmetric_range(x, spec.range_statistic, fmt, percentile=spec.percentile)
            if not self._calibrating or spec.range_statistic != "absmax":
                return low, high
            # The larger of two batches' widths need not hold both.
            first = count == 0
            return (
                jnp.where(first, low, jnp.minimum(low, seen_low)),
                jnp.where(first, high, jnp.maximum(high, seen_high)),
            )

        def width():
            low, high = ends()
            return _or_one(high - low)

        x_min = self._stored(collection, "x_min", lambda: ends()[0], count, x)
        x_min = jnp.where(x_min > 0, -x_min, x_min)
        if spec.scale == "lsq":
            scale = self._stored(collection, "scale", lambda: width() / steps, count, x)
            scale = self._lsq_gradient(floor_at(jnp.abs(scale), SMALLEST_RANGE), x)
            x_min = self._lsq_gradient(x_min, x)
        else:
            stored = self._stored(collection, "width", width, count, x)
            scale = quotient(floor_at(jnp.abs(stored), SMALLEST_RANGE), steps)
        scale = self._rounded(scale)
        # An integer zero point keeps zero exactly representable, which padding and exports need;
        # rounding is straight-through and clipping stops the gradient, as for the codes.
        return scale, fmt.fake_quant(fmt.lowest - x_min / scale, jnp.ones(()))

    def _range(self, x: jax.Array) -> jax.Array:
        return symmetric_range(
            x,
            self.spec.range_statistic,
            self.format,
            per_channel=self.spec.granularity == "per_channel",
            percentile=self.spec.percentile,
        )

    def _stored(
        self,
        collection: str,
        name: str,
        observe: Callable[[], jax.Array],
        count: jax.Array,
        x: jax.Array,
    ) -> jax.Array:
        """A number that calibration and running averages set; before that it is one.

        Calibration takes the mean over its batches, of absolute maxima the maximum. A running average
        copies its first batch, and quantizes each training batch by that batch's own range.
        """
        shape = (x.shape[-1],) if self.spec.granularity == "per_channel" else ()
        variable = self.variable(collection, name, jnp.ones, shape)
        if not (self._calibrating or self._averaging):
            return variable.value
        new, extreme = jax.lax.stop_gradient(observe()), self.spec.range_statistic == "absmax"
        if self.axis_name is not None:
            new = jax.lax.pmean(new, self.axis_name)
        if self._averaging:
            average = variable.value + self.spec.momentum * (new - variable.value)
        elif extreme:
            wider = jnp.minimum if name == "x_min" else jnp.maximum
            average = wider(variable.value, new)
        else:
            average = variable.value + (new - variable.value) / (count + 1)
        variable.value = jnp.where(count == 0, new, average)
        return new if self._averaging else variable.value

    def _lsq_gradient(self, parameter: jax.Array, x: jax.Array) -> jax.Array:
        """Scales the gradient by 1 / sqrt(elements * highest code), elements of one example or channel."""
        count = x.size if self.weights else x.size // x.shape[0]
        count //= max(parameter.size, 1)
        return scale_gradient(parameter, 1 / math.sqrt(max(count, 1) * self.format.highest))

    def _rounded(self, scale: jax.Array) -> jax.Array:
        return power_of_two(scale) if self.spec.power_of_two else scale


def _or_one(x: jax.Array) -> jax.Array:
    """`x`, or 1 where it is zero: data without any extent says nothing about its range."""
    return jnp.where(x > 0, x, 1.0)


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
