"""A split of an image classification dataset held in memory, and the loading of datasets by name."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qflax.data.crop import Crop
from qflax.errors import UserError, closest

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset

SPLITS = ("train", "validation", "test")
_CROP = Crop()


class Batch(NamedTuple):
    """Examples as they go to a network, or a single one without the leading axis.

    Attributes:
        images: uint8 [batch, height, width, channels], values 0..255.
        labels: int32 [batch].
        mask: bool [batch], False for what only fills the batch.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images and labels of one split, in stored order.

    Attributes:
        images: uint8 [examples, height, width, channels], values 0..255.
        labels: int32 [examples], values 0..num_classes - 1.
        num_classes: number of classes.
        name: name under which `load` found it.

    Raises:
        ValueError: if shapes, dtypes or label values contradict the above.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    name: str

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 [examples, height, width, channels], "
                f"got {images.dtype} {images.shape}"
            )
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name}: labels must be int32 [{images.shape[0]}], got {labels.dtype} {labels.shape}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"{self.name}: labels must lie in 0..{self.num_classes - 1}, "
                f"got {labels.min()}..{labels.max()}"
            )

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return self.images.shape[0]

    def part(self, first: int, stop: int) -> "Dataset":
        """Returns the examples from `first` up to and without `stop`."""
        return dataclasses.replace(self, images=self.images[first:stop], labels=self.labels[first:stop])

    def calibration_batches(self, *, seed: int, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """Yields the first images of the training stream, as they are stored; the mask is True."""
        from qflax.data.order import epoch_order  # Needs JAX, which decoding workers do without.

        order = np.asarray(epoch_order(np.uint32(seed), 0, self.num_examples))
        for first in range(0, num_batches * batch_size, batch_size):
            chosen = order[first : first + batch_size]
            yield Batch(self.images[chosen], self.labels[chosen], np.ones(batch_size, bool))


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    validation_examples: int = 0,
    crop: Crop = _CROP,
) -> "Dataset | StreamedDataset":
    """Loads one split of a registered dataset into memory, or opens it where it is large.

    Args:
        name: one of `DATASETS`.
        split: 'train' (the stored training set without its last `validation_examples`),
            'validation' (those last `validation_examples`, in stored order) or 'test'.
        data_dir: directory that holds prepared datasets; None stands for the environment
            variable TFDS_DATA_DIR, or ~/tensorflow_datasets where that is not set. Not used by
            'digits', which scikit-learn carries.
        validation_examples: how many training examples are held out for validation.
        crop: what of an image is shown; for 'imagenet2012' alone, as the others have images of one
            size.

    Returns:
        The split; a `StreamedDataset` for 'imagenet2012'.

    Raises:
        UserError: if an argument is not valid, or the data is missing or damaged.
    """
    data_format(name)  # Checks the name.
    if split not in SPLITS:
        raise UserError(
            f"unknown split {split!r}{closest(split, SPLITS)} of {name}; choose one of {_listed(SPLITS)}"
        )
    if split == "validation" and validation_examples == 0:
        raise UserError(
            f"split 'validation' of {name} is empty: validation_examples is 0; "
            "set it to 1 or more, or choose the split 'test'"
        )
    if split == "test":
        return _READERS[name]("test", data_dir, crop)
    train, validation = load_training(
        name, data_dir=data_dir, validation_examples=validation_examples, crop=crop
    )
    return train if split == "train" else validation


def load_training(
    name: str,
    *,
    data_dir: str | None = None,
    validation_examples: int = 0,
    crop: Crop = _CROP,
) -> "tuple[Dataset, Dataset] | tuple[StreamedDataset, StreamedDataset]":
    """Loads the splits 'train' and 'validation' (which may be empty) in one reading.

    Arguments and errors as of `load`.
    """
    data_format(name)  # Checks the name.
    stored = _READERS[name]("train", data_dir, crop)
    first = _first_validation_example(name, stored.num_examples, validation_examples)
    return stored.part(0, first), stored.part(first, stored.num_examples)


def _first_validation_example(name: str, stored: int, validation_examples: int) -> int:
    if not 0 <= validation_examples < stored:
        raise UserError(
            f"validation_examples is {validation_examples}, but {name} stores {stored} training "
            f"examples; choose 0..{stored - 1}"
        )
    return stored - validation_examples


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


@dataclasses.dataclass(frozen=True)
class DataFormat:
    """What a network must know of a dataset before any of it is read.

    Attributes:
        image_shape: (height, width, channels).
        num_classes: number of classes.
    """

    image_shape: tuple[int, int, int]
    num_classes: int


def data_format(name: str, crop: Crop = _CROP) -> DataFormat:
    """Returns the format of a registered dataset, without reading it; `crop` as of `load`."""
    if name not in _READERS:
        raise UserError(
            f"unknown dataset {name!r}{closest(name, DATASETS)}; choose one of {_listed(DATASETS)}"
        )
    if name == "imagenet2012":
        return DataFormat((crop.image_size, crop.image_size, 3), 1000)
    return DataFormat((32, 32, 3), 10)


# The readers' modules need libraries that are slow to import, so that each is imported when used.
def _read_cifar10(split: str, data_dir: str | None, crop: Crop) -> Dataset:
    del crop
    from qflax.data import cifar10

    images, labels = cifar10.read(split, data_dir)
    return Dataset(images=images, labels=labels, num_classes=10, name="cifar10")


def _read_digits(split: str, data_dir: str | None, crop: Crop) -> Dataset:
    del data_dir, crop  # scikit-learn carries the images.
    from qflax.data import digits

    images, labels = digits.read(split)
    return Dataset(images=images, labels=labels, num_classes=10, name="digits")


def _read_imagenet(split: str, data_dir: str | None, crop: Crop) -> "StreamedDataset":
    from qflax.data import imagenet
    from qflax.data.streamed import StreamedDataset

    records = imagenet.read(split, data_dir)
    return StreamedDataset(name="imagenet2012", num_classes=1000, records=records, crop=crop)


_READERS: dict[str, Callable[[str, str | None, Crop], "Dataset | StreamedDataset"]] = {
    "cifar10": _read_cifar10,
    "digits": _read_digits,
    "imagenet2012": _read_imagenet,
}

DATASETS = tuple(_READERS)
