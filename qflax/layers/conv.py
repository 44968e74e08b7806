"""Convolutions with quantized kernels."""

import math

import flax.linen as nn
import jax

from qflax.layers.product import Product
from qflax.numerics import convolve


class Conv(Product, nn.Conv):
    """`flax.linen.Conv` with its kernel [..., in / groups, features] on a quantizer's grid."""

    layer, kind = nn.Conv, "conv"

    @nn.nowrap
    def _linear(self) -> nn.Module:
        linear = super()._linear()
        if self.conv_general_dilated is None and self.conv_general_dilated_cls is None:
            linear = linear.clone(conv_general_dilated_cls=lambda: _convolve)
        return linear

    @nn.nowrap
    def _kernel_shape(self, x):
        return (*_sizes(self.kernel_size), x.shape[-1] // self.feature_group_count, self.features)

    @nn.nowrap
    def _products(self, x, y):
        return _positions(y, self.kernel_size)


class ConvTranspose(Product, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with its kernel on a quantizer's grid.

    Bounds on its accumulator count every weight, though a stride leaves fewer of them for an output.
    """

    layer, kind = nn.ConvTranspose, "conv"

    @nn.nowrap
    def _kernel_shape(self, x):
        ends = (x.shape[-1], self.features)
        return (*_sizes(self.kernel_size), *(ends[::-1] if self.transpose_kernel else ends))

    @nn.nowrap
    def _flat(self, kernel, x):
        del x
        return kernel.swapaxes(-1, -2) if self.transpose_kernel else kernel

    @nn.nowrap
    def _unflat(self, kernel, shape, x):
        del shape
        return self._flat(kernel, x)

    @nn.nowrap
    def _products(self, x, y):
        return _positions(x, self.kernel_size)


def _positions(x, kernel_size) -> int:
    """Of one example [(batch,) ..., *places, channels], with all batch axes but the first."""
    places = len(_sizes(kernel_size))
    return math.prod((*x.shape[1 : -1 - places], *x.shape[-1 - places : -1]))


def _sizes(kernel_size) -> tuple[int, ...]:
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def _convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated`; of images the one whose gradient is fast on a CPU."""
    dilated = any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in options[name])
    if x.ndim != 4 or dilated or len(set(strides)) > 1 or options["precision"] is not None:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return convolve(x, kernel, stride=strides[0], padding=padding, groups=options["feature_group_count"])
