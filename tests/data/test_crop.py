"""Tests of the crop's fields and of the random windows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflax.data import Crop
from qflax.data.crop import random_window
from qflax.errors import UserError

SIDES = st.integers(1, 3000)


@given(st.integers(0, 2**32 - 1), SIDES, SIDES)
def test_windows_lie_in_the_image(seed, width, height):
    left, top, columns, rows = random_window(np.random.default_rng(seed), width, height, Crop())
    assert columns > 0 and rows > 0
    assert 0 <= left <= left + columns <= width
    assert 0 <= top <= top + rows <= height


def windows(count, width, height, crop):
    rng = np.random.default_rng(0)
    return np.array([random_window(rng, width, height, crop) for _ in range(count)]).T


def test_windows_follow_their_distribution():
    """The image is so large, and the windows so small, that each first draw fits."""
    left, top, columns, rows = windows(4000, 10_000, 10_000, Crop(area=(0.1, 0.5)))
    area, ratio = columns * rows / 1e8, columns / rows
    assert area.min() > 0.0999 and area.max() < 0.5001
    assert abs(area.mean() - 0.3) < 0.01 and abs(area.std() - 0.4 / math.sqrt(12)) < 0.005
    assert ratio.min() > 0.7499 and ratio.max() < 1.3335
    assert abs(np.log(ratio).mean()) < 0.01
    for first, size in ((left, columns), (top, rows)):
        place = first / (10_000 - size)
        assert abs(place.mean() - 0.5) < 0.02 and place.min() < 0.01 and place.max() > 0.99


def test_thin_images_give_their_centre():
    assert random_window(np.random.default_rng(0), 1000, 30, Crop()) == (480, 0, 40, 30)
    assert random_window(np.random.default_rng(0), 30, 1000, Crop()) == (0, 480, 30, 40)
    assert random_window(np.random.default_rng(0), 1, 1, Crop()) == (0, 0, 1, 1)


def test_the_whole_image():
    crop = Crop(area=(1.0, 1.0), ratio=(1.5, 1.5))
    assert random_window(np.random.default_rng(0), 300, 200, crop) == (0, 0, 300, 200)


def test_equal_crops_are_equal():
    crop = Crop(area=[0.25, 1], ratio=[1, 2])
    assert crop == Crop(area=(0.25, 1), ratio=(1, 2))
    assert hash(crop) == hash(Crop(area=(0.25, 1), ratio=(1, 2)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 0, "must be a number of pixels, 1 or more"),
        ("image_size", 224.0, "must be a number"),
        ("resize", 223, "must be a number of pixels, 224 or more"),
        ("resize", True, "must be a number"),
        ("area", (0.0, 1.0), "above 0 and at most 1"),
        ("area", (0.5, 1.1), "above 0 and at most 1"),
        ("area", (0.5, 0.4), "least, greatest"),
        ("area", 0.5, "two numbers"),
        ("area", ("a", 1), "two numbers"),
        ("ratio", (1.0, math.inf), "finite"),
        ("ratio", (math.nan, 1.0), "least, greatest"),
        ("ratio", (1, 2, 3), "two numbers"),
    ],
)
def test_invalid_fields(field, value, message):
    with pytest.raises(UserError, match=rf"crop\.{field}=.*{message}"):
        Crop(**{field: value})
