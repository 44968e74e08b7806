"""Decoding of compressed images to the crops that training and evaluation see."""

import io
import math

import cv2
import numpy as np
from PIL import Image

from qflax.data.crop import Crop, random_window

# Images are decoded in parallel already; OpenCV's own threads would only get in the way.
cv2.setNumThreads(0)

_MOST_PIXELS = 2**28  # Of an image whose sides differ much, once the shorter one is enlarged.
_END_OF_IMAGE = b"\xff\xd9"
# What libjpeg can shrink an image by while it decodes it.
_SHRUNK = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode_training(data: bytes, rng: np.random.Generator, crop: Crop) -> np.ndarray:
    """Decodes a random window and scales it to a square; it is not mirrored.

    Shrinking is antialiased. A window of twice the size or more is rounded outwards to a multiple of
    the 2, 4 or 8 pixels that libjpeg makes one of.

    Args:
        data: an image in JPEG, PNG or another format that Pillow knows, of any colour mode.
        rng: what the window is drawn from.
        crop: size of the result and distribution of the windows.

    Returns:
        uint8 [crop.image_size, crop.image_size, 3], RGB.

    Raises:
        OSError, SyntaxError or ValueError: if the image is damaged or truncated.
    """
    image = Image.open(io.BytesIO(data))  # Reads the header only.
    left, top, width, height = random_window(rng, *image.size, crop)
    fitting = (shrink for shrink in _SHRUNK if shrink * crop.image_size <= min(width, height))
    shrink = max(fitting, default=1)
    pixels = _pixels(image, data, shrink)
    window = pixels[
        top // shrink : math.ceil((top + height) / shrink),
        left // shrink : math.ceil((left + width) / shrink),
    ]
    window = _scale(window, crop.image_size)
    return window if window.ndim == 3 else cv2.cvtColor(window, cv2.COLOR_GRAY2RGB)


def decode_evaluation(data: bytes, crop: Crop) -> np.ndarray:
    """Scales the shorter side to `crop.resize` and takes the central `crop.image_size` square.

    The result is that of torchvision's Resize and CenterCrop on Pillow's images.

    Args:
        data: as of `decode_training`.
        crop: the two sizes.

    Returns:
        uint8 [crop.image_size, crop.image_size, 3], RGB.

    Raises:
        OSError, SyntaxError or ValueError: if the image is damaged or truncated.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    shorter = min(image.size)
    width, height = (crop.resize * side // shorter for side in image.size)
    if width * height > _MOST_PIXELS:
        raise ValueError(f"sides of {image.size[0]} and {image.size[1]} pixels differ too much")
    left, top = (round((side - crop.image_size) / 2) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image.crop((left, top, left + crop.image_size, top + crop.image_size)))


def _pixels(image: Image.Image, data: bytes, shrink: int) -> np.ndarray:
    """Returns uint8 [height, width, 3], or [height, width] if grey, with sides 1/shrink, rounded up."""
    complete = data.rfind(_END_OF_IMAGE, image.fp.tell()) >= 0
    if image.format == "JPEG" and image.mode in ("L", "RGB") and complete:
        flags = _SHRUNK[shrink] | cv2.IMREAD_IGNORE_ORIENTATION
        if image.mode == "RGB":
            flags |= cv2.IMREAD_COLOR_RGB
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is not None:
            return pixels
    # Pillow is slower, but it knows every format and tells damage, at which OpenCV only warns.
    return np.asarray(image.convert("RGB").reduce(shrink))


def _scale(image: np.ndarray, size: int) -> np.ndarray:
    """Scales [height, width, ...] to [size, size, ...], antialiased.

    Both sides are enlarged bilinearly to the least whole multiple of `size` that holds the image, of
    which whole blocks are averaged. This is much faster than filters of the exact width, and nearer
    to a triangle filter than averages of the exact width are.
    """
    enlarged = size * math.ceil(max(image.shape[:2]) / size)
    image = cv2.resize(image, (enlarged, enlarged), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
