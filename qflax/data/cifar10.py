"""CIFAR-10 in the on-disk format of TensorFlow Datasets, read and prepared without TensorFlow."""

import contextlib
import os
import pathlib
import struct
import tarfile
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import cv2
import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.image_classification import cifar
from tensorflow_datasets.proto import tf_example_pb2

from qflax.data import prepared
from qflax.errors import UserError

_VERSION = "3.0.2"
_SHAPE = (32, 32, 3)
_CLASSES = 10
_CHUNK = 2500  # Examples that a decoding thread takes at a time.
# How a PNG image of that size begins: signature; header chunk with size, 8 bits, RGB.
_PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", *_SHAPE[:2], 8, 2)
_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = (10, 30)  # To connect; between two parts of the download.
_REMEDY = f"set TFDS_DATA_DIR or --config.data_dir to a directory that holds cifar10/{_VERSION}"


def read(split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a split, in TFDS's order.

    A set that is not prepared yet is downloaded and prepared in `data_dir` first; an archive at
    `<data_dir>/downloads/manual/cifar-10-binary.tar.gz` (TFDS's place for files fetched by hand)
    is used instead of the download.

    Args:
        split: 'train' (50,000 examples) or 'test' (10,000).
        data_dir: directory that holds, or shall hold, cifar10/3.0.2; None stands for TFDS_DATA_DIR
            in the environment, or TFDS's default ~/tensorflow_datasets.

    Returns:
        images uint8 [examples, 32, 32, 3] and labels int32 [examples].

    Raises:
        UserError: if the set is neither there nor to be had, or is damaged.
    """
    root = prepared.root(data_dir)
    directory = root / "cifar10" / _VERSION
    if not directory.exists():
        _prepare(root)
    builder = prepared.open_builder(
        "cifar10",
        directory,
        ("train", "test"),
        if_damaged=_if_damaged(directory),
        if_other_format=prepared.conversion("cifar10", directory)
        + "; in another directory it is downloaded and prepared",
    )
    prepared.check_files(builder, split, if_damaged=_if_damaged(directory))
    try:
        return _decode(builder.info.splits[split].filepaths, split)
    except Exception as error:  # array_record and protobuf raise unrelated types.
        names = ", ".join(map(str, builder.info.splits[split].filepaths))
        reason = prepared.reason(error)
        raise UserError(f"cifar10: {names} is damaged ({reason}); {_if_damaged(directory)}") from error


def _decode(files: Sequence[os.PathLike], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all PNG images of a split; OpenCV releases the interpreter lock, so in threads."""
    # Not TFDS's data source: it takes ten times as long to parse an example.
    readers = [array_record_module.ArrayRecordReader(str(file)) for file in files]
    size = sum(reader.num_records() for reader in readers)
    images, labels = np.empty((size, *_SHAPE), np.uint8), np.empty(size, np.int32)
    with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        parts, start = [], 0
        for reader in readers:
            for first in range(0, reader.num_records(), _CHUNK):
                stop = min(first + _CHUNK, reader.num_records())
                place = slice(start, start := start + stop - first)
                parts.append(
                    pool.submit(_decode_part, reader, first, stop, split, images[place], labels[place])
                )
        for part in parts:
            part.result()
    return images, labels


def _decode_part(
    reader: array_record_module.ArrayRecordReader,
    first: int,
    stop: int,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Decodes the records from `first` to `stop` into `images` and `labels`."""
    for i, record in enumerate(reader.read(first, stop)):
        example = tf_example_pb2.Example.FromString(record).features.feature
        name, image = (example[field].bytes_list.value[0] for field in ("id", "image"))
        label = example["label"].int64_list.value[0]
        if not name.startswith(f"{split}_".encode()):
            raise ValueError(f"{name!r} is no example of the split {split!r}")
        if not 0 <= label < _CLASSES:
            raise ValueError(f"{name!r} has the label {label}")
        known = image.startswith(_PNG)
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB) if known else None
        if pixels is None:
            raise ValueError(f"{name!r} is no sound PNG image of 32 x 32 RGB pixels")
        images[i], labels[i] = pixels, label


class _Builder(cifar.Cifar10, skip_registration=True):
    """TFDS's CIFAR-10 builder with the steps replaced for which it needs TensorFlow.

    Those are the extraction of the archive, the reading of the binary batches and the encoding of
    the images; the archive's address and checksum, the order and the files stay TFDS's.
    """

    name = "cifar10"
    VERSION = tfds.core.Version(_VERSION)

    @property
    def source(self) -> cifar.CifarInfo:
        """Address and file names of the published archive."""
        return self._cifar_info

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        names = self.source
        archive = dl_manager.download(names.url)  # Checks the checksum, too.
        with tarfile.open(archive) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        labels = members[names.prefix + names.label_files[0]].decode().split()
        self.info.features["label"].names = labels
        batches = {
            split: [members[names.prefix + file] for file in files]
            for split, files in (("train", names.train_files), ("test", names.test_files))
        }
        return {split: self._generate_examples(f"{split}_", parts) for split, parts in batches.items()}

    def _generate_examples(
        self, split_prefix: str, filepaths: list[bytes]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the examples of binary batches: records of 1 label and 3x32x32 image bytes."""
        height, width, channels = _SHAPE
        for index, record in enumerate(
            np.frombuffer(b"".join(filepaths), np.uint8).reshape(-1, 1 + height * width * channels)
        ):
            pixels = record[1:].reshape(channels, height, width).transpose(1, 2, 0)
            yield (
                index,
                {
                    "id": f"{split_prefix}{index:05d}",
                    "image": Image.fromarray(np.ascontiguousarray(pixels)),
                    "label": int(record[0]),
                },
            )


def _prepare(root: pathlib.Path) -> None:
    """Writes `<root>/cifar10/3.0.2`, and nothing if that fails."""
    builder = _Builder(data_dir=root)
    url = builder.source.url
    by_hand = root / "downloads" / "manual" / os.path.basename(url)
    try:
        if by_hand.is_file():
            _write(builder, root, by_hand)
            return
        # Not TFDS's downloader: it sets no timeout, and its ten retries go on for minutes.
        with requests.get(url, stream=True, timeout=_TIMEOUT_S) as response:
            response.raise_for_status()
            with _scratch(root) as scratch:
                logging.info("Downloading %s for %s", url, root)
                archive = scratch / by_hand.name
                with archive.open("wb") as file:
                    for block in response.iter_content(_BLOCK_BYTES):
                        file.write(block)
                _write(builder, root, archive)
    except requests.RequestException as error:
        raise UserError(
            f"cifar10: not found under {root}, and it could not be downloaded "
            f"({type(error).__name__}: {urllib.parse.urlsplit(url).hostname}); {_REMEDY}, "
            "or run on a machine with network"
        ) from error
    except OSError as error:
        raise UserError(
            f"cifar10: not found under {root}, where nothing can be written either "
            f"({prepared.reason(error)}); {_REMEDY}"
        ) from error


def _write(builder: _Builder, root: pathlib.Path, archive: pathlib.Path) -> None:
    """Writes the prepared dataset from an archive whose checksum TFDS knows."""
    config = tfds.download.DownloadConfig(manual_dir=archive.parent, try_download_gcs=False)
    with _scratch(root) as scratch:
        try:
            builder.download_and_prepare(
                file_format=prepared.FORMAT, download_dir=scratch, download_config=config
            )
        except Exception as error:  # TFDS, tarfile and PIL raise unrelated types.
            if (root / "cifar10" / _VERSION).exists():
                return  # Another process was faster.
            raise UserError(
                f"cifar10: {archive} could not be prepared ({prepared.reason(error)}); "
                f"delete it where it was put by hand and start again, or {_REMEDY}"
            ) from error


@contextlib.contextmanager
def _scratch(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory under `root` that is removed afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cifar10.scratch.", dir=root) as name:
        yield pathlib.Path(name)


def _if_damaged(directory: pathlib.Path) -> str:
    return f"delete {directory} to have it prepared again, or {_REMEDY}"
