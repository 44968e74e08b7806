"""Convolution with a quantized kernel."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from qflax.layers.accumulation import accumulation
from qflax.layers.cost import report
from qflax.layers.operands import compute_dtype, quantize_weights
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, bits_of, value_of


class Conv(nn.Module):
    """`flax.linen.Conv` for images, with its kernel on a quantizer's grid.

    Parameters: `kernel` [height, width, in / groups, features], `bias` [features] if `use_bias`.

    Attributes:
      features: output channels.
      kernel_size: height and width.
      strides: of both dimensions.
      padding: `SAME`, `VALID`, or (before, after) for height and width.
      feature_group_count: groups; `in` for a depthwise convolution.
      use_bias: whether a float bias is added.
      dtype: dtype of the operands after quantization; None is the input's.
      quantization: the policy, asked for this layer's `weights`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, inputs: jax.Array | QuantizedArray) -> jax.Array:
        """Maps [batch, height, width, in] to [batch, height', width', features]."""
        x = value_of(inputs)
        channels = x.shape[-1] // self.feature_group_count
        shape = (*self.kernel_size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        quantized = quantize_weights(self, self.quantization, kernel, inputs)
        dtype = compute_dtype(self.dtype, x)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            value_of(quantized).astype(dtype),
            window_strides=(self.strides, self.strides),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.feature_group_count,
        )
        if self.use_bias:
            y += jnp.asarray(self.param("bias", self.bias_init, (self.features,)), dtype)
        report(
            self,
            kind="conv",
            roles=("weights",),
            weights=math.prod(shape),
            biases=self.features * self.use_bias,
            macs=math.prod(y.shape[1:3]) * math.prod(shape),
            weight_bits=bits_of(quantized),
            input_bits=bits_of(inputs),
            accumulation=accumulation(quantized, inputs),
        )
        return y
