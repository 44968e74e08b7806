"""A number format, integer or minifloat, behind a scale."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.numerics import IntegerFormat, MinifloatFormat, floor_at, power_of_two, quotient, scale_gradient
from qflax.quantizers.base import Quantizer
from qflax.quantizers.collections import PARAMETERS
from qflax.quantizers.constraints import ANY_LOG2, NEGATIVE, POSITIVE, Box
from qflax.quantizers.quantized_array import QuantizedArray, quantized_array
from qflax.quantizers.statistics import SMALLEST_RANGE

_BOUNDS = {"scale": POSITIVE, "x_max": POSITIVE, "width": POSITIVE, "log2_scale": ANY_LOG2, "x_min": NEGATIVE}


class ScaledQuantizer(Quantizer):
    """Puts an array on the grid of a `Uniform` or `Minifloat` spec.

    Variables (float32; [] or, per channel, [channels]):

    | scale       | `quantizer_params`                             |
    |-------------|------------------------------------------------|
    | lsq         | `scale`; asymmetric also `x_min`               |
    | log2        | `log2_scale`                                   |
    | range, pact | `x_max`; asymmetric range: `width` and `x_min` |
    | static, ema | -                                              |

    and for all of these in `quantizer_stats` the observed range, `x_max` and if asymmetric `x_min`, and
    `count`, the number of batches that it comes from; a set that was calibrated as a whole is one. Of weights
    that freeze when they oscillate also the record `oscillation`.
    """

    @property
    def format(self) -> IntegerFormat | MinifloatFormat:
        """Number format of the codes."""
        return self.spec.number_format(signed=self.signed, narrow=self.weights)

    @nn.compact
    def __call__(self, x: jax.Array, inputs: jax.Array | QuantizedArray | None = None) -> QuantizedArray:
        """Quantizes `x` of any floating dtype; the value is float32. `inputs` are not looked at."""
        del inputs
        spec, fmt = self.spec, self.format
        self._check()
        kernel = x = x.astype(jnp.float32)
        if spec.scale == "dorefa":
            kernel, x = None, _dorefa_weights(x)
        scale, zero_point = self._grid(x)
        self._declare_bounds()
        if self._calibrating and not self.weights:
            return QuantizedArray(x, x / scale, scale, zero_point, fmt, spec.symmetric)
        if spec.scale == "pact":
            x = _pact_clip(x, scale * fmt.threshold, fmt.signed)
            scale = jax.lax.stop_gradient(scale)
        x = self._held(x, scale, kernel)
        stochastic = spec.rounding == "stochastic" and self.has_rng("quantization")
        key = self.make_rng("quantization") if stochastic else None
        if isinstance(fmt, MinifloatFormat):
            # Unscaled, values are exact down to the subnormals of float32.
            operands = (None,) if spec.unscaled else (scale,)
        else:
            operands = (scale, zero_point)
        value = fmt.fake_quant(x, *operands, estimator=spec.estimator, key=key)
        self._report_deviation(x, value, scale * fmt.threshold)
        # The same once more, which compilers notice.
        unscaled = fmt.unscaled(*jax.lax.stop_gradient((x, *operands)), rounding=spec.rounding, key=key)
        self._watch(unscaled, lambda mean: fmt.unscaled(mean, jnp.ones(())))
        return quantized_array(value, unscaled, scale, fmt, zero_point, spec.symmetric)

    @property
    def _averaging(self) -> bool:
        return self.spec.scale == "ema" and self._training

    @property
    def _symmetric(self) -> bool:
        return self.spec.symmetric

    def _declare_bounds(self):
        names = self.variables.get(PARAMETERS, {})
        if not names:
            return
        bounds = dict(_BOUNDS)
        if isinstance(self.format, MinifloatFormat):
            # The range is what is bounded, whatever the largest value of the format.
            shift = math.log2(self.format.threshold)
            bounds["log2_scale"] = tuple(bound - shift for bound in ANY_LOG2)
        self._constrain(Box(tuple((name, *bounds[name]) for name in sorted(names))))

    def _check(self):
        where, scale, fmt = "/".join(self.path), self.spec.scale, self.format
        bipolar = isinstance(fmt, IntegerFormat) and fmt.bipolar
        require(
            not (bipolar and self.spec.rounding != "half_even"),
            f"{where}: rounding={self.spec.rounding!r}: a signed bit has no rounding mode but half_even",
        )
        require(
            not (bipolar and self.spec.surrogate == "tanh"),
            f"{where}: surrogate='tanh': its steps are of one, that of a signed bit is of two, from -1 to 1",
        )
        require(
            not (bipolar and self.spec.range_statistic == "kl"),
            f"{where}: statistic='kl' compares how often sizes occur, and a signed bit has one; take 'mse'",
        )
        if self.weights:
            require(
                not self._freezes or self.spec.rounding == "half_even",
                f"{where}: rounding={self.spec.rounding!r}: weights that oscillate freeze at the nearest "
                "point of their grid; take 'half_even', or let none freeze",
            )
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
            # Only a minifloat may leave it open.
            return self._rounded(jnp.float32(spec.scale_value or 1.0)), zero
        if spec.scale == "dorefa":
            return self._rounded(jnp.float32(1 / fmt.threshold)), zero
        if spec.scale == "statistic":
            x_max = floor_at(self._statistic.range_of(x)[1], SMALLEST_RANGE)
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

    def _lsq_gradient(self, parameter: jax.Array, x: jax.Array) -> jax.Array:
        """Scales the gradient by 1 / sqrt(elements * highest code), elements of one example or channel."""
        count = x.size if self.weights else math.prod(x.shape[1:])
        count //= max(parameter.size, 1)
        return scale_gradient(parameter, 1 / math.sqrt(max(count, 1) * self.format.highest))

    def _rounded(self, scale: jax.Array) -> jax.Array:
        return power_of_two(scale) if self.spec.power_of_two else scale


def _dorefa_weights(w: jax.Array) -> jax.Array:
    """tanh(w) / max abs(tanh(w)), in [-1, 1] (Zhou et al. 2016, eq. 9 before quantization).

    Weights without extent are divided by 1, so that a layer that starts from zeros can leave them.
    """
    squashed = jnp.tanh(w)
    largest = jnp.max(jnp.abs(squashed))
    return squashed / jnp.where(largest <= SMALLEST_RANGE, 1.0, largest)


def _pact_clip(x: jax.Array, x_max: jax.Array, signed: bool) -> jax.Array:
    """Clips at the learned level, which gets the clipped elements' gradient (Choi et al. 2018, eq. 3)."""
    clipped = jnp.where(x >= x_max, x_max, x)
    if not signed:
        return jnp.where(clipped < 0, 0.0, clipped)
    return jnp.where(clipped <= -x_max, -x_max, clipped)
