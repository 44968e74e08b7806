"""Random crop, flip, cutout, mixup and CutMix, on device and independent of the sharding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qflax.errors import UserError
from qflax.numerics import product, quotient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to the training images; a field at 0 or False does nothing.

    Where both alphas are positive, each example draws one of mixup and CutMix, with equal
    probability.

    Attributes:
        crop_padding: black pixels added on each side before a crop of the original size is taken
            at a random offset.
        flip: whether images are mirrored left to right with probability 1/2.
        cutout: side in pixels of the square that is painted over; its centre is a random pixel,
            and what lies outside of the image is cut off (DeVries & Taylor 2017).
        mixup_alpha: parameter of the distribution Beta(alpha, alpha) of the weight of an image in
            its mixture with its partner (Zhang et al. 2018).
        cutmix_alpha: the same for the share of the area that CutMix keeps (Yun et al. 2019).

    Raises:
        UserError: if a field has the wrong type or sign.
    """

    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self):
        for name in ("crop_padding", "cutout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name}={value!r}: must be a number of pixels: 0, 1, 2, ...")
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name}={value!r}: must be a number, 0 for none")
            if not 0 <= value < math.inf:
                raise UserError(f"{name}={value!r}: must be 0 for none, or positive and finite")
        if not isinstance(self.flip, bool):
            raise UserError(f"flip={self.flip!r}: must be True or False")

    @property
    def mixes(self) -> bool:
        """Whether an example is mixed with a partner."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


def normalize(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Returns (images / 255 - mean) / std.

    Args:
        images: [..., channels] of any real dtype, values 0..255.
        mean: [channels], in units of the full range, 0..1.
        std: [channels], in the same unit.

    Returns:
        float32 of the shape of `images`.
    """
    images = jnp.asarray(images, jnp.float32)
    mean, std = (
        jnp.broadcast_to(255 * jnp.asarray(value, jnp.float32), images.shape) for value in (mean, std)
    )
    return quotient(images - mean, std)


def augment(
    key: jax.Array,
    positions: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    partner_images: jax.Array | None = None,
    partner_labels: jax.Array | None = None,
    *,
    spec: Augmentation,
    num_classes: int,
    fill: ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch; to be called inside of jit, before `normalize`.

    Example i draws from `fold_in(key, positions[i])` alone, so that the result is the same however
    the batch is divided among devices. Partners are cropped, flipped and cut out like the images,
    with draws of their own, before the mixing.

    Args:
        key: key of the whole training run, the same at every step.
        positions: int32 [batch], the examples' positions in the training stream.
        images: uint8 [batch, height, width, channels].
        labels: int32 [batch].
        partner_images: uint8 like `images`: what each example is mixed with. Needed only where
            `spec.mixes`.
        partner_labels: int32 [batch], likewise.
        spec: what to do.
        num_classes: number of classes.
        fill: colour of the cutout square, scalar or [channels], in 0..255; 255 times the mean
            becomes 0 in `normalize`, as in the paper.

    Returns:
        images float32 [batch, height, width, channels], values 0..255, and label probabilities
        float32 [batch, num_classes], each row summing to 1.

    Raises:
        ValueError: if `spec.mixes` and a partner is missing.
    """
    keys = jax.vmap(lambda position: jax.random.split(jax.random.fold_in(key, position), 3))(positions)
    fill = jnp.broadcast_to(jnp.asarray(fill, jnp.float32), images.shape[1:])
    transform = jax.vmap(lambda key, image: _transform(key, image, spec, fill))
    probs = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    images = transform(keys[:, 0], images)
    if not spec.mixes:
        return images, probs
    if partner_images is None or partner_labels is None:
        raise ValueError("mixup and CutMix need partner_images and partner_labels")
    partner_images = transform(keys[:, 1], partner_images)
    partner_probs = jax.nn.one_hot(partner_labels, num_classes, dtype=jnp.float32)
    height, width = images.shape[1:3]
    pixel_weight, label_weight = jax.vmap(lambda key: _mixing(key, height, width, spec))(keys[:, 2])
    pixel_weight, label_weight = pixel_weight[..., None], label_weight[:, None]
    return (
        product(images, pixel_weight) + product(partner_images, 1 - pixel_weight),
        product(probs, label_weight) + product(partner_probs, 1 - label_weight),
    )


def _transform(key: jax.Array, image: jax.Array, spec: Augmentation, fill: jax.Array) -> jax.Array:
    """Crops, flips and cuts out one image [height, width, channels]; returns float32."""
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if spec.crop_padding:
        image = _crop(crop_key, image, spec.crop_padding)
    if spec.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    image = image.astype(jnp.float32)
    if spec.cutout:
        image = _cutout(cutout_key, image, spec.cutout, fill)
    return image


def _crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def _cutout(key: jax.Array, image: jax.Array, side: int, fill: jax.Array) -> jax.Array:
    height, width = image.shape[:2]
    first = _random_pixel(key, height, width) - side // 2
    return jnp.where(_box(first, first + side, height, width)[..., None], fill, image)


def _mixing(key: jax.Array, height: int, width: int, spec: Augmentation) -> tuple[jax.Array, jax.Array]:
    """Returns what one image weighs against its partner: by pixel [height, width], and its label.

    CutMix as in the paper's algorithm: the box has sides sqrt(1 - Beta) of the image's, its centre
    is a random pixel, what lies outside is cut off, and the label weighs the area that is left.
    """
    choice_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 4)
    mixup, cutmix = spec.mixup_alpha > 0, spec.cutmix_alpha > 0
    if mixup:
        share = jax.random.beta(mixup_key, spec.mixup_alpha, spec.mixup_alpha)
        mixup_weights = jnp.full((height, width), share), share
    if cutmix:
        share = jax.random.beta(cutmix_key, spec.cutmix_alpha, spec.cutmix_alpha)
        sides = jnp.sqrt(1 - share) * jnp.array([height, width], jnp.float32)
        half = sides.astype(jnp.int32) // 2
        centre = _random_pixel(centre_key, height, width)
        kept = ~_box(centre - half, centre + half, height, width)
        cutmix_weights = kept.astype(jnp.float32), jnp.sum(kept) / (height * width)
    if mixup and cutmix:
        choice = jax.random.bernoulli(choice_key)
        return jax.tree.map(lambda a, b: jnp.where(choice, a, b), mixup_weights, cutmix_weights)
    return mixup_weights if mixup else cutmix_weights


def _random_pixel(key: jax.Array, height: int, width: int) -> jax.Array:
    return jax.random.randint(key, (2,), 0, jnp.array([height, width]))


def _box(first: jax.Array, end: jax.Array, height: int, width: int) -> jax.Array:
    """Returns bool [height, width]: the pixels from `first` [2] up to and without `end` [2]."""
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    rows = (first[0] <= row) & (row < end[0])
    return rows & (first[1] <= column) & (column < end[1])
