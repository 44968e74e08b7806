"""Activation functions, and other places in a network where values may be put on a grid."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax

from qflax.layers.cost import report
from qflax.layers.operands import quantize_activations
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, bits_of, value_of


class Activation(nn.Module):
    """An activation function followed by a quantizer.

    Attributes:
      function: elementwise; the output of `nn.relu` counts as unsigned, of any other as signed, where the
        spec leaves it open.
      quantization: the policy, asked for this layer's `activations`.
      signed: whether the output counts as signed, where that is known otherwise.
      by_default: whether the policy's default is asked for, too.
    """

    function: Callable[[jax.Array], jax.Array] = nn.relu
    quantization: Quantization = FLOAT
    signed: bool | None = None
    by_default: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | QuantizedArray:
        """Maps [batch, ...] to the same shape; quantized values come with their grid."""
        signed = self.function is not nn.relu if self.signed is None else self.signed
        quantizer = quantize_activations(self, self.quantization, signed, by_default=self.by_default)
        y = self.function(x)
        y = y if quantizer is None else quantizer(y)
        report(
            self,
            kind="activation",
            roles=("activations",),
            activations=math.prod(x.shape[1:]) if self.by_default or quantizer is not None else 0,
            activation_bits=bits_of(y),
        )
        return y


class Quantize(nn.Module):
    """A place that a rule may quantize, such as the network's input; without one it changes nothing.

    Attributes:
      signed: whether the data is signed, where the spec leaves it open.
      by_default: whether the policy's default is asked for, too, where the data lies on no grid.
      quantization: the policy, asked for this layer's `activations`.
    """

    signed: bool = True
    by_default: bool = False
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, x: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [batch, ...] to the same shape; quantized values come with their grid."""
        by_default = self.by_default and not isinstance(x, QuantizedArray)
        quantizer = quantize_activations(self, self.quantization, self.signed, by_default=by_default)
        y = x if quantizer is None else quantizer(value_of(x), x)
        report(
            self,
            kind="activation",
            roles=("activations",),
            activations=0 if quantizer is None else math.prod(value_of(x).shape[1:]),
            activation_bits=bits_of(y),
        )
        return y
