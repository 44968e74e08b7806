"""Pooling."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.layers.activation import Quantize
from qflax.numerics import IntegerFormat, width_of_extremes
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, value_of


class AveragePool(nn.Module):
    """Global average over height and width; its output is float unless a rule quantizes it.

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
        mean = jnp.mean(value_of(x), axis=(1, 2))
        if isinstance(x, QuantizedArray) and isinstance(x.format, IntegerFormat) and x.symmetric:
            pixels, fmt = math.prod(x.value.shape[1:3]), x.format
            bits = width_of_extremes(pixels * fmt.lowest, pixels * fmt.highest) - (not fmt.signed)
            total = IntegerFormat(bits=bits, signed=fmt.signed)
            mean = QuantizedArray(value=mean, scale=x.scale / pixels, zero_point=x.zero_point, format=total)
        return Quantize(self.signed, self.quantization, name="output")(mean)


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
        largest = nn.max_pool(value_of(x), tuple(self.window), strides, tuple(self.padding))
        return x.replace(value=largest) if isinstance(x, QuantizedArray) else largest
