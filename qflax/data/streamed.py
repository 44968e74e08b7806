"""A split of an image classification dataset that is read and decoded while it is used."""

import dataclasses
from typing import NamedTuple, Protocol

import grain
import numpy as np

from qflax.data.batches import Batches
from qflax.data.crop import Crop
from qflax.data.dataset import Batch
from qflax.data.decode import decode_evaluation, decode_training
from qflax.errors import UserError

_STREAM = 2**40  # Examples of a training stream.


class Record(NamedTuple):
    """An example as it is stored.

    Attributes:
        image: compressed, as of `decode_training`.
        label: 0..num_classes - 1.
        origin: where it is stored, for errors.
    """

    image: bytes
    label: int
    origin: str


class Records(Protocol):
    """Random access to stored examples; must be picklable, and readable in several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def part(self, first: int, stop: int) -> "Records":
        """Returns the records from `first` up to and without `stop`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamedDataset:
    """Stored examples of one split, and the streams of batches made from them.

    All streams can be divided among `shard = (index, count)` programs: each gets its contiguous part
    of every batch. `Batches` tells how far ahead they are made; close it when done. An image that
    cannot be decoded is a UserError there.

    Attributes:
        name: name under which `load` found it.
        num_classes: number of classes.
        records: the examples, in stored order.
        crop: what of an image is shown.
    """

    name: str
    num_classes: int
    records: Records
    crop: Crop

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.records)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.crop.image_size, self.crop.image_size, 3

    def part(self, first: int, stop: int) -> "StreamedDataset":
        """Returns the examples from `first` up to and without `stop`."""
        return dataclasses.replace(self, records=self.records.part(first, stop))

    def training_batches(
        self,
        *,
        seed: int,
        first_step: int = 0,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        num_workers: int = 0,
    ) -> Batches:
        """Yields the training stream: every epoch in a fresh order, with random crops.

        An example's order and crop depend on the seed and on its position in the stream,
        `step * batch_size + place in the batch`, alone. Its mask is True. The stream ends only after
        2**40 examples.

        Args:
            seed: 0..2**32 - 1.
            first_step: where to start; what comes before is not read.
            batch_size: examples per step of all shards together.
            shard: index and count; the count divides `batch_size`.
            num_workers: number of processes; 0 for threads of this one.
        """
        epochs = _STREAM // self.num_examples + 1  # Grain cannot cut an endless stream into batches of 1.
        examples = self._shuffled(seed).repeat(epochs).random_map(self._training_example)
        return Batches(
            examples,
            first_step=first_step,
            batch_size=batch_size,
            shard=shard,
            num_workers=num_workers,
        )

    def evaluation_batches(
        self, *, batch_size: int, shard: tuple[int, int] = (0, 1), num_workers: int = 0
    ) -> Batches:
        """Yields every example once, in stored order, with central crops.

        All shards get as many batches, of one size: behind the last example, the mask is False.

        Arguments as of `training_batches`.
        """
        padded = -(-self.num_examples // batch_size) * batch_size
        examples = grain.MapDataset.range(padded).map(self._evaluation_example)
        return Batches(examples, first_step=0, batch_size=batch_size, shard=shard, num_workers=num_workers)

    def calibration_batches(
        self, *, seed: int, batch_size: int, num_batches: int, num_workers: int = 0
    ) -> Batches:
        """Yields the first images of the training stream, but with central crops.

        Arguments as of `training_batches`; raises ValueError for more examples than there are.
        """
        count = num_batches * batch_size
        if count > self.num_examples:
            raise ValueError(f"{self.name}: {count} calibration examples of {self.num_examples}")
        examples = self._shuffled(seed)[:count].map(self._calibration_example)
        return Batches(examples, first_step=0, batch_size=batch_size, shard=(0, 1), num_workers=num_workers)

    def _shuffled(self, seed: int) -> grain.MapDataset:
        # Grain derives the seeds of `shuffle` and `random_map` from this one and their places in the chain.
        return grain.MapDataset.source(self.records).seed(seed).shuffle()

    def _training_example(self, record: Record, rng: np.random.Generator) -> Batch:
        return self._example(record, lambda data: decode_training(data, rng, self.crop))

    def _calibration_example(self, record: Record) -> Batch:
        return self._example(record, lambda data: decode_evaluation(data, self.crop))

    def _evaluation_example(self, index: int) -> Batch:
        if index < self.num_examples:
            return self._calibration_example(self.records[index])
        side = self.crop.image_size
        return Batch(np.zeros((side, side, 3), np.uint8), np.int32(0), np.bool_(False))

    def _example(self, record: Record, decode) -> Batch:
        try:
            image = decode(record.image)
        except Exception as error:  # Pillow raises unrelated types.
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.name}: {record.origin} is no readable image ({reason}); "
                "prepare the data set again from undamaged files"
            ) from error
        return Batch(image, np.int32(record.label), np.bool_(True))
