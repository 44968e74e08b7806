"""What part of a stored image is shown to the network, and at which size."""

import dataclasses
import math

import numpy as np

from qflax.errors import UserError, require

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """Random resized crops for training (Szegedy et al. 2015), central ones for evaluation.

    Attributes:
        image_size: side in pixels of the square images that the network gets.
        resize: what the shorter side is scaled to, in pixels, before the central crop of
            `image_size` in evaluation; `image_size` or more.
        area: least and greatest share of the image's area that a training crop covers, 0..1.
        ratio: least and greatest ratio of width to height of a training crop, before it is
            scaled to a square.

    Raises:
        UserError: if a field has the wrong type or lies outside of its range.
    """

    image_size: int = 224
    resize: int = 256
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        for name, least in (("image_size", 1), ("resize", self.image_size)):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(valid, f"crop.{name}={value!r}: must be a number of pixels, {least} or more")
        for name, most in (("area", 1), ("ratio", math.inf)):
            low, high = _numbers(name, getattr(self, name))
            require(
                0 < low <= high <= most and high < math.inf,
                f"crop.{name}={(low, high)}: must be (least, greatest), above 0 and "
                + ("at most 1" if most == 1 else "finite"),
            )
            object.__setattr__(self, name, (low, high))


def _numbers(name: str, value: object) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int | float) for x in pair):
        raise UserError(f"crop.{name}={value!r}: must be two numbers, (least, greatest)")
    return pair


def random_window(rng: np.random.Generator, width: int, height: int, crop: Crop) -> tuple[int, int, int, int]:
    """Draws the window of a training crop, as torchvision does.

    Its area is uniform in `crop.area`, the logarithm of its ratio uniform in `crop.ratio`, its place
    uniform. Where ten draws do not fit into the image it is the largest central window whose ratio
    lies in `crop.ratio`.

    Args:
        rng: what is drawn from.
        width: of the image, in pixels.
        height: of the image, in pixels.
        crop: what to draw.

    Returns:
        left, top, width and height of the window, in pixels; it lies in the image and is not empty.
    """
    (least, greatest), (low, high) = crop.area, crop.ratio
    for _ in range(_ATTEMPTS):
        share, shape, right, down = rng.random(4).tolist()
        area = width * height * (least + share * (greatest - least))
        ratio = low * (high / low) ** shape
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(right * (width - columns + 1)), int(down * (height - rows + 1)), columns, rows
    columns = max(1, min(width, round(height * high)))
    rows = max(1, min(height, round(width / low)))
    return (width - columns) // 2, (height - rows) // 2, columns, rows
