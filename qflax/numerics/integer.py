"""Uniform integer number formats: codes, values, and fake quantization with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qflax.errors import choose, require
from qflax.numerics.arithmetic import product, quotient
from qflax.numerics.gradients import passed_on, sum_to_shape
from qflax.numerics.operation import Operation
from qflax.numerics.rounding import ROUNDING_MODES, round_to_integer
from qflax.numerics.surrogates import SURROGATES
from qflax.numerics.varying import vary_alike

CLIP_GRADIENTS = ("after_rounding", "before_rounding", "straight_through")

_SMALLEST_STRENGTH = 1e-30  # Within float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """How the gradient passes through rounding and clipping.

    Attributes:
      rounding: rounding mode of the forward pass (`numerics.rounding`).
      surrogate: stand-in for the derivative of rounding (`numerics.surrogates`); `tanh` for `half_even` only,
        and not for a signed bit: its steps lie half-way between integers.
      strength: parameter of the surrogate, of `tanh` positive; None is 1e-3 of `ewgs`, 1e-2 of `psgd`, 4 of
        `tanh`.
      clip: which elements count as inside the range and receive a gradient.
        `after_rounding`: those whose rounded code needs no clipping (Brevitas);
        `before_rounding`: those strictly between the extreme codes before rounding (LSQ);
        `straight_through`: all.
    """

    rounding: str = "half_even"
    surrogate: str = "identity"
    strength: float | None = None
    clip: str = "after_rounding"

    def __post_init__(self):
        choose("rounding", self.rounding, ROUNDING_MODES)
        choose("surrogate", self.surrogate, SURROGATES)
        choose("clip", self.clip, CLIP_GRADIENTS)
        if self.surrogate == "tanh":
            require(
                self.rounding == "half_even",
                f"surrogate='tanh' with rounding={self.rounding!r}: its steps lie half-way between integers, "
                "where only rounding='half_even' has its own",
            )
            require(
                self.strength is None or self.strength >= _SMALLEST_STRENGTH,
                f"strength={self.strength!r}: of surrogate='tanh' it must be positive, at least "
                f"{_SMALLEST_STRENGTH:g}",
            )

    def through_rounding(self, g: jax.Array, offset: jax.Array) -> jax.Array:
        """Gradient before rounding from the gradient `g` after it; `offset` is input minus output."""
        rule, default = SURROGATES[self.surrogate]
        return rule(g, offset, default if self.strength is None else self.strength)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerFormat:
    """Integers of 1 to 32 bits, without a sign 31; the value of code `q` is `scale * (q - zero_point)`.

    | bits | signed | narrow | codes                        |
    |------|--------|--------|------------------------------|
    | b    | no     | -      | 0 ... 2^b - 1                |
    | b    | yes    | no     | -2^(b-1) ... 2^(b-1) - 1     |
    | b    | yes    | yes    | -(2^(b-1)-1) ... 2^(b-1) - 1 |
    | 1    | yes    | -      | -1, +1 (bipolar)             |
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self):
        require(
            isinstance(self.bits, int) and 1 <= self.bits <= 32,
            f"bits={self.bits!r}: an integer format has 1 to 32 bits",
        )
        require(
            self.signed or self.bits < 32, "bits=32: an unsigned format has 1 to 31 bits, as codes are int32"
        )

    @property
    def bipolar(self) -> bool:
        """True for the one-bit signed format, whose codes -1 and +1 lie two apart."""
        return self.signed and self.bits == 1

    @property
    def lowest(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -1 if self.bipolar else -(2 ** (self.bits - 1)) + self.narrow

    @property
    def highest(self) -> int:
        """Highest code."""
        if not self.signed:
            return 2**self.bits - 1
        return 1 if self.bipolar else 2 ** (self.bits - 1) - 1

    @property
    def threshold(self) -> int:
        """Largest magnitude of a code: a range of `x_max` has the scale `x_max / threshold`."""
        return max(-self.lowest, self.highest)

    @property
    def num_codes(self) -> int:
        """Number of different codes."""
        return 2 if self.bipolar else self.highest - self.lowest + 1

    def encode(
        self,
        x: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | float = 0.0,
        *,
        rounding: str = "half_even",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """int32 codes of `x`; `scale` and `zero_point` broadcast against it."""
        return (self.unscaled(x, scale, zero_point, rounding=rounding, key=key) + zero_point).astype(
            jnp.int32
        )

    def unscaled(
        self,
        x: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | float = 0.0,
        *,
        rounding: str = "half_even",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Codes of `x` less the zero point, integer-valued float32: `fake_quant` in units of `scale`."""
        if rounding == "stochastic" and key is not None:
            return _unscaled(self, rounding, quotient(x, scale), zero_point, key)
        return quantize_integer(x, scale, zero_point, format=self, rounding=rounding)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | float = 0.0) -> jax.Array:
        """float32 values of integer codes."""
        return product(codes.astype(jnp.float32) - zero_point, scale)

    def fake_quant(
        self,
        x: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | float = 0.0,
        *,
        estimator: Estimator = Estimator(),
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`decode(encode(x))` bit for bit, with gradients for `x`, `scale` and `zero_point`.

        With `u = x / scale`, `q` the code and `g` the incoming gradient, for the identity surrogate:

        |         | d/dx | d/dscale             | d/dzero_point |
        |---------|------|----------------------|---------------|
        | inside  | g    | g (q - zero_point - u) | 0           |
        | outside | 0    | g (q - zero_point)   | -g scale      |

        Args:
          x: float32 array.
          scale: positive float32, broadcastable to `x`.
          zero_point: integer-valued float32, broadcastable to `x`.
          estimator: rounding mode and gradient rules.
          key: random key for stochastic rounding.

        Returns:
          float32 array of the shape of `x`.
        """
        zero_point = jnp.asarray(zero_point, jnp.float32)
        operands = vary_alike(x, jnp.asarray(scale, jnp.float32), zero_point, key)
        return _fake_quant(self, estimator, *operands)

    def _codes(self, u: jax.Array, rounding: str, key: jax.Array | None) -> jax.Array:
        """Nearest points of the unbounded code grid: the integers, or the odd ones if bipolar."""
        if self.bipolar:
            return 2 * jnp.floor(u / 2) + 1
        return round_to_integer(u, rounding, key)


def _unscaled(fmt, rounding, u, zero_point, key=None):
    codes = fmt._codes(u + zero_point, rounding, key)
    return jnp.clip(codes, fmt.lowest, fmt.highest) - zero_point


@Operation
def quantize_integer(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, *, format: IntegerFormat, rounding: str
) -> jax.Array:
    """See `IntegerFormat.unscaled`: clip(round(x / scale + zero_point)) - zero_point."""
    return _unscaled(format, rounding, quotient(x, scale), zero_point)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake_quant(fmt, estimator, x, scale, zero_point, key):
    return product(fmt.unscaled(x, scale, zero_point, rounding=estimator.rounding, key=key), scale)


def _fake_quant_forward(fmt, estimator, x, scale, zero_point, key):
    y = _fake_quant(fmt, estimator, x, scale, zero_point, key)
    return y, (x, scale, zero_point, key)


def _fake_quant_backward(fmt, estimator, residuals, g):
    # The codes are computed again: cheaper than keeping them and the mask from the forward pass.
    x, scale, zero_point, key = residuals
    u = quotient(x, scale)
    shifted = u + zero_point
    unclipped = fmt._codes(shifted, estimator.rounding, key)
    codes = jnp.clip(unclipped, fmt.lowest, fmt.highest)
    through = estimator.through_rounding(g, shifted - unclipped)
    if estimator.clip == "after_rounding":
        through = jnp.where(codes == unclipped, through, 0.0)
    elif estimator.clip == "before_rounding":
        inside = (shifted > fmt.lowest) & (shifted < fmt.highest)
        through = jnp.where(inside, through, 0.0)
    d_scale = g * (codes - zero_point) - passed_on(through, u)
    d_zero_point = (through - g) * scale
    return (
        through,
        sum_to_shape(d_scale, scale.shape),
        sum_to_shape(d_zero_point, zero_point.shape),
        None,
    )


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)
