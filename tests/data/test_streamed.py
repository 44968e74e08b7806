"""Tests of the streams of batches: what is in them, in threads and in worker processes."""

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from qflax.data import Crop, load
from qflax.data.decode import decode_evaluation
from qflax.data.streamed import Record, StreamedDataset
from qflax.errors import UserError

CROP = Crop(image_size=16, resize=20)
NUM_EXAMPLES = 10


class Memory:
    """Records in a list; the label of an image is its place."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def part(self, first, stop):
        return Memory(self.records[first:stop])


@pytest.fixture(scope="module")
def dataset(encoded):
    images = [encoded(20 + 3 * i, 45 - i, seed=i) for i in range(NUM_EXAMPLES)]
    records = Memory([Record(image, i, f"record {i}") for i, image in enumerate(images)])
    return StreamedDataset(name="made", num_classes=NUM_EXAMPLES, records=records, crop=CROP)


@pytest.fixture(scope="module")
def stored(imagenet_dir):
    return load("imagenet2012", "train", data_dir=str(imagenet_dir), crop=CROP)


def taken(batches, count=None):
    """Returns the first `count` batches, or all, and closes."""
    try:
        return [tuple(map(np.array, batch)) for batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def training(dataset, count, **arguments):
    return taken(dataset.training_batches(**({"seed": 3, "batch_size": 4} | arguments)), count)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for array, array_of_other in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, array_of_other)


def test_shapes_and_dtypes(dataset):
    for batches in (
        dataset.training_batches(seed=0, batch_size=4),
        dataset.evaluation_batches(batch_size=4),
        dataset.calibration_batches(seed=0, batch_size=4, num_batches=1),
    ):
        batch = next(batches)
        batches.close()
        assert batch.images.shape == (4, 16, 16, 3) and batch.images.dtype == np.uint8
        assert batch.labels.shape == batch.mask.shape == (4,)
        assert batch.labels.dtype == np.int32 and batch.mask.dtype == bool
        assert batch.mask.all()


def test_each_epoch_has_every_example_once_in_a_fresh_order(dataset):
    labels = np.concatenate([batch[1] for batch in training(dataset, 15)]).reshape(6, NUM_EXAMPLES)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(NUM_EXAMPLES), (6, 1)))
    assert len(set(map(tuple, labels))) == 6


def test_seeds_differ(dataset):
    """Neither does one seed's second epoch repeat the other one's first."""
    orders = {
        tuple(epoch)
        for seed in range(3)
        for epoch in np.concatenate([batch[1] for batch in training(dataset, 5, seed=seed)]).reshape(2, -1)
    }
    assert len(orders) == 6


def test_each_epoch_has_other_crops(dataset):
    stream = training(dataset, 5)
    images, labels = (np.concatenate([batch[i] for batch in stream]) for i in range(2))
    for label in range(NUM_EXAMPLES):
        first, second = images[labels == label]
        assert (first != second).any()


@pytest.mark.parametrize("first_step", [1, 2, 7, 1000])
def test_resumed_is_uninterrupted(dataset, first_step):
    whole = training(dataset, 3, first_step=first_step - 1)
    assert_equal(training(dataset, 2, first_step=first_step), whole[1:])


def test_resumed_far_away_reads_nothing_before(encoded):
    read = []

    class Counted(Memory):
        def __getitem__(self, index):
            read.append(index)
            return self.records[index]

    records = Counted([Record(encoded(20, 20), 0, "")] * NUM_EXAMPLES)
    dataset = StreamedDataset(name="made", num_classes=1, records=records, crop=CROP)
    training(dataset, 2, first_step=10**9)
    assert len(read) <= 4 * (2 + 16 + 1)


@pytest.mark.parametrize("count", [2, 4])
def test_shards_put_together_are_the_batch(dataset, count):
    whole = training(dataset, 4, first_step=1)
    shards = [training(dataset, 4, first_step=1, shard=(i, count)) for i in range(count)]
    together = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shards, strict=True)]
    assert_equal(together, whole)
    evaluated = taken(dataset.evaluation_batches(batch_size=4))
    shards = [taken(dataset.evaluation_batches(batch_size=4, shard=(i, count))) for i in range(count)]
    together = [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shards, strict=True)]
    assert_equal(together, evaluated)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
def test_evaluation_has_every_example_once(dataset, batch_size):
    batches = taken(dataset.evaluation_batches(batch_size=batch_size))
    images, labels, mask = map(np.concatenate, zip(*batches, strict=True))
    assert len(mask) == -(-NUM_EXAMPLES // batch_size) * batch_size
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < NUM_EXAMPLES)
    np.testing.assert_array_equal(labels[mask], np.arange(NUM_EXAMPLES))
    for image, record in zip(images[mask], dataset.records.records, strict=True):
        np.testing.assert_array_equal(image, decode_evaluation(record.image, CROP))


def test_an_empty_split_has_no_batches(dataset):
    assert taken(dataset.part(4, 4).evaluation_batches(batch_size=4)) == []


def test_parts(dataset):
    part = dataset.part(2, 7)
    assert part.num_examples == 5
    assert taken(part.evaluation_batches(batch_size=5))[0][1].tolist() == [2, 3, 4, 5, 6]


def test_calibration_is_the_start_of_training_without_random_crops(dataset):
    batches = taken(dataset.calibration_batches(seed=3, batch_size=4, num_batches=2))
    assert len(batches) == 2
    for (images, labels, _), trained in zip(batches, training(dataset, 2), strict=True):
        np.testing.assert_array_equal(labels, trained[1])
        for image, label in zip(images, labels, strict=True):
            np.testing.assert_array_equal(image, decode_evaluation(dataset.records[label].image, CROP))
    with pytest.raises(ValueError, match="12 calibration examples of 10"):
        dataset.calibration_batches(seed=3, batch_size=4, num_batches=3)


@pytest.mark.parametrize("shard", [(0, 3), (2, 2), (-1, 2)])
def test_wrong_shards(dataset, shard):
    with pytest.raises(ValueError, match="shard"):
        dataset.training_batches(seed=0, batch_size=4, shard=shard)


def test_closed_batches_end(dataset):
    batches = dataset.training_batches(seed=0, batch_size=4)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_a_broken_image_is_told_of(dataset):
    records = list(dataset.records.records)
    records[4] = Record(records[4].image[:300], 4, "record 4 of somewhere (n4.JPEG)")
    broken = StreamedDataset(name="made", num_classes=NUM_EXAMPLES, records=Memory(records), crop=CROP)
    for batches in (broken.training_batches(seed=0, batch_size=5), broken.evaluation_batches(batch_size=5)):
        with pytest.raises(UserError, match=r"made: record 4 of somewhere \(n4.JPEG\) is no readable image"):
            taken(batches, 4)


def test_workers_give_what_threads_give(stored):
    expected = training(stored, 5, first_step=2)
    batches = stored.training_batches(seed=3, batch_size=4, first_step=2, num_workers=2)
    assert_equal([tuple(map(np.array, next(batches))) for _ in range(5)], expected)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_start_no_accelerator_and_tell_of_a_broken_image(imagenet_dir):
    """One of each shard's records is looked at in the worker; the last but one image is truncated."""
    test = load("imagenet2012", "test", data_dir=str(imagenet_dir), crop=CROP)

    class Watched:  # Local, so that it is sent to the worker as a whole.
        def __len__(self):
            return len(test.records)

        def __getitem__(self, index):
            xla_bridge = sys.modules.get("jax._src.xla_bridge")
            started = "tensorflow" in sys.modules or (xla_bridge and xla_bridge.backends_are_initialized())
            return test.records[index]._replace(label=int(bool(started)))

    watched = StreamedDataset(name="imagenet2012", num_classes=2, records=Watched(), crop=CROP)
    batches = watched.evaluation_batches(batch_size=1, num_workers=1)
    labels = []
    with pytest.raises(UserError, match=r"of split 'validation' in .*\(ILSVRC2012_val_4.JPEG\)") as caught:
        for batch in batches:
            labels.append(int(batch.labels[0]))
    assert "\n" not in str(caught.value) and "truncated" in str(caught.value)
    assert not any(labels)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_told_of_in_a_line(imagenet_dir):
    dataset = load("imagenet2012", "train", data_dir=str(imagenet_dir), crop=CROP)
    batches = dataset.training_batches(seed=0, batch_size=2, num_workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match="has ended; .*lower config.num_workers") as caught:
        for _ in range(50):
            next(batches)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, os, signal, sys
from qflax.data import Crop, load

if __name__ == "__main__":
    dataset = load("imagenet2012", "train", data_dir=sys.argv[1], crop=Crop(image_size=16, resize=20))
    batches = dataset.training_batches(seed=0, batch_size=4, num_workers=1)
    next(batches)
    print(len(multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    batches.close()
"""


@pytest.mark.parametrize("end", ["kill", "close"])
def test_workers_end_with_the_program(imagenet_dir, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, imagenet_dir, end],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=30,  # Else it waits for the workers, too: they hold the pipes.
    )
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    assert done.stdout == "1\n"
    if end == "close":
        assert done.stderr == ""
