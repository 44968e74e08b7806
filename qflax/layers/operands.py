"""What a convolution or matrix product reads and writes, quantized where the policy says so."""

import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.layers.accumulation import accumulation, has_integer_sums
from qflax.quantizers import Quantization, QuantizedArray, Quantizer, bits_of, quantizer_of, value_of


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


def quantize_bias(
    layer: nn.Module,
    quantization: Quantization,
    bias: jax.Array,
    kernel: jax.Array | QuantizedArray,
    inputs: jax.Array | QuantizedArray,
) -> tuple[jax.Array, jax.Array | int]:
    """The bias [features] of products of `kernel` and `inputs`, on the grid of their sums or as it is.

    With it come its codes, int32 [features], or 0 for float.

    The scale is that of the input times that of the kernel; the bias passes its gradient on unchanged, but
    for codes beyond the format.

    Raises:
      UserError: the sums are no sums of integers.
    """
    spec, where = quantization.spec("biases", "/".join(layer.path)), "/".join(layer.path)
    if spec is None:
        return bias, 0
    require(
        has_integer_sums(kernel, inputs),
        f"{where}: an integer bias has the scale of input times weights, and here one of them is no integer "
        "with one scale; quantize the weights, and what comes before them by a rule for its activations "
        "(before the classifier 'pool/output'), or leave this layer's bias float (biases=None)",
    )
    scale = jnp.broadcast_to(jax.lax.stop_gradient(inputs.scale * kernel.scale), bias.shape)
    return spec.format.fake_quant(bias, scale), spec.format.encode(bias, scale)


def quantize_outputs(
    layer: nn.Module, quantization: Quantization, y: jax.Array
) -> jax.Array | QuantizedArray:
    """The layer's outputs [batch, ..., features], through their quantizer or as they are."""
    spec = quantization.spec("outputs", "/".join(layer.path))
    if spec is None:
        return y
    return quantizer_of(spec, weights=False, signed=True, axis_name=quantization.axis_name, name="outputs")(y)


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


def product_cost(
    layer: nn.Module,
    quantization: Quantization,
    kernel: jax.Array | QuantizedArray,
    inputs: jax.Array | QuantizedArray,
    bias_codes: jax.Array | int,
    outputs: jax.Array | QuantizedArray,
) -> dict[str, typing.Any]:
    """What layers with a kernel report alike; outputs count as written where they are quantized."""
    bias = quantization.spec("biases", "/".join(layer.path))
    shape, quantized = value_of(outputs).shape, isinstance(outputs, QuantizedArray)
    return {
        "roles": ("weights", "outputs", *(["biases"] if layer.use_bias else [])),
        "weights": value_of(kernel).size,
        "biases": layer.features * layer.use_bias,
        "weight_bits": bits_of(kernel),
        "bias_bits": 32 if bias is None else bias.bits,
        "input_bits": bits_of(inputs),
        "activations": math.prod(shape[1:]) if quantized else 0,
        "activation_bits": bits_of(outputs),
        "accumulation": accumulation(kernel, inputs, bias_codes),
    }
