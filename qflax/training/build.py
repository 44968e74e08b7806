"""From a configuration to the parts of a run."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.errors import FlaxError

from qflax.config import MOST_STEPS
from qflax.cpu import available_cores
from qflax.data import Crop, DataFormat, data_format
from qflax.data.augment import Augmentation
from qflax.errors import UserError, one_line, require
from qflax.layers import LayerCost, cost_function
from qflax.models import build_model, build_own_model, is_own
from qflax.quantizers import (
    DEVIATIONS,
    FLOAT,
    STATISTICS,
    Quantization,
    frozen_share,
    quantization_from_config,
)
from qflax.training.optimizers import Hyperparameters, OptimizerKinds, as_numbers, build_optimizer
from qflax.training.parallel import AXIS, Devices
from qflax.training.penalties import Penalties
from qflax.training.schedules import relative_learning_rate
from qflax.training.state import OBSERVED, TRAINED, TrainState, create_state, initial_variables
from qflax.training.step import RNGS, TrainStep

MOST_EXAMPLES = 2**31 - 1  # Positions in the training stream are int32.
_MOST_WORKERS = 16  # Unless more are asked for: each holds several batches in shared memory.


def crop(config: ml_collections.ConfigDict) -> Crop:
    """What of a photograph the network sees."""
    return Crop(**config.crop.to_dict())


def image_format(config: ml_collections.ConfigDict) -> DataFormat:
    """Shape of the network's images, and number of classes."""
    return data_format(config.dataset, crop=crop(config))


def workers(config: ml_collections.ConfigDict) -> int:
    """Number of processes that read and decode photographs."""
    return min(available_cores(), _MOST_WORKERS) if config.num_workers == -1 else config.num_workers


def quantization(config: ml_collections.ConfigDict, axis_name: str | None = None) -> Quantization:
    """The quantization policy."""
    return quantization_from_config(config.to_dict(), axis_name)


def model(
    config: ml_collections.ConfigDict,
    policy: Quantization | None = None,
    *,
    dtype: str = "float32",
    axis_name: str | None = None,
    immediate: bool = False,
) -> nn.Module:
    """The network; by default the one to evaluate: in float32, on one device, quantized as the config says.

    Args:
      config: of the run.
      policy: its quantizers; None takes those of the config.
      dtype: dtype to compute in.
      axis_name: mapped axis that shares a batch.
      immediate: whether its batch norms have no memory of earlier batches.

    Raises:
      UserError: an impossible spec, or no such network.
    """
    same = {
        "num_classes": image_format(config).num_classes,
        "dtype": jnp.dtype(dtype),
        "quantization": quantization(config, axis_name) if policy is None else policy,
        "axis_name": axis_name,
    }
    if is_own(config.model):
        return build_own_model(config.model, batch_norm_momentum=0.0 if immediate else None, **same)
    return build_model(
        config.model,
        stem=config.stem,
        shortcut=config.shortcut,
        residual=config.residual,
        norm=config.norm,
        batch_norm_momentum=0.0 if immediate else config.batch_norm_momentum,
        batch_norm_epsilon=config.batch_norm_epsilon,
        **same,
    )


def float_model(config: ml_collections.ConfigDict, *, immediate: bool = False) -> nn.Module:
    """The same network without quantizers."""
    return model(config, FLOAT, immediate=immediate)


def measure_costs(config: ml_collections.ConfigDict, variables: Mapping) -> tuple[LayerCost, ...]:
    """Costs of all layers; `variables` may be abstract."""
    return _cost_function(model(config), image_format(config).image_shape)(variables)


@functools.lru_cache(maxsize=4)  # It is called at every evaluation.
def _cost_function(network: nn.Module, image_shape: tuple[int, ...]) -> Callable:
    return cost_function(network, np.zeros((1, *image_shape), np.float32), train=False)


def check_network(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for a network of the user's own that cannot be trained on the data set."""
    if not is_own(config.model):
        return
    field, form = f"config.model={config.model!r}", image_format(config)
    require(
        config.norm == "batch",
        f"config.norm={config.norm!r}: is for the ResNets of qflax; a network of your own has its own norms: "
        "set it to 'batch'",
    )
    network, images = model(config), jax.ShapeDtypeStruct((2, *form.image_shape), jnp.float32)
    variables = jax.eval_shape(lambda: initial_variables(network, form.image_shape, 0))
    unknown = sorted(set(variables) - {*TRAINED, *OBSERVED})
    require(
        not unknown,
        f"{field}: has variables in {', '.join(unknown)}, which training does not keep; it keeps "
        f"{', '.join((*TRAINED, *OBSERVED))}",
    )
    for train in (False, True):
        rngs = {name: jax.random.key(0) for name in RNGS} if train else None
        apply = functools.partial(network.apply, train=train, rngs=rngs, mutable=OBSERVED if train else False)
        try:
            logits = jax.eval_shape(apply, variables, images)
        except FlaxError as error:
            raise UserError(
                f"{field}: cannot be called with train={train}: {one_line(error)} (random numbers are drawn "
                f"from {', '.join(RNGS)}, and variables are made with train=False)"
            ) from None
        logits = logits[0] if train else logits
        require(
            isinstance(logits, jax.ShapeDtypeStruct) and logits.shape == (2, form.num_classes),
            f"{field}: makes {_shapes_of(logits)} of images {list(images.shape)} with train={train}; must "
            f"make logits {[2, form.num_classes]}, one of each class",
        )


def _shapes_of(tree) -> str:
    return " and ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(tree)) or "nothing"


def check_rules(config: ml_collections.ConfigDict) -> dict:
    """Raises `UserError` for a network or a rule that does not fit; returns abstract variables."""
    check_network(config)
    variables = abstract_state(config).variables
    if is_own(config.model):
        return variables  # It has checked the rules when its variables were made.
    costs = measure_costs(config, variables)
    quantization(config).check((role, cost.path) for cost in costs for role in cost.roles)
    return variables


def check_quantization(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for a rule that matches no layer, for size targets without learned widths, or for
    damping or freezing without weights that are rounded.
    """
    variables = check_rules(config)
    images = jax.ShapeDtypeStruct((1, *image_format(config).image_shape), jnp.float32)
    apply = functools.partial(model(config).apply, train=False, mutable=[DEVIATIONS])
    require(
        not config.oscillation_damping or jax.eval_shape(apply, variables, images)[1].get(DEVIATIONS),
        f"config.oscillation_damping={config.oscillation_damping!r}: no weights are rounded to a grid; "
        "quantize some by kind 'uniform', 'minifloat' or 'mixed_precision', or set it to 0",
    )
    require(
        not any(config.oscillation_freezing)
        or jax.eval_shape(frozen_share, variables[STATISTICS]) is not None,
        f"config.oscillation_freezing={tuple(config.oscillation_freezing)!r}: no weights are rounded to a "
        "grid of at most four bits; quantize some by kind 'uniform', 'minifloat' or 'mixed_precision', or "
        "set it to (0.0, 0.0)",
    )
    leaves = jax.tree_util.tree_leaves_with_path(variables[STATISTICS])
    # Quantizers are named after their roles; outputs are activations, too.
    learned = {path[-2].key for path, _ in leaves if path[-1].key == "frozen"}
    for name, size in config.size_targets.items():
        role = "weights" if name.startswith("weight") else "activations"
        require(
            not size or role in learned or (role == "activations" and "outputs" in learned),
            f"config.size_targets.{name}={size!r}: no width of {role} is learned; give them "
            "kind='mixed_precision', or set the target to 0",
        )


def hyperparameters(config: ml_collections.ConfigDict) -> Hyperparameters:
    """The optimizer's numbers."""
    names = (
        "learning_rate",
        "quantizer_learning_rate",
        "momentum",
        "weight_decay",
        "gradient_clip",
        "ema_decay",
        "label_smoothing",
        "skip_bad_steps",
    )
    return as_numbers(**{name: config[name] for name in names})


def penalties(config: ml_collections.ConfigDict, num_steps: int) -> Penalties:
    """The penalties of a configuration, for a run of `num_steps`."""
    return Penalties(
        targets={name: jnp.float32(size or float("inf")) for name, size in config.size_targets.items()},
        strengths={name: jnp.float32(strength) for name, strength in config.size_strengths.items()},
        ramp_start=jnp.float32(config.size_ramp[0] * num_steps),
        ramp_end=jnp.float32(config.size_ramp[1] * num_steps),
        freeze_step=jnp.float32(config.freeze_widths_after * num_steps),
        last_step=jnp.float32(num_steps),
        accumulator_strength=jnp.float32(config.accumulator_strength),
        oscillation_damping=jnp.float32(config.oscillation_damping),
        oscillation_thresholds=jnp.float32(config.oscillation_freezing),
    )


def optimizer_kinds(config: ml_collections.ConfigDict) -> OptimizerKinds:
    """The optimizers."""
    return OptimizerKinds(
        weights=config.optimizer, quantizers=config.quantizer_optimizer, nesterov=config.nesterov
    )


def state(config: ml_collections.ConfigDict, variables: dict) -> TrainState:
    """The state at step 0."""
    optimizer = build_optimizer(optimizer_kinds(config), hyperparameters(config), 1.0)
    create = functools.partial(create_state, optimizer=optimizer, averaged=config.ema_decay > 0)
    return jax.jit(create)(variables)  # Leaf by leaf it would take ten times as long.


def abstract_state(config: ml_collections.ConfigDict) -> TrainState:
    """Shapes and dtypes of the state."""
    network, shape = model(config), image_format(config).image_shape
    return jax.eval_shape(lambda: state(config, initial_variables(network, shape, 0)))


def num_steps(config: ml_collections.ConfigDict, num_examples: int) -> int:
    """Length of the run in steps.

    Raises:
      UserError: it is longer than its steps and examples can be counted.
    """
    by_epochs = max(round(config.num_epochs * num_examples / config.batch_size), 1)
    field = "num_train_steps" if config.num_train_steps > 0 else "num_epochs"
    steps = config.num_train_steps if config.num_train_steps > 0 else by_epochs
    most = min(MOST_STEPS, MOST_EXAMPLES // config.batch_size)
    require(
        steps <= most,
        f"config.{field}={config[field]!r}: {steps:,} steps with config.batch_size={config.batch_size} and "
        f"{num_examples:,} training images; at most {most:,} are possible: lower it",
    )
    return steps


def learning_rates(config: ml_collections.ConfigDict, num_examples: int):
    """float32 [steps], relative to the peak."""
    per_epoch = num_examples / config.batch_size
    return relative_learning_rate(
        config.schedule,
        num_steps(config, num_examples),
        round(config.warmup_epochs * per_epoch),
        tuple(round(epoch * per_epoch) for epoch in config.milestone_epochs),
        config.milestone_factor,
    )


def augmentation(config: ml_collections.ConfigDict) -> Augmentation:
    """What is done to the training images.

    Raises:
      UserError: it leaves nothing of an image.
    """
    side = min(image_format(config).image_shape[:2])
    for name in ("crop_padding", "cutout"):
        value = config.augmentation[name]
        require(
            value < side,
            f"config.augmentation.{name}={value}: images are {side} x {side}; choose less than {side}",
        )
    return Augmentation(**config.augmentation)


def train_step(config: ml_collections.ConfigDict, devices: Devices) -> TrainStep:
    """The step that every device makes."""
    return TrainStep(
        model=model(config, dtype=config.dtype, axis_name=AXIS),
        optimizer=optimizer_kinds(config),
        loss=config.loss,
        batch_size=config.batch_size,
        num_devices=len(devices),
        num_classes=image_format(config).num_classes,
        augmentation=augmentation(config),
        mean=tuple(config.mean),
        std=tuple(config.std),
        damped=config.oscillation_damping > 0,
    )
