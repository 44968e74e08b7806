"""Small floating-point formats eXmY: bit patterns, values, and fake quantization with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qflax.errors import choose, require
from qflax.numerics.arithmetic import product, quotient
from qflax.numerics.gradients import passed_on, sum_to_shape
from qflax.numerics.integer import CLIP_GRADIENTS
from qflax.numerics.operation import Operation
from qflax.numerics.rounding import ROUNDING_MODES
from qflax.numerics.varying import vary_alike

SPECIALS = ("none", "nan", "ieee", "fnuz")
MINIFLOAT_SURROGATES = ("identity", "proportional")

# Layout of a float32, in which all rounding is done, on integers: XLA's CPU backend takes subnormals for
# zero in float arithmetic, and its log2 and exp2 are inexact at powers of two.
_SIGN, _INFINITY, _NAN = np.uint32(0x80000000), np.uint32(0x7F800000), np.uint32(0x7FC00000)
_MANTISSA, _BIAS = 23, 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinifloatEstimator:
    """How the gradient passes through rounding and saturation.

    Attributes:
      rounding: rounding mode of the forward pass (`numerics.rounding`).
      surrogate: `identity`, or `proportional`: y / x for normal values, which is what comes out if the
        gradient also passes through the logarithm that finds the exponent (Brevitas).
      clip: which elements count as inside the range and receive a gradient. `after_rounding`: those whose
        rounded value needs no saturation; `before_rounding`: those of at most the largest magnitude
        before rounding; `straight_through`: all.
    """

    rounding: str = "half_even"
    surrogate: str = "identity"
    clip: str = "after_rounding"

    def __post_init__(self):
        choose("rounding", self.rounding, ROUNDING_MODES)
        choose("surrogate", self.surrogate, MINIFLOAT_SURROGATES)
        choose("clip", self.clip, CLIP_GRADIENTS)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MinifloatFormat:
    """Sign, exponent and mantissa; the value of a bit pattern is that of IEEE 754, times the scale.

    | specials | codes that are not numbers                         | for instance                       |
    |----------|----------------------------------------------------|------------------------------------|
    | none     | none                                               | float4_e2m1fn, float6_e3m2fn       |
    | nan      | all ones: NaN                                      | float8_e4m3fn (OCP e4m3)           |
    | ieee     | largest exponent: infinity and NaN                 | float8_e5m2, float16, bfloat16     |
    | fnuz     | minus zero: NaN (so that there is no minus zero)   | float8_e4m3fnuz, float8_e5m2fnuz   |

    Values are float32, which bounds what is possible: the exponent of the smallest normal value is at
    least -126 (but for e8m0), and patterns beyond the largest float32 are not used.

    Attributes:
      exponent_bits: 1 to 8.
      mantissa_bits: 0 to 23.
      bias: of the exponent; None is 2^(exponent_bits - 1) - 1.
      specials: see above.
      signed: whether there is a sign bit; without one, negative values become the smallest.
      subnormals: False uses exponent 0 like any other, so that zero does not exist (float8_e8m0fnu).
      saturate: values beyond the largest become the largest; False: infinity, or NaN without one.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    specials: str = "none"
    signed: bool = True
    subnormals: bool = True
    saturate: bool = True

    def __post_init__(self):
        exponent, mantissa = self.exponent_bits, self.mantissa_bits
        for name, value, low, high in (
            ("exponent_bits", exponent, 1, 8),
            ("mantissa_bits", mantissa, 0, 23),
        ):
            ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            require(ok, f"{name}={value!r}: a minifloat has {low} to {high}")
        choose("specials", self.specials, SPECIALS)
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (exponent - 1) - 1)
        bias = self.bias
        require(
            isinstance(bias, int) and not isinstance(bias, bool), f"bias={bias!r}: must be a whole number"
        )
        scale_format = not self.subnormals and mantissa == 0 and bias == _BIAS
        lowest = -126 <= self.smallest_exponent <= 127 or scale_format
        require(lowest, f"bias={bias}: the smallest normal value, 2^{self.smallest_exponent}, is no float32")
        require(self.specials != "ieee" or exponent > 1, "specials='ieee': needs exponent_bits of at least 2")
        require(
            self.specials != "nan" or exponent + mantissa > 1, "specials='nan': leaves no number but zero"
        )
        require(self.specials != "fnuz" or self.signed, "specials='fnuz': needs signed=True")
        # Without a zero its smallest negative number would have the pattern of NaN.
        require(self.specials != "fnuz" or self.subnormals, "specials='fnuz': needs subnormals=True")
        require(self.saturate or self.specials != "none", "saturate=False: needs specials to overflow to")

    @property
    def bits(self) -> int:
        """Bits of a pattern."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias if self.subnormals else -self.bias

    @property
    def max(self) -> float:
        """Largest value."""
        return self._value(self._largest_code)

    @property
    def threshold(self) -> float:
        """A range of `x_max` has the scale `x_max / threshold`: the largest value, but at most 2^80.

        Scales by the largest values of 8 exponent bits would be subnormal, which compilers take for zero;
        that far from the format's own subnormals it makes no difference.
        """
        return min(self.max, 2.0**80)

    @property
    def min_normal(self) -> float:
        """Smallest positive value with a full mantissa."""
        return 2.0**self.smallest_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return self._value(1 if self.subnormals else 0)

    @property
    def values(self) -> np.ndarray:
        """All non-negative values in the order of their patterns, float64."""
        return np.array([self._value(code) for code in range(self._largest_code + 1)])

    def encode(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        *,
        rounding: str = "half_even",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """uint32 bit patterns of `x / scale`; NaN, where the format has none, becomes the pattern 0.

        Args:
          x: float32 array.
          scale: positive float32, broadcastable to `x`; None is 1, for which subnormals of float32 are
            exact too.
          rounding: see `numerics.rounding`.
          key: random key for stochastic rounding.
        """
        sign, magnitude, _, old = self._rounded(_scaled(x, scale), rounding, key)
        m, shift = self.mantissa_bits, _MANTISSA - self.mantissa_bits
        code = (magnitude >> shift) - np.uint32((_BIAS - self.bias) * 2**m % 2**32)
        if self.subnormals:
            exponent, significand = _split(magnitude)
            below = self.smallest_exponent + _BIAS - exponent.astype(jnp.int32)
            steps = significand >> jnp.clip(shift + below, 0, 31).astype(jnp.uint32)
            normal = (below <= 0) & (significand >= 2**_MANTISSA)
            code = jnp.where(normal, code, steps)
        overflow = jnp.where(magnitude == _INFINITY, self._infinity_code, self._nan_code)
        code = jnp.where(magnitude >= _INFINITY, overflow, code)
        top = jnp.where(sign != 0, np.uint32(2 ** (self.bits - 1) if self.signed else 0), np.uint32(0))
        isnan = old > _INFINITY
        if self.specials == "fnuz":
            isnan |= magnitude > _INFINITY
            top = jnp.where(isnan, np.uint32(0), top)
        elif self.specials == "none":
            top = jnp.where(isnan, np.uint32(0), top)
        return code | top

    def decode(self, codes: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """float32 values of bit patterns (any integer dtype), times `scale`."""
        codes = codes.astype(jnp.uint32)
        e, m = self.exponent_bits, self.mantissa_bits
        magnitude = codes & np.uint32(2 ** (e + m) - 1)
        offset = np.uint32((_BIAS - self.bias) * 2**_MANTISSA % 2**32)
        bits = (magnitude << np.uint32(_MANTISSA - m)) + offset
        if self.subnormals:
            # mantissa * 2^(1 - bias - m) with its leading one moved to the place of the implicit bit.
            places = jax.lax.clz(magnitude).astype(jnp.int32) - (31 - _MANTISSA)
            exponent = 1 - self.bias - m + _MANTISSA - places + _BIAS
            kept = jnp.where(exponent > 0, places, places - 1 + exponent).astype(jnp.uint32)
            small = (magnitude << kept) & np.uint32(2**_MANTISSA - 1)
            small += jnp.maximum(exponent, 0).astype(jnp.uint32) << _MANTISSA
            bits = jnp.where(magnitude < 2**m, jnp.where(magnitude == 0, np.uint32(0), small), bits)
        else:
            # 2^-127 is itself a subnormal float32.
            bits = jnp.where(bits == 0, np.uint32(2 ** (_MANTISSA - 1)), bits)
        if self.specials != "none":
            infinite = (magnitude == self._infinity_code) & (self.specials == "ieee")
            special = jnp.where(infinite, _INFINITY, _NAN)
            bits = jnp.where(magnitude > self._largest_code, special, bits)
        sign = codes >> np.uint32(e + m) << np.uint32(31) if self.signed else jnp.zeros_like(codes)
        if self.specials == "fnuz":
            bits = jnp.where((magnitude == 0) & (sign != 0), _NAN, bits)
        y = jax.lax.bitcast_convert_type(bits | sign, jnp.float32)
        return y if scale is None else product(y, scale)

    def unscaled(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        *,
        rounding: str = "half_even",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`decode(encode(x, scale))`, float32: `fake_quant` in units of `scale`; NaN stays NaN."""
        if rounding == "stochastic" and key is not None:
            return _unscaled(self, _scaled(x, scale), rounding, key)
        return quantize_minifloat(x, *([] if scale is None else [scale]), format=self, rounding=rounding)

    def fake_quant(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        *,
        estimator: MinifloatEstimator = MinifloatEstimator(),
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`decode(encode(x))` bit for bit (NaN stays NaN in every format), with gradients.

        With `u = x / scale`, `r` its rounded value and `g` the incoming gradient:

        |                             | d/dx    | d/dscale  |
        |-----------------------------|---------|-----------|
        | inside, identity            | g       | g (r - u) |
        | inside, proportional, normal | g r / u | 0        |
        | saturated                   | 0       | g r       |

        Args:
          x: float32 array.
          scale: positive float32, broadcastable to `x`; None is 1.
          estimator: rounding mode and gradient rules.
          key: random key for stochastic rounding.

        Returns:
          float32 array of the shape of `x`.
        """
        if scale is not None:
            scale = jnp.asarray(scale, jnp.float32)
        return _fake_quant(self, estimator, *vary_alike(x, scale, key))

    @property
    def _largest_code(self) -> int:
        e, m = self.exponent_bits, self.mantissa_bits
        reserved = {"none": 0, "fnuz": 0, "nan": 1, "ieee": 2**m}[self.specials]
        in_float32 = (_BIAS + self.bias + 1) * 2**m - 1
        return min(2 ** (e + m) - 1 - reserved, in_float32)

    @property
    def _infinity_code(self) -> np.uint32:
        """Pattern of infinity in an IEEE-like format."""
        return np.uint32((2**self.exponent_bits - 1) * 2**self.mantissa_bits)

    @property
    def _nan_code(self) -> np.uint32:
        e, m = self.exponent_bits, self.mantissa_bits
        quiet = ((2**e - 1) * 2**m) | (2**m >> 1)
        codes = {"none": 0, "nan": 2 ** (e + m) - 1, "ieee": quiet, "fnuz": 2 ** (self.bits - 1)}
        return np.uint32(codes[self.specials])

    def _value(self, code: int) -> float:
        field, mantissa = divmod(code, 2**self.mantissa_bits)
        if self.subnormals and field == 0:
            return mantissa * 2.0 ** (1 - self.bias - self.mantissa_bits)
        return (2**self.mantissa_bits + mantissa) * 2.0 ** (field - self.bias - self.mantissa_bits)

    def _rounded(self, u, rounding, key):
        """Sign bits, and as patterns of float32: magnitude, rounded unsaturated magnitude, old magnitude."""
        bits = jax.lax.bitcast_convert_type(u.astype(jnp.float32), jnp.uint32)
        sign, old = bits & _SIGN, bits & ~_SIGN
        exponent, significand = _split(old)
        below = jnp.maximum(self.smallest_exponent + _BIAS - exponent.astype(jnp.int32), 0)
        dropped = (_MANTISSA - self.mantissa_bits + below).astype(jnp.uint32)
        # Of 25 bits to drop or more, the significand is less than half a step.
        limit = 31 if rounding == "stochastic" else 25
        if rounding == "stochastic":
            significand >>= jnp.minimum(jnp.maximum(dropped, limit) - limit, 31)
        dropped = jnp.minimum(dropped, limit)
        mask = (np.uint32(1) << dropped) - 1
        if rounding == "stochastic" and key is not None:
            increment = jax.random.bits(key, old.shape, jnp.uint32) & mask
        elif rounding == "floor":
            increment = jnp.where(sign != 0, mask, 0)
        elif rounding == "ceil":
            increment = jnp.where(sign != 0, 0, mask)
        elif rounding == "toward_zero":
            increment = np.uint32(0)
        else:
            increment = (mask >> 1) + ((significand >> dropped) & mask & 1)
        rounded = (significand + increment) & ~mask
        unsaturated = jnp.where(rounded == 0, 0, ((exponent - 1) << _MANTISSA) + rounded)
        if rounding in ("floor", "ceil", "stochastic"):
            smallest = np.float32(self.min_subnormal).view(np.uint32)
            unsaturated = jnp.where((rounded != 0) & (dropped >= 25), smallest, unsaturated)
        if not self.signed:
            unsaturated = jnp.where(sign != 0, 0, unsaturated)
            sign = jnp.zeros_like(sign)
        if not self.subnormals:
            unsaturated = jnp.maximum(unsaturated, np.float32(self.min_normal).view(np.uint32))
        largest = np.float32(self.max).view(np.uint32)
        if self.saturate:
            magnitude = jnp.minimum(unsaturated, largest)
        else:
            overflow = _INFINITY if self.specials == "ieee" else _NAN
            magnitude = jnp.where(unsaturated > largest, overflow, unsaturated)
        magnitude = jnp.where(old > _INFINITY, _NAN, magnitude)
        if self.specials == "fnuz":
            sign = jnp.where(magnitude == 0, 0, sign)
        return sign, magnitude, unsaturated, old


def _split(magnitude: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponent field (of subnormals 1) and significand (of normals with the implicit bit)."""
    exponent = jnp.maximum(magnitude >> _MANTISSA, 1)
    return exponent, magnitude - ((exponent - 1) << _MANTISSA)


def _scaled(x, scale):
    return x if scale is None else quotient(x, scale)


def _unscaled(fmt, u, rounding, key=None):
    sign, magnitude, _, _ = fmt._rounded(u, rounding, key)
    return jax.lax.bitcast_convert_type(magnitude | sign, jnp.float32)


@Operation
def quantize_minifloat(x: jax.Array, *scale: jax.Array, format: MinifloatFormat, rounding: str) -> jax.Array:
    """See `MinifloatFormat.unscaled`."""
    return _unscaled(format, _scaled(x, *(scale or [None])), rounding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake_quant(fmt, estimator, x, scale, key):
    y = fmt.unscaled(x, scale, rounding=estimator.rounding, key=key)
    return y if scale is None else product(y, scale)


def _fake_quant_forward(fmt, estimator, x, scale, key):
    return _fake_quant(fmt, estimator, x, scale, key), (x, scale, key)


def _fake_quant_backward(fmt, estimator, residuals, g):
    # Rounded again: cheaper than keeping the values from the forward pass.
    x, scale, key = residuals
    u = _scaled(x, scale)
    sign, magnitude, unsaturated, old = fmt._rounded(u, estimator.rounding, key)
    r = jax.lax.bitcast_convert_type(magnitude | sign, jnp.float32)
    through = g
    if estimator.surrogate == "proportional":
        normal = old >= np.float32(fmt.min_normal).view(np.uint32)
        through = jnp.where(normal, g * (r / jnp.where(normal, u, 1.0)), g)
    if estimator.clip != "straight_through":
        compared = unsaturated if estimator.clip == "after_rounding" else old
        inside = compared <= np.float32(fmt.max).view(np.uint32)
        if not fmt.signed:
            inside &= u >= 0
        through = jnp.where(inside, through, 0.0)
    d_scale = None if scale is None else sum_to_shape(g * r - passed_on(through, u), scale.shape)
    return through, d_scale, None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)
