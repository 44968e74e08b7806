"""Weights and images that are a function of their names, so that no file has to hold them."""

import math
import zlib
from collections.abc import Mapping

import numpy as np

# Residual branches add little, so that activations stay small at any depth.
_BRANCH_NORMS = ("bn2.weight", "bn3.weight")


def uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Float32 numbers between bounds that depend on the name; bit generators keep their streams for good."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (low + (high - low) * ((raw >> np.uint64(40)) / 2.0**24)).astype(np.float32).reshape(shape)


def images(size: int) -> np.ndarray:
    """Two images [2, 3, size, size], as torch has them."""
    return uniform("images", (2, 3, size, size), -2, 2)


def state_dict(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A ResNet's state dict with torchvision's names and shapes."""
    return {name: _array(name, tuple(shape)) for name, shape in shapes.items()}


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(0, np.int64)
    if len(shape) > 1:  # Keeps the mean square of activations.
        bound = math.sqrt(3 / math.prod(shape[1:]))
        return uniform(name, shape, -bound, bound)
    low, high = {"weight": (0.5, 1.5), "running_var": (0.5, 1.5)}.get(name.rpartition(".")[2], (-0.3, 0.3))
    return uniform(name, shape, low, high) * np.float32(0.5 if name.endswith(_BRANCH_NORMS) else 1)
