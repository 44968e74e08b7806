"""Kernels of a network on the grids of their quantizers, to look at."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.quantizers import QuantizedArray, Quantizer, bits_of
from qflax.quantizers.accumulator_aware import AccumulatorAwareQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKernel:
    """A kernel in steps of its grid.

    Attributes:
      path: of the layer.
      weights: before clipping and rounding, in units of the scale, float32 [elements]; None where the
        quantizer does more than these.
      codes: after it, float32 [elements].
      bits: of a code.
    """

    path: str
    weights: np.ndarray | None
    codes: np.ndarray
    bits: float


def layer_kernels(
    model: nn.Module, variables: Mapping, image_shape: tuple[int, ...]
) -> tuple[LayerKernel, ...]:
    """The quantized kernels of a model that is called with images, in the order of its layers."""
    look, layers = _program(model, tuple(image_shape))
    found = jax.device_get(look(variables))
    return tuple(_in_steps(*layer, *arrays) for layer, arrays in zip(layers, found, strict=True))


@functools.lru_cache(maxsize=4)
def _program(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[Callable, list[tuple[str, bool]]]:
    """A compiled function from variables to kernels, and what `_before_and_after` says of their layers."""
    layers = []

    def look(variables):
        found = _before_and_after(model, variables, jnp.zeros((1, *image_shape), jnp.float32))
        layers[:] = found
        return list(found.values())

    return jax.jit(look), layers


def _before_and_after(model, variables, example) -> dict[tuple[str, bool], tuple[jax.Array, QuantizedArray]]:
    """Path of a layer, and whether its weights are clipped and rounded only -> before and behind that."""
    found = {}

    def look(next_call, args, kwargs, context):
        result = next_call(*args, **kwargs)
        module = context.module
        of_kernel = isinstance(module, Quantizer) and module.weights and isinstance(result, QuantizedArray)
        if of_kernel and context.method_name == "__call__":
            rounded = not isinstance(module, AccumulatorAwareQuantizer)
            found["/".join(module.path[:-1]), rounded] = args[0], result
        return result

    with nn.intercept_methods(look):
        model.apply(variables, example, train=False)
    return found


def _in_steps(path: str, rounded: bool, kernel: np.ndarray, quantized: QuantizedArray) -> LayerKernel:
    return LayerKernel(
        path=path,
        weights=np.ravel(kernel / quantized.scale) if rounded else None,
        codes=np.ravel(quantized.unscaled),
        bits=float(bits_of(quantized)),
    )
