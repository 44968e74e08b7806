"""ImageNet (ILSVRC 2012) as TensorFlow Datasets prepared it, read record by record without TensorFlow."""

import dataclasses
import pathlib
import re
import resource
from typing import Any

import tensorflow_datasets as tfds

from qflax.data import prepared
from qflax.data.streamed import Record
from qflax.errors import UserError

_NAME = "imagenet2012"
_CLASSES = 1000
# TFDS's own names; its 'test' has no public labels, so that results are those of its 'validation'.
_STORED_SPLITS = {"train": "train", "test": "validation"}
_BUILD = (
    f"prepare it with TensorFlow and `tfds build {_NAME} --file_format={prepared.FORMAT} --data_dir=DIR`, "
    "from image-net.org's ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in DIR/downloads/manual, and "
    "set TFDS_DATA_DIR or --config.data_dir to DIR"
)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRecords:
    """A run of a split's records, in TFDS's order; to be copied to other processes, it opens files late.

    Attributes:
        source: TFDS's data source of the whole split.
        where: directory and split, for errors.
        places: which of the split's records these are.
    """

    source: Any
    where: str
    places: range

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        """Reads a record; raises UserError if it is damaged."""
        place = self.places[index]
        origin = f"record {place} of {self.where}"
        try:
            stored = self.source[place]
            name, label = stored["file_name"].decode(errors="replace"), int(stored["label"])
            if not 0 <= label < _CLASSES:
                raise ValueError(f"{name} has the label {label}")
            return Record(stored["image"], label, f"{origin} ({name})")
        except Exception as error:  # array_record, protobuf and missing fields raise unrelated types.
            raise UserError(f"{_NAME}: {origin} is damaged ({prepared.reason(error)}); {_BUILD}") from error

    def part(self, first: int, stop: int) -> "StoredRecords":
        """Returns the records from `first` up to and without `stop`."""
        return dataclasses.replace(self, places=self.places[first:stop])


def read(split: str, data_dir: str | None) -> StoredRecords:
    """Opens a split; its images are read only when they are asked for.

    Args:
        split: 'train' (1,281,167 records) or 'test' (the 50,000 whose labels are public: TFDS's
            'validation').
        data_dir: directory that holds imagenet2012/5.x.y; None stands for TFDS_DATA_DIR in the
            environment, or TFDS's default ~/tensorflow_datasets.

    Raises:
        UserError: if the set is not there, or is damaged.
    """
    directory = _directory(prepared.root(data_dir))
    builder = prepared.open_builder(
        _NAME,
        directory,
        tuple(_STORED_SPLITS.values()),
        if_damaged=_BUILD,
        if_other_format=prepared.conversion(_NAME, directory),
    )
    stored = _STORED_SPLITS[split]
    prepared.check_files(builder, stored, if_damaged=_BUILD)
    _allow_open_files(len(builder.info.splits[stored].filepaths))
    source = builder.as_data_source(stored, decoders={"image": tfds.decode.SkipDecoding()})
    return StoredRecords(source, f"split {stored!r} in {directory}", range(len(source)))


def _directory(root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the newest prepared version 5.x.y."""
    versions = {}
    for folder in (root / _NAME).glob("5.*.*"):
        if match := re.fullmatch(r"5\.(\d+)\.(\d+)", folder.name):
            versions[int(match[1]), int(match[2])] = folder
    if not versions:
        raise UserError(f"{_NAME}: no {_NAME}/5.x.y found under {root}; {_BUILD}")
    return versions[max(versions)]


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files: each reader keeps all files of its split open, for training 1,024.

    Processes that are started later inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * count  # For readers of a split's parts, and whatever else the program opens.
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
