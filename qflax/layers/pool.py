"""Average pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.layers.activation import Quantize
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, value_of


class AveragePool(nn.Module):
    """Global average over height and width; its output is float unless a rule quantizes it.

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
        return Quantize(self.signed, self.quantization, name="output")(mean)
