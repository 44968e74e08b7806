"""Operands of a convolution or matrix product: kernel and input, quantized where the policy says so."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.quantizers import Quantization, QuantizedArray, Quantizer, quantizer_of


def quantize_weights(
    layer: nn.Module,
    quantization: Quantization,
    kernel: jax.Array,
    inputs: jax.Array | QuantizedArray,
) -> jax.Array | QuantizedArray:
    """The kernel [..., features] by which `inputs` are multiplied, through its quantizer or as it is."""
    spec = quantization.spec("weights", "/".join(layer.path))
    if spec is None:
        return kernel
    return quantizer_of(spec, weights=True, name="weights")(kernel, inputs)


def quantize_activations(
    layer: nn.Module,
    quantization: Quantization,
    signed: bool,
    *,
    by_default: bool,
) -> Quantizer | None:
    """The layer's activation quantizer, made in the layer's scope, or None for float."""
    spec = quantization.spec("activations", "/".join(layer.path), by_default=by_default)
    if spec is None:
        return None
    return quantizer_of(
        spec, weights=False, signed=signed, axis_name=quantization.axis_name, name="activations"
    )


def compute_dtype(dtype: jnp.dtype | None, x: jax.Array) -> jnp.dtype:
    """The dtype to compute in: the layer's, or that of its input."""
    return jnp.dtype(x.dtype if dtype is None else dtype)
