"""Pooling."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.layers.activation import Quantize
from qflax.numerics import IntegerFormat, LearnedInteger, product, quotient, width_of_extremes
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, value_of


class AveragePool(nn.Module):
    """Global average over height and width; a rule may quantize its output.

    The mean of integers is an integer too, their sum, behind a scale divided by the number of pixels: a
    quantizer of kind `truncation` drops that sum's last bits.

    Attributes:
      signed: whether the data is signed, where the spec leaves it open.
      quantization: the policy, asked for the layer `output` below this one.
    """

    signed: bool = False
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, x: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [batch, height, width, channels] to [batch, channels]."""
        mean = _mean(x) if has_codes(x) else None
        mean = jnp.mean(value_of(x), axis=(1, 2)) if mean is None else mean
        return Quantize(self.signed, quantization=self.quantization, name="output")(mean)


def has_codes(x: jax.Array | QuantizedArray) -> bool:
    """Whether `x` is a scale times integers that are codes."""
    return (
        isinstance(x, QuantizedArray)
        and isinstance(x.format, IntegerFormat | LearnedInteger)
        and x.symmetric
        and x.scale.ndim == 0
    )


def mean_of_codes(x: QuantizedArray, total: jax.Array, count: int, divisor: float) -> QuantizedArray | None:
    """What `has_codes`, summed up and divided; None where the sums need more bits than a format has.

    Args:
      x: the operand.
      total: of its codes, `count` in each sum.
      count: see `total`.
      divisor: positive.
    """
    fmt = x.format
    if isinstance(fmt, IntegerFormat):
        bits = width_of_extremes(count * fmt.lowest, count * fmt.highest) - (not fmt.signed)
        if bits > 31 + fmt.signed:
            return None
        fmt = IntegerFormat(bits=bits, signed=fmt.signed)
    else:
        fmt = LearnedInteger(bits=fmt.bits + math.ceil(math.log2(count)), signed=fmt.signed)
    scale = x.scale if divisor == 1 else quotient(x.scale, divisor)
    return QuantizedArray(product(total, jax.lax.stop_gradient(scale)), total, scale, x.zero_point, fmt)


def _mean(x: QuantizedArray) -> QuantizedArray | None:
    pixels = math.prod(x.unscaled.shape[1:3])
    return mean_of_codes(x, jnp.sum(x.unscaled, axis=(1, 2)), pixels, pixels)


class MaxPool(nn.Module):
    """Largest value of each window; what was on a grid stays on it.

    Attributes:
      window: height and width.
      strides: of both dimensions.
      padding: (before, after) for height and width; a window never consists of padding alone.
    """

    window: Sequence[int]
    strides: int
    padding: Sequence[tuple[int, int]]

    def __call__(self, x: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [batch, height, width, channels] to [batch, height', width', channels]."""
        strides = (self.strides, self.strides)
        if not isinstance(x, QuantizedArray):
            return nn.max_pool(x, tuple(self.window), strides, tuple(self.padding))
        largest = nn.max_pool(x.unscaled, tuple(self.window), strides, tuple(self.padding))
        return x.replace(value=product(largest, jax.lax.stop_gradient(x.scale)), unscaled=largest)
