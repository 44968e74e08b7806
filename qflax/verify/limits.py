"""How much the operations of a network take, told from shapes before anything is computed."""

import math
from collections.abc import Sequence

import numpy as np

from qflax.untrusted import ELEMENTS

# Products of all nodes for all examples that a file asks for; a ResNet-152 for ImageNet takes 2^38 for two,
# the most that is allowed about a minute.
WORK = 2**39
_NODE, _ELEMENT, _DEPTH = 2**20, 2**7, 2**13  # What a node, an element, a term of a sum take, in products.
_SLOW = {  # Operations that take longer.
    "erf": 32,
    **dict.fromkeys(("exp", "log", "tanh", "logistic", "rsqrt", "sin", "cos"), 8),
    "quantize": 4,
}

# What fields of the wrong kind raise.
MALFORMED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError, RecursionError),
)

Shape = Sequence[int]


def cost(operation: str, shapes: Sequence[Shape], attributes: dict) -> tuple[int, int]:
    """Elements of the largest array that an operation makes at once, and its work.

    Raises:
      ValueError: for more than `ELEMENTS`, or where the shapes or attributes do not fit.
    """
    largest, work = _COSTS.get(operation, _elementwise)(*shapes, **attributes)
    if largest > ELEMENTS:
        raise ValueError(f"makes an array of more than {ELEMENTS:,} elements")
    return largest, _NODE + work * _SLOW.get(operation, 1)


def _elementwise(*shapes: Shape, **_) -> tuple[int, int]:
    size = math.prod(np.broadcast_shapes(*shapes))
    return size, _ELEMENT * size


def _conv(x: Shape, kernel: Shape, *, strides, padding, dilation, groups) -> tuple[int, int]:
    _require_whole(1, *strides, *dilation, groups)
    n, *size, channels = _images(x)
    *window, depth, features = _images(kernel)
    span = [(w - 1) * step + 1 for w, step in zip(window, dilation, strict=True)]
    padded, places = _places(size, span, strides, padding)
    terms = math.prod(window) * depth
    # The windows are copied for few examples at a time.
    windows = places * math.prod(window) * channels
    largest = max(n * padded * channels, n * places * features, windows)
    products = n * places * terms * features
    moved = n * (padded * channels + windows + places * features) + terms * features
    return largest, products + _ELEMENT * moved + _DEPTH * terms


def _dense(x: Shape, kernel: Shape) -> tuple[int, int]:
    if not x or not kernel:
        raise ValueError("a matrix product of numbers")
    lead = math.prod(np.broadcast_shapes(x[:-2], kernel[:-2]))
    size = lead * math.prod(x[-2:-1]) * (kernel[-1] if len(kernel) > 1 else 1)
    moved = size + math.prod(x) + math.prod(kernel)
    return size, x[-1] * size + _ELEMENT * moved + _DEPTH * x[-1]


def _pool(x: Shape, *, window, strides, padding) -> tuple[int, int]:
    _require_whole(1, *window, *strides)
    n, *size, channels = _images(x)
    padded, places = _places(size, window, strides, padding)
    largest = n * channels * max(padded, places)
    return largest, _ELEMENT * (largest + n * channels * places * math.prod(window))


def _images(shape: Shape) -> Shape:
    if len(shape) != 4:
        raise ValueError(f"{list(shape)} has not four axes")
    return shape


def _places(size: Shape, span: Shape, strides: Shape, padding) -> tuple[int, int]:
    """Elements of a padded image, and places of a window in it."""
    _require_whole(0, *(n for pair in padding for n in pair))
    size = [n + before + after for n, (before, after) in zip(size, padding, strict=True)]
    counts = [(n - w) // step + 1 for n, w, step in zip(size, span, strides, strict=True)]
    if min(counts) < 1:
        raise ValueError(f"the window {list(span)} is larger than the padded input {size}")
    return math.prod(size), math.prod(counts)


def _pad(x: Shape, *, padding) -> tuple[int, int]:
    _require_whole(0, *(n for pair in padding for n in pair))
    return _elementwise([n + before + after for n, (before, after) in zip(x, padding, strict=True)])


def _concatenate(*shapes: Shape, axis: int) -> tuple[int, int]:
    return _elementwise([sum(math.prod(shape) for shape in shapes)])


def _power(x: Shape, *, exponent: int) -> tuple[int, int]:
    size, work = _elementwise(x)
    return size, work * (1 + exponent.bit_length())


def _require_whole(least: int, *numbers: int) -> None:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{number!r} is no whole number of {least} or more")


_COSTS = {
    "conv": _conv,
    "dense": _dense,
    **dict.fromkeys(("max_pool", "sum_pool"), _pool),
    "pad": _pad,
    "concatenate": _concatenate,
    "power": _power,
}
