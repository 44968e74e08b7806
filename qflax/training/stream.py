"""How training images reach the devices: resident there, or streamed to them."""

import collections
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qflax.data import Dataset
from qflax.data.order import take, window
from qflax.training.parallel import AXIS, Devices

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset

_INT32_AND_SEED = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)
_AHEAD = 1  # Dispatches whose images are on their way to the devices while another one runs.


class Examples(NamedTuple):
    """One device's share of a batch, and what each example may be mixed with.

    Attributes:
      images: uint8 [share, height, width, channels].
      labels: int32 [share].
      partner_images, partner_labels: of the next example in the whole batch, wherever that is computed; or
        None.
    """

    images: jax.Array
    labels: jax.Array
    partner_images: jax.Array | None = None
    partner_labels: jax.Array | None = None


@flax.struct.dataclass
class ResidentData:
    """The training set on every device, with the order in which it is passed through.

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

    def examples(self, step: jax.Array, places: jax.Array, batch_size: int, *, partners: bool) -> Examples:
        """The examples at `places` [share] of the batch at `step`."""

        def at(places):
            chosen = take(self.window, self.first_epoch, step * batch_size + places)
            return self.images[chosen], self.labels[chosen]

        own = at(places)
        return Examples(*own, *at((places + 1) % batch_size)) if partners else Examples(*own)


@flax.struct.dataclass
class StreamedData:
    """The batches of one dispatch; each device holds its share of each.

    Attributes:
      images: uint8 [devices, steps, share, height, width, channels]; on a device without the first axis.
      labels: int32 [devices, steps, share], likewise.
      first_step: int32, the first of the steps.
      seed: uint32, of everything random in the run.
    """

    images: jax.Array
    labels: jax.Array
    first_step: jax.Array
    seed: jax.Array

    def examples(self, step: jax.Array, places: jax.Array, batch_size: int, *, partners: bool) -> Examples:
        """The device's share of the batch at `step`."""
        del places, batch_size  # They are in this order.
        images, labels = self.images[step - self.first_step], self.labels[step - self.first_step]
        if not partners:
            return Examples(images, labels)
        return Examples(images, labels, _next(images), _next(labels))


def _next(x: jax.Array) -> jax.Array:
    """What comes after each example; after a device's last one the next device's first."""
    devices = jax.lax.axis_size(AXIS)
    first = jax.lax.ppermute(x[:1], AXIS, [(i, (i - 1) % devices) for i in range(devices)])
    return jnp.concatenate([x[1:], first])


class Stream:
    """The training set, as dispatches of some steps each pass through it.

    Attributes:
      axes: of the data over the devices, for `Devices.pmap`.
      usual_steps: of a dispatch to an accelerator.
    """

    def __init__(self, dataset: "Dataset | StreamedDataset", seed: int, batch_size: int, devices: Devices):
        """Takes the training set; `batch_size` is that of all devices together."""
        self._dataset, self._devices = dataset, devices
        self._seed, self._batch_size = np.uint32(seed), batch_size

    def dispatches(
        self, start: int, end: int, steps: int, num_workers: int = 0
    ) -> Iterator[tuple[int, ResidentData | StreamedData]]:
        """Yields the end of each dispatch and its data, from step `start` to `end`.

        Dispatches end at multiples of `steps`, which is at most an epoch.

        Args:
          start, end: steps.
          steps: of a dispatch.
          num_workers: processes that read and decode images, where the set is not in memory.
        """
        raise NotImplementedError

    def abstract(self, steps: int) -> ResidentData | StreamedData:
        """Shapes and dtypes of a dispatch's data."""
        raise NotImplementedError

    def _plan(self, start: int, end: int, steps: int) -> Iterator[tuple[int, int]]:
        while start < end:
            stop = min((start // steps + 1) * steps, end)
            yield start, stop
            start = stop


class ResidentStream(Stream):
    """Of a training set that stays on the devices; the host only sends the order, once an epoch."""

    axes = None
    usual_steps = 50

    def dispatches(self, start, end, steps, num_workers=0):
        """See `Stream`."""
        del num_workers
        images, labels = self._devices.replicate((self._dataset.images, self._dataset.labels))
        shown = None
        for first, stop in self._plan(start, end, steps):
            epoch = first * self._batch_size // len(labels)
            if epoch != shown:
                order = window(self._seed, np.int32(epoch), len(labels))
                rest, shown = self._devices.replicate((order, np.int32(epoch), self._seed)), epoch
            yield stop, ResidentData(images, labels, *rest)

    def abstract(self, steps):
        """See `Stream`."""
        arrays = self._dataset.images, self._dataset.labels
        images, labels = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
        window = jax.ShapeDtypeStruct((2 * self._dataset.num_examples,), jnp.int32)
        return ResidentData(images, labels, window, *_INT32_AND_SEED)


class HostStream(Stream):
    """Of a training set that is read and decoded on the way, ahead of the devices."""

    axes = StreamedData(images=0, labels=0, first_step=None, seed=None)
    usual_steps = 1  # The images of more would take up the devices' memory.

    def dispatches(self, start, end, steps, num_workers=0):
        """See `Stream`."""
        batches = self._dataset.training_batches(
            seed=int(self._seed),
            first_step=start,
            batch_size=self._batch_size,
            shard=(jax.process_index(), jax.process_count()),
            num_workers=num_workers,
        )
        with contextlib.closing(batches):
            ahead = collections.deque()
            for first, stop in self._plan(start, end, steps):
                ahead.append((stop, self._load(batches, first, stop)))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft()
            yield from ahead

    def abstract(self, steps):
        """See `Stream`."""
        own = len(self._devices.local)
        shape = own, steps, self._batch_size // len(self._devices)
        images = jax.ShapeDtypeStruct((*shape, *self._dataset.image_shape), jnp.uint8)
        return StreamedData(images, jax.ShapeDtypeStruct(shape, jnp.int32), *_INT32_AND_SEED)

    def _load(self, batches: Iterator, first: int, stop: int) -> StreamedData:
        """Starts to move the next batches to the devices."""
        parts = [next(batches) for _ in range(first, stop)]

        def stack(arrays):
            split = [array.reshape(len(self._devices.local), -1, *array.shape[1:]) for array in arrays]
            return self._devices.split(np.stack(split, axis=1))

        images, labels = stack([part.images for part in parts]), stack([part.labels for part in parts])
        return StreamedData(images, labels, *self._devices.replicate((np.int32(first), self._seed)))


def stream_of(dataset: "Dataset | StreamedDataset", seed: int, batch_size: int, devices: Devices) -> Stream:
    """The stream of a training set; arguments as of `Stream`."""
    kind = ResidentStream if isinstance(dataset, Dataset) else HostStream
    return kind(dataset, seed, batch_size, devices)
