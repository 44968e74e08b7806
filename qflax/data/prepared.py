"""Where TensorFlow Datasets keeps prepared data sets, and their opening without TensorFlow."""

import os
import pathlib
import textwrap
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from qflax.errors import UserError, require

FORMAT = "array_record"  # The one format of TFDS that is read and written without TensorFlow.


def root(data_dir: str | None) -> pathlib.Path:
    """Returns `data_dir`, else TFDS_DATA_DIR of the environment, else TFDS's ~/tensorflow_datasets."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(os.path.expanduser(folder))


def open_builder(
    name: str, directory: pathlib.Path, splits: tuple[str, ...], *, if_damaged: str, if_other_format: str
) -> Any:
    """Returns TFDS's read-only builder of a prepared directory.

    Args:
        name: of the data set, for errors.
        directory: <root>/<name>/<version>.
        splits: those that must be there.
        if_damaged: remedy where something is missing or damaged.
        if_other_format: remedy where the data is not in `FORMAT`.

    Raises:
        UserError: in these two cases.
    """
    try:
        builder = tfds.builder_from_directory(directory)
        missing = set(splits) - set(builder.info.splits)
    except Exception as error:  # A missing or damaged JSON file raises unrelated types.
        raise UserError(
            f"{name}: dataset_info.json or features.json in {directory} is missing or damaged "
            f"({reason(error)}); {if_damaged}"
        ) from error
    if missing:
        raise UserError(f"{name}: the split {min(missing)!r} in {directory} is missing; {if_damaged}")
    if builder.info.file_format.value != FORMAT:
        raise UserError(
            f"{name}: {directory} is in the format {builder.info.file_format.value!r}, which only "
            f"TensorFlow reads, not in {FORMAT!r}; {if_other_format}"
        )
    return builder


def conversion(name: str, directory: pathlib.Path) -> str:
    """Returns the remedy for a directory that is not in `FORMAT`."""
    return (
        f"convert it, with TensorFlow, by `tfds convert_format --dataset_version_dir={directory} "
        f"--out_file_format={FORMAT} --out_dir=DIR/{name}/{directory.name}`, and set TFDS_DATA_DIR or "
        "--config.data_dir to DIR"
    )


def check_files(builder: Any, split: str, *, if_damaged: str) -> None:
    """Raises UserError, with the remedy `if_damaged`, unless all files of a split are there and complete."""
    name, directory = builder.name, builder.data_path
    try:
        info = builder.info.splits[split]
        files = list(zip(info.filepaths, info.shard_lengths, strict=True))
    except Exception as error:  # A damaged description raises unrelated types.
        raise UserError(
            f"{name}: dataset_info.json in {directory} is damaged ({reason(error)}); {if_damaged}"
        ) from error
    require(bool(files), f"{name}: the split {split!r} in {directory} has no files; {if_damaged}")
    for path, expected in files:
        require(os.path.isfile(path), f"{name}: {path} is missing; {if_damaged}")
        try:
            found = _num_records(path)
        except Exception as error:
            raise UserError(f"{name}: {path} is damaged ({reason(error)}); {if_damaged}") from error
        require(
            found == expected,
            f"{name}: {path} is damaged or another split's ({found} records, of {expected}); {if_damaged}",
        )


def _num_records(path: os.PathLike) -> int:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, shortened."""
    return textwrap.shorten(str(error).partition("\n")[0] or type(error).__name__, 300)
