"""Models by name."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from qflax.errors import choose
from qflax.layers import Activation, Add, AveragePool, Conv, Dense, Quantize
from qflax.models.resnet_cifar import SHORTCUTS, CifarResNet, conv_init
from qflax.quantizers import FLOAT, Quantization

# Depth 6n+2 has n blocks in each of three stages.
_CIFAR_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}

MODELS = tuple(_CIFAR_BLOCKS)


def build_model(
    name: str,
    *,
    num_classes: int,
    shortcut: str,
    batch_norm_momentum: float,
    batch_norm_epsilon: float,
    dtype: jnp.dtype = jnp.float32,
    quantization: Quantization = FLOAT,
    axis_name: str | None = None,
) -> nn.Module:
    """Makes a network whose layers follow a quantization policy.

    Args:
      name: one of `MODELS`.
      num_classes: number of outputs.
      shortcut: `A` (no parameters) or `B` (1x1 convolution).
      batch_norm_momentum: weight of the old running statistics.
      batch_norm_epsilon: added to the variance.
      dtype: dtype of convolutions and norms; parameters, statistics and quantizers stay float32.
      quantization: the policy; the default one is the float network.
      axis_name: mapped axis that shares a batch: its norm statistics are those of the whole batch.

    Raises:
      UserError: unknown name or shortcut.
    """
    choose("model", name, MODELS)
    choose("shortcut", shortcut, SHORTCUTS)
    policy = {"quantization": quantization}
    return CifarResNet(
        stage_sizes=(_CIFAR_BLOCKS[name],) * 3,
        num_classes=num_classes,
        shortcut=shortcut,
        conv=functools.partial(Conv, use_bias=False, dtype=dtype, kernel_init=conv_init, **policy),
        dense=functools.partial(Dense, dtype=dtype, kernel_init=nn.initializers.zeros, **policy),
        norm=functools.partial(
            nn.BatchNorm,
            momentum=batch_norm_momentum,
            epsilon=batch_norm_epsilon,
            dtype=dtype,
            axis_name=axis_name,
        ),
        activation=functools.partial(Activation, **policy),
        quantize=functools.partial(Quantize, **policy),
        add=functools.partial(Add, **policy),
        pool=functools.partial(AveragePool, **policy),
    )
