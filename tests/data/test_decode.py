"""Tests of decoding against Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qflax.data import Crop
from qflax.data.crop import random_window
from qflax.data.decode import decode_evaluation, decode_training

SMALL = Crop(image_size=32, resize=40)
ODD = [
    dict(width=61, height=47, mode="L"),
    dict(width=61, height=47, mode="CMYK"),
    dict(width=61, height=47, form="PNG"),
    dict(width=61, height=47, form="PNG", mode="RGBA"),
    dict(width=1, height=99),
    dict(width=99, height=1, mode="L"),
    dict(width=1, height=1),
    dict(width=700, height=500, mode="L"),
    dict(width=700, height=500, progressive=True),
]


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def saved(array, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def whole(width, height, size):
    """A crop whose only window is the whole image."""
    return Crop(image_size=size, resize=size, area=(1, 1), ratio=(width / height, width / height))


@pytest.mark.parametrize("image", ODD)
def test_every_kind_of_image(encoded, image):
    data = encoded(**image)
    for got in (decode_training(data, rng(), SMALL), decode_evaluation(data, SMALL)):
        assert got.shape == (32, 32, 3) and got.dtype == np.uint8
        assert got.flags.c_contiguous and got.flags.owndata
        np.testing.assert_allclose(got.mean((0, 1)), pixels(data).mean((0, 1)), atol=60)


@pytest.mark.parametrize("image", ODD)
@pytest.mark.parametrize("size", [20, 64])
def test_training_is_near_to_pillow_antialiased(encoded, image, size):
    """Windows drawn alike, resized by a triangle filter; the images are smooth."""
    data = encoded(**image)
    crop = Crop(image_size=size, resize=size)
    for seed in range(5):
        original = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, width, height = random_window(rng(seed), *original.size, crop)
        # Rounded outwards, where the decoder shrinks.
        unit = max(unit for unit in (1, 2, 4, 8) if unit == 1 or unit * size <= min(width, height))
        right, bottom = (-(-side // unit) * unit for side in (left + width, top + height))
        box = (left - left % unit, top - top % unit, *np.minimum((right, bottom), original.size))
        expected = np.asarray(original.resize((size, size), Image.Resampling.BILINEAR, box=box))
        difference = np.abs(decode_training(data, rng(seed), crop) - expected.astype(float))
        assert difference.mean() < 2.5, seed


@given(st.integers(20, 200), st.integers(20, 200), st.integers(10, 60))
def test_shrinking_keeps_the_mean_of_a_pattern_that_aliases(width, height, size):
    """Stripes of one pixel become grey where they are shrunk to half or less."""
    stripes = np.zeros((height, width, 3), np.uint8)
    stripes[:, ::2] = 255
    data = saved(stripes)
    got = decode_training(data, rng(), whole(width, height, size))
    if width >= 2 * size:
        inner = got[:, 2:-2]
        assert inner.min() > 60 and inner.max() < 195


def test_large_windows_are_shrunk_while_they_are_decoded(encoded):
    """Eight times the size on both sides, and the same picture."""
    data = encoded(width=400, height=400, quality=95)
    got = decode_training(data, rng(), whole(400, 400, 50))
    expected = np.asarray(Image.fromarray(pixels(data)).reduce(8))
    assert np.abs(got - expected.astype(float)).mean() < 1.5


def test_enlarging_is_bilinear():
    data = saved(rng().integers(0, 256, (7, 9, 3), np.uint8))
    got = decode_training(data, rng(), whole(9, 7, 32))
    expected = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(got - np.asarray(expected).astype(int)).max() <= 2


def test_the_generator_decides_the_window(encoded):
    data = encoded(width=80, height=60)
    first = decode_training(data, rng(1), SMALL)
    np.testing.assert_array_equal(first, decode_training(data, rng(1), SMALL))
    assert (first != decode_training(data, rng(2), SMALL)).any()


def test_the_orientation_tag_is_ignored():
    """As in torchvision and tf.image: the networks that one compares with saw the images so."""
    array = np.zeros((20, 40, 3), np.uint8)
    array[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(array, "JPEG", exif=exif)
    got = decode_training(data, rng(), whole(40, 20, 10))
    assert got[:4].min() > 200 and got[6:].max() < 55


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (61, 47), (300, 300), (256, 999), (257, 256)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_is_resize_and_centre_crop_of_torchvision(encoded, size, mode):
    data = encoded(*size, mode=mode)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = size
    if width <= height:
        image = image.resize((256, int(256 * height / width)), Image.Resampling.BILINEAR)
    else:
        image = image.resize((int(256 * width / height), 256), Image.Resampling.BILINEAR)
    top, left = int(round((image.height - 224) / 2.0)), int(round((image.width - 224) / 2.0))
    expected = np.asarray(image)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(decode_evaluation(data, Crop()), expected)


@pytest.mark.parametrize("image", [*ODD[:4], ODD[-1]])
@pytest.mark.parametrize("damage", ["half", "end", "text", "empty"])
def test_damaged_images(encoded, image, damage):
    data = encoded(**image)
    data = {"half": data[: len(data) // 2], "end": data[:-40], "text": b"<html>", "empty": b""}[damage]
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode_training(data, rng(), SMALL)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode_evaluation(data, SMALL)


def test_a_thumbnail_does_not_hide_truncation(encoded):
    """Its end marker lies in front of the image proper."""
    data = encoded(width=200, height=150)
    thumbnail = encoded(width=20, height=15)
    segment = b"\xff\xed" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = data[:2] + segment + data[2:]
    decode_training(with_thumbnail, rng(), SMALL)
    with pytest.raises(OSError):
        decode_training(with_thumbnail[: -len(data) // 2], rng(), SMALL)
