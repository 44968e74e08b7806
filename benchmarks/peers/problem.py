"""What every contender trains."""

import dataclasses
import functools

import numpy as np

_STAGES = {  # Blocks of each stage, and channels of the first one.
    "resnet20": ((3, 3, 3), 16),
    "resnet32": ((5, 5, 5), 16),
    "resnet56": ((9, 9, 9), 16),
    "resnet18": ((2, 2, 2, 2), 64),
}
MODELS = tuple(_STAGES)
BATCHES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A ResNet on noise of CIFAR-10's shape, as qflax builds it with shortcut A, and how it is trained.

    3x3 stem, basic blocks, batch norm, a shortcut that subsamples and pads with zero channels on both sides;
    cross entropy, SGD with momentum, weight decay on kernels, random crops and flips on the device.

    Attributes:
      model: `resnet20`, `resnet32`, `resnet56` or `resnet18`.
      batch_size: images of a step.
      dtype: `float32` or `bfloat16`, of convolutions; parameters are float32.
      threads: of a CPU.
    """

    model: str
    batch_size: int
    dtype: str
    threads: int

    num_classes = 10
    crop_padding = 4
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    learning_rate = 0.01
    momentum = 0.9
    weight_decay = 1e-4
    batch_norm_momentum = 0.9  # Weight of the old running statistics.
    batch_norm_epsilon = 1e-5

    @property
    def num_filters(self) -> int:
        """Output channels of the stem."""
        return _STAGES[self.model][1]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Output channels and strides of every block."""
        sizes, filters = _STAGES[self.model]
        return [
            (filters * 2**i, 2 if i > 0 and j == 0 else 1)
            for i, size in enumerate(sizes)
            for j in range(size)
        ]

    @functools.cached_property
    def images(self) -> np.ndarray:
        """uint8 [BATCHES * batch_size, 32, 32, 3]."""
        shape = (BATCHES * self.batch_size, 32, 32, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [BATCHES * batch_size]."""
        labels = np.random.default_rng(1).integers(0, self.num_classes, BATCHES * self.batch_size)
        return labels.astype(np.int32)

    def start(self, step: int) -> int:
        """Position of the first example of a step's batch."""
        return step % BATCHES * self.batch_size
