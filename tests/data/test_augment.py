"""Tests of the augmentation: what each part does to an image and its label."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflax.data.augment import Augmentation, augment, normalize
from qflax.errors import UserError

BATCH, HEIGHT, WIDTH, CLASSES = 8, 12, 10, 5
NOTHING = {"crop_padding": 0, "flip": False}
SEEDS = st.integers(0, 2**31 - 1)
FULL = Augmentation(crop_padding=3, cutout=4, mixup_alpha=0.4, cutmix_alpha=1.0)
few = settings(max_examples=15, deadline=None)


def batch(seed):
    """Returns positions, images, labels and partners; no image pixel is 0, the padding's colour."""
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (2, BATCH, HEIGHT, WIDTH, 3), np.uint8)
    labels = rng.integers(0, CLASSES, (2, BATCH)).astype(np.int32)
    positions = rng.integers(0, 2**31 - 1, BATCH).astype(np.int32)
    return tuple(map(jnp.asarray, (positions, images[0], labels[0], images[1], labels[1])))


@functools.partial(jax.jit, static_argnums=1)
def run(seed, spec, data, fill=0.0):
    key = jax.random.key(seed)
    return augment(key, *data, spec=spec, num_classes=CLASSES, fill=fill)


def augmented(seed, data=None, **fields):
    images, probs = run(seed, Augmentation(**(NOTHING | fields)), data or batch(seed))
    assert images.dtype == probs.dtype == jnp.float32
    return np.asarray(images), np.asarray(probs)


@few
@given(SEEDS)
def test_nothing(seed):
    _, images, labels, _, _ = batch(seed)
    got, probs = augmented(seed)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(probs, np.eye(CLASSES)[labels])


def crop_offsets(got, image, padding):
    """Returns the offsets (row, column) at which the padded image shows `got`."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    return [
        (row, column)
        for row in offsets
        for column in offsets
        if (padded[row : row + HEIGHT, column : column + WIDTH] == got).all()
    ]


@few
@given(SEEDS, st.integers(1, 3))
def test_crop_is_a_window_of_the_padded_image(seed, padding):
    data = batch(seed)
    got, _ = augmented(seed, data, crop_padding=padding)
    for image, original in zip(got, np.asarray(data[1]), strict=True):
        assert len(crop_offsets(image, original, padding)) == 1


def test_all_crops_occur():
    data = batch(0)
    seen = set()
    for seed in range(40):
        got, _ = augmented(seed, data, crop_padding=1)
        for image, original in zip(got, np.asarray(data[1]), strict=True):
            seen.update(crop_offsets(image, original, 1))
    assert seen == {(row, column) for row in range(3) for column in range(3)}


def test_flip_mirrors_half_of_the_images():
    flipped = 0
    for seed in range(40):
        data = batch(seed)
        got, _ = augmented(seed, data, flip=True)
        images = np.asarray(data[1])
        same = (got == images).all((1, 2, 3))
        mirrored = (got == images[:, :, ::-1]).all((1, 2, 3))
        assert (same ^ mirrored).all()
        flipped += mirrored.sum()
    assert 120 < flipped < 200  # Of 320: mean 160, standard deviation 9.


@few
@given(SEEDS, st.integers(1, 14))
def test_cutout_paints_a_square_clipped_at_the_borders(seed, side):
    data = batch(seed)
    fill = np.array([0.5, 0.25, 300.0], np.float32)
    got, _ = run(seed, Augmentation(**NOTHING, cutout=side), data, fill)
    for image, original in zip(np.asarray(got), np.asarray(data[1]), strict=True):
        painted = (image == fill).all(-1)
        np.testing.assert_array_equal(image[~painted], original[~painted])
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        np.testing.assert_array_equal(painted, painted.any(1)[:, None] & painted.any(0)[None])
        for lines, size in ((rows, HEIGHT), (columns, WIDTH)):
            assert len(lines) == lines[-1] - lines[0] + 1 <= side
            touches_border = lines[0] == 0 or lines[-1] == size - 1
            assert len(lines) == min(side, size) or (touches_border and len(lines) >= side // 2)


@few
@given(SEEDS)
def test_mixup_mixes_images_as_it_mixes_labels(seed):
    data = batch(seed)
    positions, images, labels, partners, partner_labels = data
    labels, partner_labels = jnp.zeros_like(labels), jnp.ones_like(partner_labels)
    got, probs = augmented(seed, (positions, images, labels, partners, partner_labels), mixup_alpha=0.7)
    weight = probs[:, 0]
    np.testing.assert_allclose(probs[:, 1], 1 - weight, atol=1e-6)
    weight = weight[:, None, None, None]
    np.testing.assert_allclose(got, weight * images + (1 - weight) * partners, atol=1e-3)


@few
@given(SEEDS)
def test_cutmix_pastes_a_box_and_weighs_labels_by_its_area(seed):
    positions, images, labels, partners, partner_labels = batch(seed)
    # Colours that tell an image from its partner at every pixel.
    images, partners = images | 1, partners & 254
    labels, partner_labels = jnp.zeros_like(labels), jnp.ones_like(partner_labels)
    got, probs = augmented(seed, (positions, images, labels, partners, partner_labels), cutmix_alpha=1.0)
    pasted = (got == np.asarray(partners)).all(-1)
    np.testing.assert_array_equal(np.where(pasted[..., None], partners, images), got)
    np.testing.assert_allclose(probs[:, 1], pasted.mean((1, 2)), atol=1e-6)
    for box in pasted:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        np.testing.assert_array_equal(box, box.any(1)[:, None] & box.any(0)[None])
        for lines in (rows, columns):
            assert not len(lines) or len(lines) == lines[-1] - lines[0] + 1


def test_cutmix_box_has_the_sides_of_the_paper():
    """Beta(alpha, alpha) is close to 1/2 for a large alpha: sides of sqrt(1/2), rounded to even."""
    data = batch(0)
    data = (data[0], jnp.full_like(data[1], 1), data[2], jnp.full_like(data[3], 2), data[4])
    sides = set()
    for seed in range(10):
        pasted = augmented(seed, data, cutmix_alpha=1e4)[0][..., 0] == 2
        sides.update((box.any(1).sum(), box.any(0).sum()) for box in pasted)
    assert (max(rows for rows, _ in sides), max(columns for _, columns in sides)) == (8, 6)


def weights(seeds, **fields):
    """Returns the weights [seeds * BATCH] of the images against their partners."""
    positions, images, labels, partners, _ = batch(0)
    zeros = jnp.zeros_like(labels)
    data = (positions, images, zeros, partners, zeros + 1)
    return np.concatenate([augmented(seed, data, **fields)[1][:, 0] for seed in range(seeds)])


def test_mixup_weights_follow_their_distribution():
    """Beta(1/2, 1/2) has mean 1/2 and variance 1/8; 800 draws."""
    drawn = weights(100, mixup_alpha=0.5)
    assert abs(drawn.mean() - 0.5) < 0.06
    assert abs(drawn.var() - 0.125) < 0.02


def test_either_mixup_or_cutmix_in_half_of_the_examples_each():
    """A box covers a whole number of pixels; the weight of mixup hardly ever fits one."""
    pixels = weights(50, mixup_alpha=1.0, cutmix_alpha=1.0) * HEIGHT * WIDTH
    whole = np.abs(pixels - np.round(pixels)) < 1e-4
    assert 0.4 < whole.mean() < 0.6


@few
@given(SEEDS)
def test_probabilities_sum_to_one_and_values_stay_in_range(seed):
    images, probs = run(seed, FULL, batch(seed))
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    assert probs.min() >= 0 and probs.max() <= 1 + 1e-6
    assert images.min() >= 0 and images.max() <= 255.001


@pytest.mark.thorough
@few
@given(SEEDS, st.sampled_from([1, 4]))
def test_parts_of_the_batch_give_the_same_as_the_whole(seed, border):
    data = batch(seed)
    whole = run(seed, FULL, data)
    parts = [
        run(seed, FULL, tuple(array[part] for array in data)) for part in (slice(border), slice(border, None))
    ]
    for expected, *got in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-6, atol=1e-4)


@few
@given(SEEDS)
def test_position_and_key_decide_the_draws(seed):
    positions, *rest = batch(seed)
    spec = Augmentation(crop_padding=3)
    same = [array[:1].repeat(BATCH, 0) for array in rest]
    images, _ = run(seed, spec, (positions, *same))
    assert len(set(map(bytes, np.asarray(images)))) > 1
    images, _ = run(seed, spec, (jnp.full_like(positions, 7), *same))
    assert len(set(map(bytes, np.asarray(images)))) == 1
    other, _ = run(seed ^ 1, spec, (positions, *rest))
    assert (np.asarray(other) != np.asarray(run(seed, spec, (positions, *rest))[0])).any()


def test_partners_have_draws_of_their_own():
    """Where an image is its own partner, a mixture of equal crops would be that crop."""
    positions, images, labels, _, _ = batch(0)
    spec = {"crop_padding": 3, "mixup_alpha": 1.0}
    mixed, _ = augmented(0, (positions, images, labels, images, labels), **spec)
    cropped, _ = augmented(0, (positions, images, labels), crop_padding=3)
    assert (np.abs(mixed - cropped).max((1, 2, 3)) > 1).sum() >= BATCH - 2


def test_partners_are_needed_only_for_mixing():
    data = batch(0)
    alone, _ = augmented(0, data[:3], crop_padding=2)
    with_partners, _ = augmented(0, data, crop_padding=2)
    np.testing.assert_array_equal(alone, with_partners)
    with pytest.raises(ValueError, match="need partner_images"):
        augmented(0, data[:3], mixup_alpha=0.2)


def test_no_implicit_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        images, _ = run(0, FULL, batch(1), jnp.array([1.0, 2.0, 3.0]))
        normalize(images, [0.5] * 3, [0.25] * 3)


def test_normalize():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    got = normalize(images, (0.5, 0.2, 0.0), (0.25, 1.0, 2.0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[[[-2, 0, 0.5]]]], atol=1e-6)
    np.testing.assert_array_equal(got, normalize(images.astype(np.float32), (0.5, 0.2, 0), (0.25, 1, 2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", -1),
        ("crop_padding", 1.5),
        ("cutout", True),
        ("flip", 1),
        ("mixup_alpha", -0.1),
        ("mixup_alpha", float("nan")),
        ("cutmix_alpha", float("inf")),
        ("cutmix_alpha", "1"),
    ],
)
def test_invalid_fields(field, value):
    with pytest.raises(UserError, match=f"{field}={value!r}: must be"):
        Augmentation(**{field: value})
