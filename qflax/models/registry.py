"""Models by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import choose
from qflax.layers import Activation, Add, AveragePool, BatchNorm, Conv, Dense, MaxPool, Quantize
from qflax.models.resnet import (
    NORMS,
    RESIDUALS,
    SHORTCUTS,
    STEMS,
    BasicBlock,
    Block,
    Bottleneck,
    ResNet,
    conv_init,
)
from qflax.quantizers import FLOAT, Quantization


class _Architecture(NamedTuple):
    block: type[Block]
    stage_sizes: tuple[int, ...]
    num_filters: int


# Of He et al. 2016: section 4.2 with depth 6n+2 and n blocks a stage, and section 4.1.
_ARCHITECTURES = {
    **{f"resnet{6 * n + 2}": _Architecture(BasicBlock, (n,) * 3, 16) for n in (1, 3, 5, 7, 9, 18)},
    "resnet18": _Architecture(BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": _Architecture(BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": _Architecture(Bottleneck, (3, 4, 6, 3), 64),
}

MODELS = tuple(_ARCHITECTURES)


@functools.lru_cache(maxsize=16)  # The same object for the same network, so that JAX traces it once.
def build_model(
    name: str,
    *,
    num_classes: int,
    stem: str,
    shortcut: str,
    residual: str,
    norm: str,
    batch_norm_momentum: float,
    batch_norm_epsilon: float,
    dtype: jnp.dtype = jnp.float32,
    quantization: Quantization = FLOAT,
    axis_name: str | None = None,
) -> ResNet:
    """Makes a network whose layers follow a quantization policy.

    Args:
      name: one of `MODELS`.
      num_classes: number of outputs.
      stem: `3x3` for small images, `7x7` for those of ImageNet.
      shortcut: `A` (no parameters) or `B` (1x1 convolution).
      residual: what is added, `signed` (as in the paper) or `unsigned` (codes of one grid), see `Block`.
      norm: `batch`, or `folded`: convolutions have a bias instead, see `ptq.fold_norms`.
      batch_norm_momentum: weight of the old running statistics.
      batch_norm_epsilon: added to the variance.
      dtype: dtype of convolutions and norms; parameters, statistics and quantizers stay float32.
      quantization: the policy; the default one is the float network.
      axis_name: mapped axis that shares a batch: its norm statistics are those of the whole batch.

    Raises:
      UserError: unknown name or choice.
    """
    choose("model", name, (*MODELS, "MODULE:NAME of a Flax network of your own"))
    choose("stem", stem, STEMS)
    choose("shortcut", shortcut, SHORTCUTS)
    choose("residual", residual, RESIDUALS)
    choose("norm", norm, NORMS)
    policy = {"quantization": quantization}
    return ResNet(
        **_ARCHITECTURES[name]._asdict(),
        num_classes=num_classes,
        stem=stem,
        shortcut=shortcut,
        residual=residual,
        conv=functools.partial(Conv, use_bias=norm == "folded", dtype=dtype, kernel_init=conv_init, **policy),
        dense=functools.partial(Dense, dtype=dtype, kernel_init=nn.initializers.zeros, **policy),
        norm=_no_norm
        if norm == "folded"
        else functools.partial(
            BatchNorm,
            momentum=batch_norm_momentum,
            epsilon=batch_norm_epsilon,
            dtype=dtype,
            axis_name=axis_name,
        ),
        activation=functools.partial(Activation, **policy),
        quantize=functools.partial(Quantize, **policy),
        add=functools.partial(Add, **policy),
        pool=functools.partial(AveragePool, **policy),
        max_pool=MaxPool,
    )


def _no_norm(**options) -> Callable[[jax.Array], jax.Array]:
    """Stands for a norm that is folded into the convolution before it."""
    del options
    return lambda x: x
