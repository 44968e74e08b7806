"""ResNets for small images (He et al. 2016, section 4.2) and for ImageNet (section 4.1)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.quantizers import QuantizedArray, value_of

STEMS = ("3x3", "7x7")
SHORTCUTS = ("A", "B")
RESIDUALS = ("signed", "unsigned")
NORMS = ("batch", "folded")

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Values = jax.Array | QuantizedArray
Layer = Callable[..., nn.Module]


def _padding(size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Half of an odd kernel on every side, as in PyTorch; `SAME` pads one pixel less before, at stride 2."""
    return ((size // 2, size // 2),) * 2


class Block(nn.Module):
    """A residual branch and its shortcut; subclasses have the branch.

    Attributes:
      features: output channels of the 3x3 convolutions.
      strides: of the first 3x3 convolution and the shortcut.
      shortcut: where the shape changes, `A` is subsampling with zero channels, `B` a 1x1 convolution.
      residual: `signed` adds the branch as it comes out of its last norm, as in the paper; `unsigned` passes
        both operands through an activation layer that they share, so that they are codes of one unsigned
        grid. That layer is the one that the shortcut came out of; a 1x1 convolution gets its own.
      conv, norm, activation, add: layer constructors.
    """

    features: int
    strides: int
    shortcut: str
    residual: str
    conv: Layer
    norm: Layer
    activation: Layer
    add: Layer

    expansion = 1  # Output channels over `features`.

    @nn.compact
    def __call__(self, x: Values, source: nn.Module) -> tuple[Values, nn.Module]:
        """Applies the block.

        Args:
          x: [batch, height, width, in].
          source: the activation layer that `x` came out of.

        Returns:
          [batch, height / strides, width / strides, expansion * features], and the layer that it came out of.
        """
        branch, shortcut = self._branch(x), self._shortcut(x)
        if self.residual == "unsigned":
            if self._projects(x):
                source = self.activation(name="act_shortcut")
                shortcut = source(shortcut)
            branch = source(branch)
        out = self.activation(name=self._out)
        return out(self.add(name="add")(branch, shortcut)), out

    def _branch(self, x: Values) -> jax.Array:
        raise NotImplementedError

    def _convolve(self, x: Values, i: int, size: int, features: int, strides: int = 1) -> jax.Array:
        """The i-th convolution and its norm."""
        conv = self.conv(features, (size, size), strides=strides, padding=_padding(size), name=f"conv{i}")
        return self.norm(name=f"norm{i}")(value_of(conv(x)))

    def _projects(self, x: Values) -> bool:
        same = self.strides == 1 and value_of(x).shape[-1] == self.expansion * self.features
        return self.shortcut == "B" and not same

    def _shortcut(self, x: Values) -> Values:
        features = self.expansion * self.features
        if self._projects(x):
            x = self.conv(features, (1, 1), strides=self.strides, name="conv_shortcut")(x)
            return self.norm(name="norm_shortcut")(value_of(x))
        missing = features - value_of(x).shape[-1]
        if self.strides == 1 and missing == 0:
            return x
        subsampled = value_of(x)[:, :: self.strides, :: self.strides]
        return jnp.pad(subsampled, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class BasicBlock(Block):
    """Two 3x3 convolutions; attributes as of `Block`."""

    _out = "act2"

    def _branch(self, x: Values) -> jax.Array:
        y = self._convolve(x, 1, 3, self.features, self.strides)
        return self._convolve(self.activation(name="act1")(y), 2, 3, self.features)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels; attributes as of `Block`.

    The 3x3 convolution has the stride, not the first 1x1 as in the paper: so do torchvision's weights.
    """

    expansion = 4
    _out = "act3"

    def _branch(self, x: Values) -> jax.Array:
        y = self._convolve(x, 1, 1, self.features)
        y = self._convolve(self.activation(name="act1")(y), 2, 3, self.features, self.strides)
        return self._convolve(self.activation(name="act2")(y), 3, 1, self.expansion * self.features)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling and a classifier.

    Attributes:
      block: `BasicBlock` or `Bottleneck`.
      stage_sizes: blocks of each stage; each stage but the first halves height and width.
      num_filters: `features` of the first stage; they double with each further one.
      num_classes: outputs.
      stem: `3x3` keeps the size; `7x7` has stride 2 and a max pool of stride 2.
      shortcut, residual: see `Block`.
      conv, dense, norm, activation, quantize, add, pool, max_pool: layer constructors; with float ones this
        is the float network.
    """

    block: type[Block]
    stage_sizes: Sequence[int]
    num_filters: int
    num_classes: int
    stem: str
    shortcut: str
    residual: str
    conv: Layer
    dense: Layer
    norm: Layer
    activation: Layer
    quantize: Layer
    add: Layer
    pool: Layer
    max_pool: Layer

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images [batch, height, width, 3] to float32 logits [batch, num_classes]."""
        norm = lambda name: self.norm(use_running_average=not train, name=name)  # noqa: E731
        size, strides = (3, 1) if self.stem == "3x3" else (7, 2)
        x = self.quantize(name="input")(images)
        x = self.conv(
            self.num_filters, (size, size), strides=strides, padding=_padding(size), name="conv_init"
        )(x)
        source = self.activation(name="act_init")
        x = source(norm("norm_init")(value_of(x)))
        if self.stem == "7x7":
            x = self.max_pool((3, 3), strides=2, padding=_padding(3), name="max_pool")(x)
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                x, source = self.block(
                    features=self.num_filters * 2**i,
                    strides=2 if i > 0 and j == 0 else 1,
                    shortcut=self.shortcut,
                    residual=self.residual,
                    conv=self.conv,
                    norm=norm,
                    activation=self.activation,
                    add=self.add,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, source)
        x = self.pool(name="pool")(x)
        logits = self.dense(self.num_classes, name="classifier")(x)
        return value_of(logits).astype(jnp.float32)
