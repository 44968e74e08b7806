"""What a convolution or matrix product reads and writes, quantized where the policy says so."""

import math
import typing
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.layers.accumulation import accumulation, has_integer_sums
from qflax.numerics import product
from qflax.quantizers import (
    Quantization,
    QuantizedArray,
    Quantizer,
    bits_of,
    quantized_array,
    quantizer_of,
    value_of,
)


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
    freezes = quantization.freeze_oscillating
    return quantizer_of(spec, weights=True, name="weights", freezes_oscillating=freezes)(kernel, inputs)


def quantize_bias(
    layer: nn.Module,
    quantization: Quantization,
    bias: jax.Array,
    kernel: jax.Array | QuantizedArray,
    inputs: jax.Array | QuantizedArray,
) -> jax.Array | QuantizedArray:
    """The bias [features] of products of `kernel` and `inputs`, on the grid of their sums or as it is.

    The scale is that of the input times that of the kernel; the bias passes its gradient on unchanged, but
    for codes beyond the format.

    Raises:
      UserError: the sums are no sums of integers.
    """
    spec, where = quantization.spec("biases", "/".join(layer.path)), "/".join(layer.path)
    if spec is None:
        return bias
    require(
        has_integer_sums(kernel, inputs),
        f"{where}: an integer bias has the scale of input times weights, and here one of them is no integer "
        "with one scale; quantize the weights, and what comes before them by a rule for its activations "
        f"(before a ResNet's classifier 'pool/output', else '{where}/input'), or leave this layer's bias "
        "float (biases=None)",
    )
    scale = jnp.broadcast_to(jax.lax.stop_gradient(inputs.scale * kernel.scale), bias.shape)
    codes = spec.format.unscaled(jax.lax.stop_gradient(bias), scale)
    return quantized_array(spec.format.fake_quant(bias, scale), codes, scale, spec.format)


def affine(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array | QuantizedArray,
    kernel: jax.Array | QuantizedArray,
    bias: jax.Array | QuantizedArray | None,
    dtype: jnp.dtype,
    spread: Callable[[jax.Array], jax.Array] = lambda values: values,
) -> jax.Array:
    """Products of `inputs` and `kernel` with a bias: as hardware does it, scales after the sums.

    Sums of integers are exact in float32 in any order while they stay below 2^24; with scales inside of them
    they would depend on the order, which differs between devices, libraries and exports.

    Args:
      multiply: linear in both of its arguments.
      inputs, kernel: its arguments.
      bias: [features]; an integer one is added to the sums, a float one to what they stand for.
      dtype: of the result, and to multiply in; codes are multiplied in float32 where that is float16.
      spread: makes of [features] what is broadcast to the products.
    """
    (x, x_scale), (w, w_scale) = _behind_scale(inputs, per_channel=False), _behind_scale(kernel)
    scales = [scale for scale in (x_scale, w_scale) if scale is not None]
    # Sums of codes, which are large numbers behind small scales, leave the range of float16.
    wide = jnp.dtype(jnp.float32) if scales and dtype == jnp.float16 else dtype
    y = multiply(x.astype(wide), w.astype(wide))
    if isinstance(bias, QuantizedArray):
        y += spread(bias.unscaled.astype(wide))
    if scales:
        scale = math.prod(scales).astype(wide)
        y = product(y, spread(scale) if scale.ndim else scale).astype(dtype)
    return y if bias is None or isinstance(bias, QuantizedArray) else y + spread(bias.astype(dtype))


def _behind_scale(
    x: jax.Array | QuantizedArray, per_channel: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """What to multiply, and the constant scale that its products have, which may be one `per_channel`."""
    if not isinstance(x, QuantizedArray) or (x.scale.ndim and not per_channel):
        return value_of(x), None
    return x.unscaled, jax.lax.stop_gradient(x.scale)


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


def product_cost(
    layer: nn.Module,
    quantization: Quantization,
    kernel: jax.Array | QuantizedArray,
    inputs: jax.Array | QuantizedArray,
    bias: jax.Array | QuantizedArray | None,
    outputs: jax.Array | QuantizedArray,
) -> dict[str, typing.Any]:
    """What layers with a kernel report alike; outputs count as written where they are quantized."""
    integer_bias = isinstance(bias, QuantizedArray)
    shape, quantized = value_of(outputs).shape, isinstance(outputs, QuantizedArray)
    return {
        "roles": ("weights", "outputs", *(() if bias is None else ["biases"])),
        "weights": value_of(kernel).size,
        "biases": 0 if bias is None else value_of(bias).size,
        "weight_bits": bits_of(kernel),
        "bias_bits": bias.format.bits if integer_bias else 32,
        "input_bits": bits_of(inputs),
        "activations": math.prod(shape[1:]) if quantized else 0,
        "activation_bits": bits_of(outputs),
        "accumulation": accumulation(kernel, inputs, bias.unscaled.astype(jnp.int32) if integer_bias else 0),
    }
