"""Matrix products with quantized kernels."""

import math

import flax.linen as nn
import jax.numpy as jnp
import opt_einsum
from flax.core.meta import AxisMetadata

from qflax.layers.product import Product


class Dense(Product, nn.Dense):
    """`flax.linen.Dense` with its kernel [in, features] on a quantizer's grid."""

    layer, kind = nn.Dense, "dense"

    @nn.nowrap
    def _kernel_shape(self, x):
        return (x.shape[-1], self.features)


class DenseGeneral(Product, nn.DenseGeneral):
    """`flax.linen.DenseGeneral`, but for `batch_dims`, with its kernel [*in, *features] on a grid."""

    layer, kind = nn.DenseGeneral, "dense"

    @property
    def _features(self) -> tuple[int, ...]:
        return (self.features,) if isinstance(self.features, int) else tuple(self.features)

    @nn.nowrap
    def _kernel_shape(self, x):
        return (*(x.shape[axis] for axis in self._axes(x)), *self._features)

    @nn.nowrap
    def _axes(self, x):
        """Axes of the input that are summed over."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return sorted(axis % x.ndim for axis in axes)  # As Flax has it.

    @nn.nowrap
    def _multiply(self, x, kernel, shape):
        if self.dot_general is not None or self.dot_general_cls is not None:
            return super()._multiply(x, kernel, shape)
        axes = self._axes(x)  # As one product of matrices, which every export knows.
        x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
        y = jnp.matmul(x.reshape(*x.shape[: -len(axes)], -1), kernel, precision=self.precision)
        return y.reshape(*y.shape[:-1], *self._features)

    @nn.nowrap
    def _bias_shape(self, x):
        del x
        return self._features

    @nn.nowrap
    def _kernel_init(self, shape):
        features = math.prod(self._features)

        def init(key, shape, dtype):  # As Flax does it: as of a matrix.
            kernel = self.kernel_init(key, (math.prod(shape) // features, features), dtype)
            if isinstance(kernel, AxisMetadata):  # As of `nn.with_partitioning`.
                return kernel.replace_boxed(kernel.unbox().reshape(shape))
            return kernel.reshape(shape)

        return init

    @nn.nowrap
    def _flat(self, kernel, x):
        del x
        return kernel.reshape(-1, math.prod(self._features))

    @nn.nowrap
    def _spread(self, values, x):
        del x
        return values.reshape(self._features)


class Einsum(Product, nn.Einsum):
    """`flax.linen.Einsum`, with its equation as an attribute, and its kernel on a quantizer's grid.

    Axes of the kernel that the result has, too, count as those of outputs, in the order of the result.
    """

    layer, kind = nn.Einsum, "dense"

    @nn.nowrap
    def _labels(self, x) -> tuple[str, str]:
        """Of the kernel, and of the result."""
        kernel = jnp.empty(self.shape)
        operands, result, _ = opt_einsum.parser.parse_einsum_input((self.einsum_str, x, kernel))
        return operands.split(",")[1], result

    @nn.nowrap
    def _kernel_shape(self, x):
        del x
        return tuple(self.shape)

    @nn.nowrap
    def _bias_shape(self, x):
        kernel, result = self._labels(x)
        return tuple(self.shape[kernel.index(label)] for label in result if label in kernel)

    @nn.nowrap
    def _order(self, x) -> list[int]:
        """Axes of the kernel: those that are summed over, then those of outputs."""
        kernel, result = self._labels(x)
        summed = [i for i, label in enumerate(kernel) if label not in result]
        return [*summed, *(kernel.index(label) for label in result if label in kernel)]

    @nn.nowrap
    def _flat(self, kernel, x):
        outputs = self._bias_shape(x)
        ordered = kernel.transpose(self._order(x))
        return ordered.reshape(*(ordered.shape[: kernel.ndim - len(outputs)] or (1,)), -1)

    @nn.nowrap
    def _unflat(self, kernel, shape, x):
        order = self._order(x)
        ordered = kernel.reshape([shape[axis] for axis in order])
        return ordered.transpose([order.index(axis) for axis in range(len(shape))])

    @nn.nowrap
    def _spread(self, values, x):
        kernel, result = self._labels(x)
        sizes = dict(zip(kernel, self.shape, strict=True))
        return values.reshape([sizes.get(label, 1) for label in result])
