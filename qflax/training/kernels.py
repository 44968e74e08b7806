"""Kernels of a network on the grids of their quantizers, to look at."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.quantizers import QuantizedArray, Quantizer, bits_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKernel:
    """A kernel in steps of its grid.

    Attributes:
      path: of the layer.
      weights: before rounding, in units of the scale, float32 [elements]; None where the quantizer does more
        than rounding.
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
    look, paths = _program(model, tuple(image_shape))
    found = jax.device_get(look(variables))
    return tuple(_in_steps(path, *arrays) for path, arrays in zip(paths, found, strict=True))


@functools.lru_cache(maxsize=4)
def _program(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[Callable, list[str]]:
    """A compiled function from variables to kernels, and their layers' paths once it has been called."""
    paths = []

    def look(variables):
        found = _before_and_after(model, variables, jnp.zeros((1, *image_shape), jnp.float32))
        paths[:] = found
        return list(found.values())

    return jax.jit(look), paths


def _before_and_after(model, variables, example) -> dict[str, tuple[jax.Array, QuantizedArray]]:
    """Path of a layer -> its kernel, before and behind its quantizer."""
    found = {}

    def look(next_call, args, kwargs, context):
        result = next_call(*args, **kwargs)
        module = context.module
        of_kernel = isinstance(module, Quantizer) and module.weights and isinstance(result, QuantizedArray)
        if of_kernel and context.method_name == "__call__":
            found["/".join(module.path[:-1])] = args[0], result
        return result

    with nn.intercept_methods(look):
        model.apply(variables, example, train=False)
    return found


def _in_steps(path: str, kernel: np.ndarray, quantized: QuantizedArray) -> LayerKernel:
    weights, codes = kernel / quantized.scale, np.asarray(quantized.unscaled)
    rounded_only = np.median(np.abs(weights - codes)) <= 0.5  # Of minifloats, too: a step is finer at zero.
    return LayerKernel(
        path=path,
        weights=np.ravel(weights) if rounded_only else None,
        codes=np.ravel(codes),
        bits=float(bits_of(quantized)),
    )
