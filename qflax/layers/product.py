"""What layers with a kernel have in common: Flax's own arithmetic, on integers, behind scales."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from qflax.layers.activation import Quantize
from qflax.layers.cost import report
from qflax.layers.operands import affine, product_cost, quantize_bias, quantize_outputs, quantize_weights
from qflax.quantizers import FLOAT, HELD, PROJECTED, Quantization, QuantizedArray, value_of


class Product(nn.Module):
    """A layer of Flax's that is linear in its input and its kernel, with quantizers; subclasses say which.

    Parameters and attributes are those of Flax's layer, and these:

    Attributes:
      quantization: the policy, asked for this layer's `weights`, `biases` and `outputs`, and for the
        `activations` of the place `input` below it.
      quantize_input: whether an input that lies on no grid gets the policy's quantizer of activations.
      signed_input: whether it is signed, where the spec leaves it open.
    """

    quantization: Quantization = FLOAT
    quantize_input: bool = False
    signed_input: bool = True

    layer = None  # Flax's class.
    kind = ""  # See `LayerCost`.

    @nn.compact
    def __call__(self, inputs: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps what Flax's layer does; quantized outputs come with their grid."""
        if self.quantize_input:
            place = Quantize(self.signed_input, by_default=True, quantization=self.quantization, name="input")
            inputs = place(inputs)
        x = value_of(inputs)
        shape = self._kernel_shape(x)
        kernel = self._flat(self.param("kernel", self._kernel_init(shape), shape, self.param_dtype), x)
        quantized = quantize_weights(self, self.quantization, kernel, inputs)
        self._take_kernel(shape, x)
        dtype = jnp.dtype(self.dtype or jnp.result_type(x, kernel))
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, self._bias_shape(x), self.param_dtype).reshape(-1)
            bias = quantize_bias(self, self.quantization, bias, quantized, inputs)
        multiply = functools.partial(self._multiply, shape=shape)
        y = affine(multiply, inputs, quantized, bias, dtype, functools.partial(self._spread, x=x))
        outputs = quantize_outputs(self, self.quantization, y)
        report(
            self,
            kind=self.kind,
            macs=self._products(x, y) * kernel.size,
            **product_cost(self, self.quantization, quantized, inputs, bias, outputs),
        )
        return outputs

    @nn.nowrap
    def _take_kernel(self, shape: tuple[int, ...], x: jax.Array) -> None:
        """Puts what its quantizer has projected, or holds, in the place of the kernel of `shape`."""
        if self.is_initializing() or not self.is_mutable_collection("params"):
            return  # `nn.map_variables` makes them of others.
        for collection in (PROJECTED, HELD):
            reported = self.get_variable(collection, "weights", {})
            if reported and self.is_mutable_collection(collection):
                kernel = self._unflat(reported["kernel"], shape, x).astype(self.param_dtype)
                boxed = nn.meta.replace_boxed(self.get_variable("params", "kernel"), kernel)
                self.put_variable("params", "kernel", boxed)

    @nn.nowrap
    def _multiply(self, x: jax.Array, kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What Flax's layer makes of an input and a kernel as `_flat` makes it of one of `shape`."""
        return self._linear().apply({"params": {"kernel": self._unflat(kernel, shape, x)}}, x)

    @nn.nowrap
    def _linear(self) -> nn.Module:
        """Flax's layer without a bias, bound to nothing, of the dtype of what it is given."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self.layer)
            if field.init and field.name not in ("parent", "name")
        }
        return plain(self.layer)(**{**fields, "use_bias": False, "dtype": None}, parent=None)

    @nn.nowrap
    def _kernel_shape(self, x: jax.Array) -> tuple[int, ...]:
        raise NotImplementedError

    @nn.nowrap
    def _bias_shape(self, x: jax.Array) -> tuple[int, ...]:
        del x
        return (self.features,)

    @nn.nowrap
    def _kernel_init(self, shape: tuple[int, ...]) -> Initializer:
        del shape
        return self.kernel_init

    @nn.nowrap
    def _flat(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """The kernel as quantizers know it, [..., outputs]."""
        del x
        return kernel

    @nn.nowrap
    def _unflat(self, kernel: jax.Array, shape: tuple[int, ...], x: jax.Array) -> jax.Array:
        """The kernel of `shape` of which `_flat` made this one."""
        del x
        return kernel.reshape(shape)

    @nn.nowrap
    def _spread(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """Values [outputs] so that they are broadcast to the layer's outputs for the input `x`."""
        del x
        return values

    @nn.nowrap
    def _products(self, x: jax.Array, y: jax.Array) -> int:
        """How often the kernel is multiplied for one example."""
        return math.prod(y.shape[1:]) // math.prod(self._bias_shape(x))


@functools.cache
def plain(layer: type[nn.Module]) -> type[nn.Module]:
    """Flax's class under a name of its own, which nothing puts a `Product` in the place of.

    Exports leave names with a dot out of the paths of layers.
    """
    return type(f"flax.{layer.__name__}", (layer,), {"is_plain": True})
