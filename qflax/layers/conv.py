"""Convolution with a quantized kernel."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
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
from qflax.numerics import convolve
from qflax.quantizers import FLOAT, Quantization, QuantizedArray, value_of


class Conv(nn.Module):
    """`flax.linen.Conv` for images, with its kernel on a quantizer's grid.

    Parameters: `kernel` [height, width, in / groups, features], `bias` [features] if `use_bias`.

    Attributes:
      features: output channels.
      kernel_size: height and width.
      strides: of both dimensions.
      padding: `SAME`, `VALID`, or (before, after) for height and width.
      feature_group_count: groups; `in` for a depthwise convolution.
      use_bias: whether a bias is added.
      dtype: dtype of the operands after quantization; None is the input's.
      quantization: the policy, asked for this layer's `weights`, `biases` and `outputs`.
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
    def __call__(self, inputs: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [batch, height, width, in] to [batch, height', width', features]; quantized outputs come with
        their grid.
        """
        x = value_of(inputs)
        channels = x.shape[-1] // self.feature_group_count
        shape = (*self.kernel_size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        quantized = quantize_weights(self, self.quantization, kernel, inputs)
        dtype = compute_dtype(self.dtype, x)
        multiply = functools.partial(
            convolve, stride=self.strides, padding=self.padding, groups=self.feature_group_count
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            bias = quantize_bias(self, self.quantization, bias, quantized, inputs)
        y = affine(multiply, inputs, quantized, bias, dtype)
        outputs = quantize_outputs(self, self.quantization, y)
        report(
            self,
            kind="conv",
            macs=math.prod(y.shape[1:3]) * math.prod(shape),
            **product_cost(self, self.quantization, quantized, inputs, bias, outputs),
        )
        return outputs
