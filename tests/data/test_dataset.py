"""Tests of Dataset and of loading by name."""

import subprocess
import sys

import numpy as np
import pytest

from qflax.data import DATASETS, Dataset, load
from qflax.errors import UserError


def make(images=None, labels=None, num_classes=3):
    return Dataset(
        images=np.zeros((4, 2, 2, 3), np.uint8) if images is None else images,
        labels=np.array([0, 1, 2, 0], np.int32) if labels is None else labels,
        num_classes=num_classes,
        name="made",
    )


def test_dataset():
    assert make().num_examples == 4
    with pytest.raises(AttributeError):
        make().labels = None


@pytest.mark.parametrize(
    "fields",
    [
        {"images": np.zeros((4, 2, 2, 3), np.float32)},
        {"images": np.zeros((4, 2, 2), np.uint8)},
        {"images": np.zeros((5, 2, 2, 3), np.uint8)},
        {"labels": np.zeros(4, np.int64)},
        {"labels": np.array([0, 1, -1, 0], np.int32)},
        {"num_classes": 2},
    ],
)
def test_contradictions(fields):
    with pytest.raises(ValueError, match="made: "):
        make(**fields)


def test_registered_names():
    assert DATASETS == ("cifar10", "digits", "imagenet2012")


@pytest.mark.parametrize("held_out", [1, 100, 1436])
def test_validation_is_the_end_of_train(held_out):
    stored = load("digits", "train")
    train = load("digits", "train", validation_examples=held_out)
    validation = load("digits", "validation", validation_examples=held_out)
    assert (train.num_examples, validation.num_examples) == (1437 - held_out, held_out)
    np.testing.assert_array_equal(stored.images[-held_out:], validation.images)
    np.testing.assert_array_equal(stored.labels, np.append(train.labels, validation.labels))


def test_validation_examples_leave_the_test_alone():
    test = load("digits", "test", validation_examples=100)
    np.testing.assert_array_equal(test.images, load("digits", "test").images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digit"}, r"'digit' \(did you mean 'digits'\?\).*'cifar10', 'digits', 'imagenet2012'"),
        ({"name": "xyz"}, "unknown dataset 'xyz'; choose"),
        ({"split": "valid"}, r"'valid'.*'train', 'validation', 'test'"),
        ({"split": "validation"}, "'validation' of digits is empty.*set it to 1 or more"),
        ({"validation_examples": 1437}, "is 1437.*stores 1437.*choose 0..1436"),
        ({"validation_examples": -1}, "is -1.*choose 0..1436"),
        ({"split": "validation", "validation_examples": 5000}, "is 5000.*choose 0..1436"),
    ],
)
def test_user_errors(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        load(**({"name": "digits", "split": "train"} | arguments))
    assert "\n" not in str(caught.value)


def test_import_is_cheap_and_loading_needs_no_tensorflow():
    code = (
        "import sys, qflax.data\n"
        "assert not {'tensorflow_datasets', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "import qflax.data.cifar10\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
