"""Dense layer with a quantized kernel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from qflax.layers.accumulation import accumulation
from qflax.layers.cost import report
from qflax.layers.operands import compute_dtype, quantize_weights
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, bits_of, value_of


class Dense(nn.Module):
    """`flax.linen.Dense` with its kernel on a quantizer's grid.

    Parameters: `kernel` [in, features], `bias` [features] if `use_bias`.

    Attributes:
      features: outputs.
      use_bias: whether a float bias is added.
      dtype: dtype of the operands after quantization; None is the input's.
      quantization: the policy, asked for this layer's `weights`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, inputs: jax.Array | QuantizedArray) -> jax.Array:
        """Maps [..., in] to [..., features]."""
        x = value_of(inputs)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        quantized = quantize_weights(self, self.quantization, kernel, inputs)
        dtype = compute_dtype(self.dtype, x)
        y = x.astype(dtype) @ value_of(quantized).astype(dtype)
        if self.use_bias:
            y += jnp.asarray(self.param("bias", self.bias_init, (self.features,)), dtype)
        report(
            self,
            kind="dense",
            roles=("weights",),
            weights=math.prod(shape),
            biases=self.features * self.use_bias,
            macs=math.prod(x.shape[1:-1]) * math.prod(shape),
            weight_bits=bits_of(quantized),
            input_bits=bits_of(inputs),
            accumulation=accumulation(quantized, inputs),
        )
        return y
