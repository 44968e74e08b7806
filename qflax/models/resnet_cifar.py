"""ResNet-(6n+2) for 32x32 images (He et al. 2016, section 4.2)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.quantizers import QuantizedArray, value_of

SHORTCUTS = ("A", "B")

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_PAD_ONE = ((1, 1), (1, 1))  # As in the paper and in PyTorch; `SAME` pads (0, 1) at stride 2.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
      features: output channels.
      strides: of the first convolution and the shortcut.
      shortcut: where the shape changes, `A` is subsampling with zero channels, `B` a 1x1 convolution.
      conv, norm, activation, add: layer constructors.
    """

    features: int
    strides: int
    shortcut: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    add: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        """Maps [batch, height, width, in] to [batch, height / strides, width / strides, features]."""
        y = self._conv3x3(self.strides, "conv1")(x)
        y = self.activation(name="act1")(self.norm(name="norm1")(y))
        y = self.norm(name="norm2")(self._conv3x3(1, "conv2")(y))
        return self.activation(name="act2")(self.add(name="add")(y, self._shortcut(x)))

    def _conv3x3(self, strides: int, name: str) -> nn.Module:
        return self.conv(self.features, (3, 3), strides=strides, padding=_PAD_ONE, name=name)

    def _shortcut(self, x: jax.Array | QuantizedArray) -> jax.Array | QuantizedArray:
        missing = self.features - value_of(x).shape[-1]
        if self.strides == 1 and missing == 0:
            return x
        if self.shortcut == "B":
            x = self.conv(self.features, (1, 1), strides=self.strides, name="conv_shortcut")(x)
            return self.norm(name="norm_shortcut")(x)
        subsampled = value_of(x)[:, :: self.strides, :: self.strides]
        return jnp.pad(subsampled, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class CifarResNet(nn.Module):
    """ResNet of three stages with 16, 32 and 64 channels; depth 6n+2 has n blocks a stage.

    Attributes:
      stage_sizes: blocks of each stage.
      num_classes: outputs.
      shortcut: `A` or `B`, see `BasicBlock`.
      num_filters: channels of the first stage; they double with each further one.
      conv, dense, norm, activation, quantize, add, pool: layer constructors; with float ones this is the
        float network.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    shortcut: str
    conv: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    activation: Callable[..., nn.Module]
    quantize: Callable[..., nn.Module]
    add: Callable[..., nn.Module]
    pool: Callable[..., nn.Module]
    num_filters: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images [batch, height, width, 3] to float32 logits [batch, num_classes]."""
        norm = lambda name: self.norm(use_running_average=not train, name=name)  # noqa: E731
        x = self.quantize(name="input")(images)
        x = self.conv(self.num_filters, (3, 3), padding=_PAD_ONE, name="conv_init")(x)
        x = self.activation(name="act_init")(norm("norm_init")(x))
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                x = BasicBlock(
                    features=self.num_filters * 2**i,
                    strides=2 if i > 0 and j == 0 else 1,
                    shortcut=self.shortcut,
                    conv=self.conv,
                    norm=norm,
                    activation=self.activation,
                    add=self.add,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        x = self.pool(name="pool")(x)
        logits = self.dense(self.num_classes, name="classifier")(x)
        return logits.astype(jnp.float32)
