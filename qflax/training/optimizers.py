"""Optimizers of the two groups of parameters: weights, and quantizer parameters."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qflax.quantizers import PARAMETERS

WEIGHTS = "params"


@flax.struct.dataclass
class Hyperparameters:
    """Numbers of the optimizer, all run-time inputs: changing them compiles nothing.

    Attributes:
      learning_rate, quantizer_learning_rate: peaks.
      momentum: of sgd.
      weight_decay: of kernels.
      gradient_clip: largest global norm of the weights' gradient; inf is off.
      ema_decay: weight of the old average.
      label_smoothing: probability moved to the uniform distribution.
      skip_bad_steps: how many steps in a row may be skipped because they are not finite.
    """

    learning_rate: jax.Array
    quantizer_learning_rate: jax.Array
    momentum: jax.Array
    weight_decay: jax.Array
    gradient_clip: jax.Array
    ema_decay: jax.Array
    label_smoothing: jax.Array
    skip_bad_steps: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerKinds:
    """What is compiled into the step.

    Attributes:
      weights: `sgd` or `adam`.
      quantizers: `sgd` or `adam`.
      nesterov: of sgd.
    """

    weights: str = "sgd"
    quantizers: str = "sgd"
    nesterov: bool = True


def build_optimizer(
    kinds: OptimizerKinds, numbers: Hyperparameters, relative_rate: jax.Array | float
) -> optax.GradientTransformation:
    """The optimizer of one step, over a tree {`params`: ..., `quantizer_params`: ...}.

    Kernels decay (in sgd as a part of the gradient, in adam decoupled); biases, norms and quantizer
    parameters do not. The gradient norm is clipped on the weights alone, so that the scales' gradients
    do not change it.

    Args:
      kinds: what to build.
      numbers: its numbers; they may be traced.
      relative_rate: of this step, from the schedule.
    """
    rate = relative_rate * numbers.learning_rate
    decay = optax.add_decayed_weights(numbers.weight_decay, mask=_is_kernel)
    clip = optax.clip_by_global_norm(numbers.gradient_clip)
    if kinds.weights == "adam":
        weights = optax.chain(clip, optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    else:
        weights = optax.chain(clip, decay, optax.sgd(rate, numbers.momentum, kinds.nesterov))
    quantizer_rate = relative_rate * numbers.quantizer_learning_rate
    if kinds.quantizers == "adam":
        quantizers = optax.adam(quantizer_rate)
    else:
        quantizers = optax.sgd(quantizer_rate, numbers.momentum, kinds.nesterov)
    return optax.multi_transform(
        {"weights": weights, "quantizers": quantizers},
        {WEIGHTS: "weights", PARAMETERS: "quantizers"},
    )


def _is_kernel(params):
    def decays(path, x):
        # Those of attention heads and of scanned layers have several axes. Masked subtrees appear as optax's
        # placeholders, which have none.
        return path[-1].key not in ("bias", "scale") and getattr(x, "ndim", 0) > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def as_numbers(**values: float) -> Hyperparameters:
    """Hyperparameters as float32 scalars; a `gradient_clip` of 0 becomes inf."""
    values["gradient_clip"] = values["gradient_clip"] or float("inf")
    return Hyperparameters(**{name: jnp.float32(value) for name, value in values.items()})
