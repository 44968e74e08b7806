"""Dense layer with a quantized kernel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from qflax.layers.cost import report
from qflax.layers.operands import (
    affine,
    compute_dtype,
    product_cost,
    quantize_bias,
    quantize_outputs,
    quantize_weights,
)
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, value_of


class Dense(nn.Module):
    """`flax.linen.Dense` with its kernel on a quantizer's grid.

    Parameters: `kernel` [in, features], `bias` [features] if `use_bias`.

    Attributes:
      features: outputs.
      use_bias: whether a bias is added.
      dtype: dtype of the operands after quantization; None is the input's.
      quantization: the policy, asked for this layer's `weights`, `biases` and `outputs`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, inputs: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [..., in] to [..., features]; quantized outputs come with their grid."""
        x = value_of(inputs)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        quantized = quantize_weights(self, self.quantization, kernel, inputs)
        dtype = compute_dtype(self.dtype, x)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            bias = quantize_bias(self, self.quantization, bias, quantized, inputs)
        y = affine(jnp.matmul, inputs, quantized, bias, dtype)
        outputs = quantize_outputs(self, self.quantization, y)
        report(
            self,
            kind="dense",
            macs=math.prod(x.shape[1:-1]) * math.prod(shape),
            **product_cost(self, self.quantization, quantized, inputs, bias, outputs),
        )
        return outputs
