"""Tests of reading ImageNet's records from a synthetic set in TFDS's format."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import pytest

from qflax.data import Crop, data_format, imagenet, load, load_training
from qflax.errors import UserError


@pytest.fixture
def copy(imagenet_dir, tmp_path):
    shutil.copytree(imagenet_dir / "imagenet2012", tmp_path / "imagenet2012")
    return tmp_path / "imagenet2012" / "5.1.0"


def labels(dataset):
    return [dataset.records[i].label for i in range(dataset.num_examples)]


def test_splits(imagenet_dir):
    stored = load("imagenet2012", "train", data_dir=str(imagenet_dir))
    assert sorted(labels(stored)) == list(range(0, 11 * 90, 90))
    test = load("imagenet2012", "test", data_dir=str(imagenet_dir), validation_examples=3)
    assert sorted(labels(test)) == list(range(0, 600, 100))
    train, validation = load_training("imagenet2012", data_dir=str(imagenet_dir), validation_examples=3)
    assert labels(train) + labels(validation) == labels(stored)
    assert (train.num_examples, validation.num_examples) == (8, 3)
    again = load("imagenet2012", "validation", data_dir=str(imagenet_dir), validation_examples=3)
    assert labels(again) == labels(validation)
    train, validation = load_training("imagenet2012", data_dir=str(imagenet_dir))
    assert (train.num_examples, validation.num_examples) == (11, 0)
    assert (stored.name, stored.num_classes) == ("imagenet2012", 1000)


def test_records_tell_their_origin(imagenet_dir):
    _, validation = load_training("imagenet2012", data_dir=str(imagenet_dir), validation_examples=2)
    record = validation.records[1]
    assert f"record 10 of split 'train' in {imagenet_dir}" in record.origin
    assert f"(n{record.label // 90}.JPEG)" in record.origin


def test_records_are_small_to_send_and_equal_afterwards(imagenet_dir):
    records = imagenet.read("train", str(imagenet_dir)).part(2, 9)
    records[0]  # A file is open now.
    sent = pickle.dumps(records)
    assert len(sent) < 100_000
    assert [pickle.loads(sent)[i] for i in range(7)] == [records[i] for i in range(7)]


def test_format_follows_the_crop():
    assert data_format("imagenet2012").image_shape == (224, 224, 3)
    assert data_format("imagenet2012", Crop(image_size=64)).image_shape == (64, 64, 3)
    assert data_format("cifar10", Crop(image_size=64)).image_shape == (32, 32, 3)
    assert data_format("imagenet2012").num_classes == 1000


def test_newest_version(copy):
    shutil.copytree(copy, copy.parent / "5.0.0")
    (copy.parent / "5.10.0.incomplete").mkdir()
    assert "5.1.0" in imagenet.read("train", str(copy.parents[1]))[0].origin
    info = json.loads((copy / "dataset_info.json").read_text())
    shutil.copytree(copy, copy.parent / "5.10.2")
    (copy.parent / "5.10.2" / "dataset_info.json").write_text(json.dumps(info | {"version": "5.10.2"}))
    assert "5.10.2" in imagenet.read("train", str(copy.parents[1]))[0].origin


def test_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load("imagenet2012", "train")
    for part in (str(tmp_path), "tfds build imagenet2012 --file_format=array_record", "image-net.org"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_format(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=f"'tfrecord'.*tfds convert_format --dataset_version_dir={copy} "):
        load("imagenet2012", "train", data_dir=str(copy.parents[1]))


def test_missing_file(copy):
    path = copy / "imagenet2012-train.array_record-00000-of-00001"
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing; prepare it"):
        load("imagenet2012", "train", data_dir=str(copy.parents[1]))


def test_damaged_file(copy):
    path = copy / "imagenet2012-train.array_record-00000-of-00001"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{path} is damaged") as caught:
        load("imagenet2012", "train", data_dir=str(copy.parents[1]))
    assert "\n" not in str(caught.value)


def test_damaged_record(copy):
    path = copy / "imagenet2012-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    records = load("imagenet2012", "train", data_dir=str(copy.parents[1])).records
    with pytest.raises(UserError, match=r"record \d+ of split 'train'.*is damaged") as caught:
        [records[i] for i in range(len(records))]
    assert "\n" not in str(caught.value)


def test_label_outside_of_the_classes(copy, monkeypatch):
    monkeypatch.setattr(imagenet, "_CLASSES", 100)
    records = imagenet.read("train", str(copy.parents[1]))
    with pytest.raises(UserError, match="has the label"):
        [records[i] for i in range(len(records))]


def test_enough_files_may_be_open(imagenet_dir):
    """The real training set has 1,024 files, as many as a process may often open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        imagenet.read("train", str(imagenet_dir))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > min(1024, hard - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_tensorflow():
    code = "import sys, qflax.data.imagenet\nassert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
