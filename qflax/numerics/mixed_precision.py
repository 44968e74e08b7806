"""Learned bit widths: integers whose width is a value, and quantization by a learned step and range.

Uhlich et al. 2020, "Mixed Precision DNNs: All you need is a good parametrization".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qflax.numerics.arithmetic import product, quotient
from qflax.numerics.gradients import sum_to_shape
from qflax.numerics.operation import Operation
from qflax.numerics.varying import vary_alike

# A range of (2^b - 1) steps, worked out in float32, may come out a few units in the last place too long.
_SLACK = 1 - 2.0**-20


@functools.partial(jax.tree_util.register_dataclass, data_fields=("bits",), meta_fields=("signed",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedInteger:
    """Integers whose width is an array, so that it can be learned: signed ones without the lowest code.

    The value of code `q` is `scale * q`. While a range is learned beside a step, its ends are values too, on
    the grid or not; codes and values are the same thing only once the width is frozen.

    Attributes:
      bits: integer-valued float32, [] or [channels], at most 16.
      signed: whether there is a sign.
    """

    bits: jax.Array
    signed: bool

    @property
    def highest(self) -> jax.Array:
        """Highest code."""
        return highest_code(self.bits, self.signed)

    @property
    def lowest(self) -> jax.Array:
        """Lowest code."""
        return -self.highest if self.signed else jnp.zeros_like(self.highest)

    def encode(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """int32 codes of `x`; `scale` broadcasts against it."""
        return jnp.clip(jnp.round(quotient(x, scale)), self.lowest, self.highest).astype(jnp.int32)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        """float32 values of integer codes."""
        return product(codes.astype(jnp.float32), scale)


def highest_code(bits: jax.Array, signed: bool) -> jax.Array:
    """2^(bits - 1) - 1 if signed, else 2^bits - 1: float32, exact for whole bits, differentiable.

    Gradient `2^magnitude_bits ln 2`.
    """
    return _power_of_two_of(bits - signed) - 1


@jax.custom_jvp
def _power_of_two_of(exponent):
    # exp2 is inexact at integers on some backends; ldexp never is. Fractions never get here.
    return jnp.ldexp(jnp.ones_like(exponent), exponent.astype(jnp.int32))


@_power_of_two_of.defjvp
def _power_of_two_of_jvp(primals, tangents):
    power = _power_of_two_of(*primals)
    return power, power * jnp.log(2.0) * tangents[0]


def bit_width(step: jax.Array, x_max: jax.Array, signed: bool) -> jax.Array:
    """Bits that steps of `step` up to `x_max` take: ceil(log2(x_max / step + 1)), and one for the sign.

    Integer-valued float32. The ceiling is exact, in that a ratio within 2^-20 of a power of two counts as
    that; its gradient is straight-through: that of the logarithm (section 3.1).
    """
    steps = quotient(x_max, step) + 1
    return _ceil_log2(steps) + signed


@jax.custom_jvp
def _ceil_log2(x):
    # x = mantissa * 2^exponent with a mantissa in [1/2, 1); log2 is inexact on some backends.
    mantissa, exponent = jnp.frexp(x * _SLACK)
    return (exponent - (mantissa == 0.5)).astype(jnp.float32)


@_ceil_log2.defjvp
def _ceil_log2_jvp(primals, tangents):
    return _ceil_log2(*primals), tangents[0] / (primals[0] * jnp.log(2.0))


@jax.custom_jvp
def round_straight_through(x: jax.Array) -> jax.Array:
    """Nearest integers, half to even; gradient 1."""
    return jnp.round(x)


round_straight_through.defjvp(lambda primals, tangents: (jnp.round(*primals), *tangents))


def quantize_to_range(
    x: jax.Array, step: jax.Array, x_max: jax.Array, *, signed: bool, highest: jax.Array | None = None
) -> jax.Array:
    """Multiples of `step` up to `x_max`, and `x_max` itself beyond (Uhlich et al. 2020, eq. 1 and 4).

    |                                   | value               | d/dx | d/dstep        | d/dx_max |
    |-----------------------------------|---------------------|------|----------------|----------|
    | abs(x) <= x_max (unsigned: and x >= 0) | step round(x / step) | 1    | (y - x) / step | 0   |
    | beyond                            | sign(x) x_max       | 0    | 0              | sign(x)  |
    | unsigned, x < 0                   | 0                   | 0    | 0              | 0        |

    Autodiff of clip and round would get d/dstep wrong where `x_max` is no multiple of `step`.

    Args:
      x: float32 array.
      step, x_max: positive float32, [] or [channels].
      signed: whether there are negative values.
      highest: x_max / step, for where that is known to be whole.
    """
    highest = quotient(x_max, step) if highest is None else highest
    return _quantize_to_range(signed, *vary_alike(x, step, x_max, highest))


@Operation
def quantize_range(
    x: jax.Array, step: jax.Array, x_max: jax.Array, highest: jax.Array, *, signed: bool
) -> jax.Array:
    """`quantize_to_range` in units of `step`, float32: whole numbers but for a learned `highest`."""
    lowest = (-x_max, -highest) if signed else (0.0, 0.0)
    # Clipped from outside first: an x of exactly x_max is inside and rounds.
    inside = jnp.round(quotient(x, step))
    return jnp.where(x > x_max, highest, jnp.where(x < lowest[0], lowest[1], inside))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantize_to_range(signed, x, step, x_max, highest):
    return product(quantize_range(x, step, x_max, highest, signed=signed), step)


def _quantize_to_range_forward(signed, x, step, x_max, highest):
    return _quantize_to_range(signed, x, step, x_max, highest), (x, step, x_max)


def _quantize_to_range_backward(signed, residuals, g):
    x, step, x_max = residuals
    above, below = x > x_max, x < (-x_max if signed else 0.0)
    inside = ~(above | below)
    u = quotient(x, step)
    d_step = jnp.where(inside, g * (jnp.round(u) - u), 0.0)
    d_x_max = jnp.where(above, g, jnp.where(below, -g if signed else 0.0, 0.0))
    sums = sum_to_shape(d_step, step.shape), sum_to_shape(d_x_max, x_max.shape)
    return jnp.where(inside, g, 0.0), *sums, None


_quantize_to_range.defvjp(_quantize_to_range_forward, _quantize_to_range_backward)
