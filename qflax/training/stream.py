"""The training set on the devices, and the order in which steps pass through it."""

import flax.struct
import jax
import numpy as np

from qflax.data import Dataset
from qflax.data.order import window
from qflax.training.parallel import Devices


@flax.struct.dataclass
class TrainingData:
    """The training set on the device, with the order in which it is passed through.

    Attributes:
      images: uint8 [examples, height, width, channels].
      labels: int32 [examples].
      window: int32 [2 * examples], the orders of two epochs (`data.order.window`).
      first_epoch: int32, the first of them.
      seed: uint32, of everything random in the run.
    """

    images: jax.Array
    labels: jax.Array
    window: jax.Array
    first_epoch: jax.Array
    seed: jax.Array


class Stream:
    """The training set on the devices, with the part of the order that a dispatch needs."""

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, devices: Devices):
        self._devices, self._batch_size = devices, batch_size
        self._seed, self._num_examples = np.uint32(seed), dataset.num_examples
        self._images, self._labels = devices.replicate((dataset.images, dataset.labels))
        self._data = None

    def at(self, step: int) -> TrainingData:
        """Data for a dispatch that starts at `step` and is at most an epoch long."""
        epoch = step * self._batch_size // self._num_examples
        if self._data is None or epoch != int(self._epoch):
            self._epoch = np.int32(epoch)
            orders = window(self._seed, self._epoch, self._num_examples)
            self._data = TrainingData(
                images=self._images,
                labels=self._labels,
                window=self._devices.replicate(orders),
                first_epoch=self._epoch,
                seed=self._seed,
            )
        return self._data
