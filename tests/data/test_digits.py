"""Tests of the digits: the split and the enlargement."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import datasets

from qflax.data import digits, load

GREY = hnp.arrays(np.int64, (1, 8, 8), elements=st.integers(0, 16))


def test_every_stored_example_is_in_exactly_one_split():
    stored = datasets.load_digits()
    expected = sorted(map(bytes, digits.enlarge(stored.images)))
    splits = [load("digits", split).images for split in ("train", "test")]
    assert [len(images) for images in splits] == [1437, 360]
    assert sorted(map(bytes, np.concatenate(splits))) == expected


def test_images_keep_their_labels():
    stored = datasets.load_digits()
    label_of = dict(zip(map(bytes, digits.enlarge(stored.images)), stored.target, strict=True))
    for split in ("train", "test"):
        data = load("digits", split)
        assert [label_of[bytes(image)] for image in data.images] == data.labels.tolist()


def test_classes_are_shared_out_evenly_and_mixed():
    total = np.bincount(datasets.load_digits().target)
    test = load("digits", "test").labels
    assert np.abs(np.bincount(test) - total * 360 / 1797).max() < 1
    assert set(test[:60]) == set(range(10))


@pytest.mark.parametrize(("split", "checksum"), [("train", 1934053068), ("test", 4234634033)])
def test_the_same_data_in_every_version(split, checksum):
    """Another split or enlargement would make accuracies incomparable."""
    assert zlib.crc32(b"".join(array.tobytes() for array in digits.read(split))) == checksum


@settings(max_examples=30, deadline=None)
@given(GREY)
def test_enlarge_is_bilinear(images):
    enlarged = digits.enlarge(images)
    assert enlarged.shape == (1, 32, 32, 3)
    assert (enlarged == enlarged[..., :1]).all()
    centres = (np.arange(32) + 0.5) / 4 - 0.5
    rows = np.stack([np.interp(centres, np.arange(8), column) for column in images[0].T], axis=1)
    expected = np.stack([np.interp(centres, np.arange(8), row) for row in rows]) * 255 / 16
    assert np.abs(enlarged[0, ..., 0] - expected).max() <= 0.5 + 1e-9


@settings(max_examples=20, deadline=None)
@given(GREY)
def test_enlarge_commutes_with_mirroring(images):
    for axis in (1, 2):
        np.testing.assert_array_equal(
            digits.enlarge(np.flip(images, axis)), np.flip(digits.enlarge(images), axis)
        )


def test_full_range():
    assert (digits.enlarge(np.full((1, 8, 8), 16)) == 255).all()
    assert (digits.enlarge(np.zeros((1, 8, 8))) == 0).all()
