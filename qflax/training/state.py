"""Everything that a training step changes."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from qflax.quantizers import PARAMETERS, STATISTICS
from qflax.training.optimizers import WEIGHTS

BATCH_STATS = "batch_stats"
TRAINED = (WEIGHTS, PARAMETERS)
OBSERVED = (BATCH_STATS, STATISTICS)


@flax.struct.dataclass
class TrainState:
    """State of a run; replicated over the devices.

    Attributes:
      step: number of updates made, int32.
      trained: `params` and `quantizer_params`.
      observed: `batch_stats` and `quantizer_stats`.
      opt_state: of the optimizer.
      average: exponential averages of `trained` and `batch_stats`, or an empty dict.
      bad_steps: number of steps in a row, up to this one, that were not finite, int32.
    """

    step: jax.Array
    trained: dict
    observed: dict
    opt_state: optax.OptState
    average: dict
    bad_steps: jax.Array

    @property
    def variables(self) -> dict:
        """The variables that the optimizer sees."""
        return {**self.trained, **self.observed}

    @property
    def served(self) -> dict:
        """The variables to evaluate and export: the averages where there are any."""
        return {**self.variables, **self.average}


def create_state(
    variables: Mapping, optimizer: optax.GradientTransformation, *, averaged: bool
) -> TrainState:
    """The state at step 0.

    Args:
      variables: of the model.
      optimizer: made by `optimizers.build_optimizer`, with any numbers.
      averaged: whether an exponential average of the weights is kept.
    """
    trained = {name: variables.get(name, {}) for name in TRAINED}
    observed = {name: variables.get(name, {}) for name in OBSERVED}
    averages = {**trained, BATCH_STATS: observed[BATCH_STATS]} if averaged else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        observed=observed,
        opt_state=optimizer.init(trained),
        average=jax.tree.map(jnp.copy, averages),
        bad_steps=jnp.zeros((), jnp.int32),
    )


def initial_variables(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> dict:
    """Random initial variables, a function of the seed alone."""
    return _initialize(model, tuple(image_shape), jax.random.key(seed))


def weights_of(variables: Mapping) -> dict:
    """The variables of the float network among those of a quantized one."""
    return {name: variables[name] for name in (WEIGHTS, BATCH_STATS) if variables.get(name)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initialize(model: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> dict:
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32), train=False)
