"""The 1,797 handwritten digits that scikit-learn carries, enlarged to 32x32 colour images."""

import numpy as np
from sklearn import datasets

_TEST_STRIDE = 5  # Every fifth of 1,797 examples: 360 for the test, 1,437 for training.
_SCALE = 4  # 8x8 -> 32x32 pixels.
_STORED_MAX = 16  # Stored intensities are 0..16.


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a split, the same at every call.

    The examples are put into one fixed random order, so that the digits and the writers (who
    follow each other in the stored file) are mixed. Of the examples sorted by class every fifth
    is for the test: the share of each class differs by less than one example.

    Args:
        split: 'train' (1,437 examples) or 'test' (360).

    Returns:
        images uint8 [examples, 32, 32, 3] and labels int32 [examples].
    """
    stored = datasets.load_digits()
    # NumPy promises that RandomState's stream never changes; that of default_rng may.
    order = np.random.RandomState(0).permutation(len(stored.target))
    by_class = np.argsort(stored.target[order], kind="stable")
    is_test = np.zeros(len(order), bool)
    is_test[by_class[::_TEST_STRIDE]] = True
    chosen = order[is_test if split == "test" else ~is_test]
    return enlarge(stored.images[chosen]), stored.target[chosen].astype(np.int32)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Enlarges grey images four times with bilinear interpolation, in exact integer arithmetic.

    Pixel centres are at half integers, and the border pixels continue outside. Bilinear, because
    nearest-neighbour blocks of 4x4 equal pixels would give 3x3 convolutions nothing to see but
    block edges.

    Args:
        images: [examples, height, width], integers 0..16 of any dtype.

    Returns:
        uint8 [examples, 4 * height, 4 * width, 3], values 0..255, three equal channels.
    """
    rows = _interpolation(images.shape[1])
    columns = _interpolation(images.shape[2])
    enlarged = rows @ images.astype(np.int64) @ columns.T
    unit = _STORED_MAX * (2 * _SCALE) ** 2
    grey = (enlarged * 255 + unit // 2) // unit
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def _interpolation(size: int) -> np.ndarray:
    """Returns int64 [4 * size, size]: bilinear weights in eighths, each row summing to 8."""
    weights = np.zeros((_SCALE * size, size), np.int64)
    for target in range(_SCALE * size):
        # Source coordinate (target + 1/2) / 4 - 1/2 as a whole part and eighths.
        low, eighths = divmod(2 * target + 1 - _SCALE, 2 * _SCALE)
        weights[target, max(low, 0)] += 2 * _SCALE - eighths
        weights[target, min(low + 1, size - 1)] += eighths
    return weights
