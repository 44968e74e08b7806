"""Tests of reading and preparing CIFAR-10: synthetic archives, and the real set where present."""

import io
import json
import os
import pathlib
import random
import shutil
import tarfile

import numpy as np
import pytest
import requests
from tensorflow_datasets.core.download import checksums

from qflax.data import cifar10, load
from qflax.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_BATCH = 12


def synthetic_batches():
    """Returns labels [6, 12] and images [6, 12, 32, 32, 3]; the last batch is the test's."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (6, PER_BATCH), np.uint8)
    images = rng.integers(0, 256, (6, PER_BATCH, 32, 32, 3), np.uint8)
    return labels, images


def add_file(tar, name, content):
    member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_archive(path):
    """Writes batches in CIFAR-10's binary format: 1 label byte, then 3 x 32 x 32 image bytes."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        add_file(tar, "batches.meta.txt", ("\n".join(CLASSES) + "\n\n").encode())
        add_file(tar, "readme.html", b"not a batch")
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        for name, labels, images in zip(names, *synthetic_batches(), strict=True):
            planes = images.transpose(0, 3, 1, 2).reshape(PER_BATCH, -1)
            add_file(tar, name, np.concatenate([labels[:, None], planes], axis=1).tobytes())


def trust(monkeypatch, archive):
    """Makes TFDS expect the checksum of the given archive in place of the published one's."""
    info = checksums.compute_url_info(archive)
    info.filename = "cifar-10-binary.tar.gz"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    monkeypatch.setattr(checksums, "get_all_url_infos", lambda: {url: info})


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A synthetic archive put where TFDS looks for files that were fetched by hand."""
    path = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_archive(path)
    trust(monkeypatch, path)
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared synthetic dataset, for tests that damage copies of it."""
    root = tmp_path_factory.mktemp("prepared")
    path = root / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_archive(path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        trust(monkeypatch, path)
        cifar10.read("test", str(root))
    return root


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared / "cifar10", tmp_path / "cifar10")
    return tmp_path / "cifar10" / "3.0.2"


@pytest.fixture
def unreachable(monkeypatch):
    def get(*args, **kwargs):
        assert kwargs["timeout"], "a download without a timeout can wait for ever"
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", get)


def sorted_rows(labels, images):
    return sorted((int(label), image.tobytes()) for label, image in zip(labels, images, strict=True))


@pytest.mark.parametrize(("split", "batches"), [("train", slice(5)), ("test", slice(5, 6))])
def test_prepared_data_equals_the_binary_batches(archive, split, batches):
    labels, images = (part[batches] for part in synthetic_batches())
    data = load("cifar10", split, data_dir=str(archive.parents[2]))
    expected = sorted_rows(labels.reshape(-1), images.reshape(-1, 32, 32, 3))
    assert sorted_rows(data.labels, data.images) == expected
    assert data.images.flags.c_contiguous


def test_preparing_leaves_only_the_dataset(archive):
    root = archive.parents[2]
    cifar10.read("train", str(root))
    assert sorted(os.listdir(root)) == ["cifar10", "downloads"]
    assert os.listdir(root / "cifar10") == ["3.0.2"]
    assert os.listdir(root / "downloads") == ["manual"]
    assert (root / "cifar10/3.0.2/label.labels.txt").read_text().split() == CLASSES


def test_order_is_that_of_tfds(prepared):
    """TFDS stores hashed keys in order, so that the ids tell which example is where."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(prepared / "cifar10" / "3.0.2").as_data_source("train")
    stored = [int(source[i]["id"].decode().removeprefix("train_")) for i in range(len(source))]
    assert stored != sorted(stored)
    labels, images = synthetic_batches()
    got_images, got_labels = cifar10.read("train", str(prepared))
    np.testing.assert_array_equal(got_labels, labels[:5].reshape(-1)[stored])
    np.testing.assert_array_equal(got_images, images[:5].reshape(-1, 32, 32, 3)[stored])


def test_download(tmp_path, monkeypatch):
    source = tmp_path / "elsewhere" / "cifar-10-binary.tar.gz"
    write_archive(source)
    trust(monkeypatch, source)

    class Response(io.BytesIO):
        def raise_for_status(self):
            pass

        def iter_content(self, size):
            return iter(lambda: self.read(size), b"")

    monkeypatch.setattr(requests, "get", lambda *_, **__: Response(source.read_bytes()))
    root = tmp_path / "data"
    assert cifar10.read("train", str(root))[0].shape == (5 * PER_BATCH, 32, 32, 3)
    assert os.listdir(root) == ["cifar10"]


def test_broken_download_leaves_nothing(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        def raise_for_status(self):
            pass

        def iter_content(self, size):
            yield b"half"
            raise requests.exceptions.ChunkedEncodingError("connection lost")

    monkeypatch.setattr(requests, "get", lambda *_, **__: Response())
    with pytest.raises(UserError, match="ChunkedEncodingError"):
        cifar10.read("train", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_archive_with_a_wrong_checksum(archive):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz could not be prepared") as caught:
        cifar10.read("train", str(archive.parents[2]))
    assert "checksum" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "3.0.2" not in "".join(os.listdir(archive.parents[2] / "cifar10"))


def test_archive_with_a_truncated_batch(archive, monkeypatch):
    with tarfile.open(archive, "w:gz") as tar:
        add_file(tar, "batches.meta.txt", "\n".join(CLASSES).encode())
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            add_file(tar, name, bytes(3073 * 2 - 1))
    trust(monkeypatch, archive)
    with pytest.raises(UserError, match="could not be prepared"):
        cifar10.read("train", str(archive.parents[2]))
    assert sorted(os.listdir(archive.parents[2] / "cifar10")) == []


def test_another_process_was_faster(archive, prepared, monkeypatch):
    root = archive.parents[2]

    def write(*_, **__):
        shutil.copytree(prepared / "cifar10" / "3.0.2", root / "cifar10" / "3.0.2")
        raise OSError("Directory not empty")

    monkeypatch.setattr(cifar10._Builder, "download_and_prepare", write)
    assert len(cifar10.read("train", str(root))[1]) == 5 * PER_BATCH


def test_not_found_and_unreachable(tmp_path, unreachable, monkeypatch):
    root = tmp_path / "absent"
    with pytest.raises(UserError) as caught:
        load("cifar10", "train", data_dir=str(root))
    for part in (
        str(root),
        "ConnectionError",
        "TFDS_DATA_DIR",
        "--config.data_dir",
        "cifar10/3.0.2",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not root.exists()
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    with pytest.raises(UserError, match=str(root)):
        load("cifar10", "train")


def test_default_directory(unreachable, monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "tensorflow_datasets")):
        load("cifar10", "train")


def test_directory_that_cannot_be_made(tmp_path, archive, monkeypatch):
    (tmp_path / "file").write_text("")

    class Response(io.BytesIO):
        def raise_for_status(self):
            pass

    monkeypatch.setattr(requests, "get", lambda *_, **__: Response())
    with pytest.raises(UserError, match="nothing can be written"):
        cifar10.read("train", str(tmp_path / "file" / "data"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path):
    content = path.read_bytes()
    path.write_bytes(content[:20_000] + bytes(1000) + content[21_000:])


@pytest.mark.parametrize("damage", [truncate, overwrite, pathlib.Path.unlink])
def test_damaged_records(copy, damage):
    record_file = copy / "cifar10-train.array_record-00000-of-00001"
    damage(record_file)
    with pytest.raises(UserError, match=f"{record_file} is (damaged|missing)") as caught:
        load("cifar10", "train", data_dir=str(copy.parents[1]))
    assert "\n" not in str(caught.value)
    assert load("cifar10", "test", data_dir=str(copy.parents[1])).num_examples == PER_BATCH


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink])
def test_damaged_description(copy, name, damage):
    damage(copy / name)
    with pytest.raises(UserError, match=str(copy)):
        load("cifar10", "train", data_dir=str(copy.parents[1]))


@pytest.mark.parametrize("form", ["truncate", "flip", "zeros"])
def test_damage_anywhere_is_told_of_or_changes_nothing(copy, prepared, form):
    """Of every file; checksums find what is damaged in those of records."""
    rng, whole = random.Random(form), load("cifar10", "train", data_dir=str(prepared))
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        for _ in range(6):
            damaged, place = bytearray(content), rng.randrange(len(content))
            if form == "truncate":
                del damaged[place:]
            elif form == "flip":
                damaged[place] ^= 1 << rng.randrange(8)
            else:
                damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
            path.write_bytes(damaged)
            try:
                data = load("cifar10", "train", data_dir=str(copy.parents[1]))
            except UserError as error:
                assert "\n" not in str(error) and str(copy) in str(error)
            else:
                np.testing.assert_array_equal(data.images, whole.images)
                np.testing.assert_array_equal(data.labels, whole.labels)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "[", "[]", "null", "3", "[" * 10**5, '{"a":' * 3000 + "1" + "}" * 3000])
def test_descriptions_that_are_none(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(UserError, match="missing or damaged") as caught:
        load("cifar10", "train", data_dir=str(copy.parents[1]))
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lengths",
    [None, [], ["0"], ["-1"], ["1"], ["61"], ["10000000000000"], ["30", "30"], ["1"] * 100, "60", [1.5]],
)
def test_wrong_numbers_of_records(copy, lengths):
    info = json.loads((copy / "dataset_info.json").read_text())
    split = next(split for split in info["splits"] if split["name"] == "train")
    split["shardLengths"] = lengths
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=str(copy)):
        load("cifar10", "train", data_dir=str(copy.parents[1]))


def test_swapped_splits(copy):
    train, test = (copy / f"cifar10-{split}.array_record-00000-of-00001" for split in ("train", "test"))
    train.rename(copy / "third"), test.rename(train), (copy / "third").rename(test)
    for split in ("train", "test"):
        with pytest.raises(UserError, match="another split's"):
            load("cifar10", split, data_dir=str(copy.parents[1]))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("_CLASSES", 3, "has the label"), ("_PNG", cifar10._PNG[:-1] + b"\6", "is no sound PNG image")],
)
def test_examples_that_are_not_as_they_should_be(copy, monkeypatch, name, value, told):
    monkeypatch.setattr(cifar10, name, value)
    with pytest.raises(UserError, match=f"train_.* {told}"):
        load("cifar10", "train", data_dir=str(copy.parents[1]))


def test_another_format(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="'tfrecord', .*'array_record'; .*tfds convert_format"):
        load("cifar10", "train", data_dir=str(copy.parents[1]))


def test_missing_split(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"splits": info["splits"][:1]}))
    kept = info["splits"][0]["name"]
    with pytest.raises(UserError, match="the split 'test'" if kept == "train" else "'train'"):
        load("cifar10", "train", data_dir=str(copy.parents[1]))


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")),
    reason="TFDS_DATA_DIR holds no cifar10",
)
def test_real_data():
    train, test = load("cifar10", "train"), load("cifar10", "test")
    assert (train.num_examples, test.num_examples) == (50_000, 10_000)
    np.testing.assert_array_equal(np.bincount(train.labels), 10 * [5000])
    np.testing.assert_array_equal(np.bincount(test.labels), 10 * [1000])
    pixels = train.images.reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(pixels.std(0) / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)
