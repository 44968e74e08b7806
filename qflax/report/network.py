"""What a trained network is made of: the cost of its layers, and its weights on their grids."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.layers import LayerCost
from qflax.quantizers import QuantizedArray, Quantizer, bits_of
from qflax.report.runs import Run
from qflax.training import build
from qflax.training.workdir import load_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What a run serves.

    Attributes:
      step: of its checkpoint.
      costs: of the layers.
      weights: of the layers whose kernels are quantized.
    """

    step: int
    costs: tuple[LayerCost, ...]
    weights: tuple[LayerWeights, ...]


def inspect(run: Run) -> Network:
    """The network of a run's last checkpoint.

    Raises:
      UserError: there is none, or a damaged one.
    """
    config, state = load_workdir(run.folder)
    model, served = build.model(config), jax.device_get(state.served)
    example = jnp.zeros((1, *build.image_format(config).image_shape), jnp.float32)
    paths = []
    found = jax.jit(lambda variables: _weights_of(model, variables, example, paths))(served)
    weights = tuple(
        _in_steps(path, *arrays) for path, arrays in zip(paths, jax.device_get(found), strict=True)
    )
    return Network(step=int(state.step), costs=build.measure_costs(config, served), weights=weights)


def _weights_of(
    model: nn.Module, variables, example, paths: list[str]
) -> list[tuple[jax.Array, QuantizedArray]]:
    """Of each layer its kernel, before and behind its quantizer; adds its path to `paths`."""
    found = []

    def look(next_call, args, kwargs, context):
        result = next_call(*args, **kwargs)
        module = context.module
        of_weights = isinstance(module, Quantizer) and module.weights and isinstance(result, QuantizedArray)
        if of_weights and context.method_name == "__call__":
            path = "/".join(module.path[:-1])
            if path not in paths:  # A layer that is called again has the same weights.
                paths.append(path)
                found.append((args[0], result))
        return result

    with nn.intercept_methods(look):
        model.apply(variables, example, train=False)
    return found


def _in_steps(path: str, kernel: np.ndarray, quantized: QuantizedArray) -> LayerWeights:
    weights, codes = kernel / quantized.scale, np.asarray(quantized.unscaled)
    rounded_only = np.median(np.abs(weights - codes)) <= 0.5  # Of minifloats, too: a step is finer at zero.
    return LayerWeights(
        path=path,
        weights=np.ravel(weights) if rounded_only else None,
        codes=np.ravel(codes),
        bits=float(bits_of(quantized)),
    )
