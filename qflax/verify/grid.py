"""Values that are integers behind a scale, and how what broadcasts against values follows their layout."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from qflax.verify.executor import EXACT_FLOAT32
from qflax.verify.formats import Format, IntegerFormat

# Up to here an integer times a scale, in float32, is rounded to no neighbour's product, a few times over.
_SURE = 2**22
_ROUNDED = 1e-6  # Relative, of a scale: some roundings of float32.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Values that are `scale` times integers.

    Attributes:
      low, high: least and greatest integer; infinite where all that is known is that they are whole.
      scale: positive float64 that broadcasts against the values, of as many axes.
      bits: of the integers where a quantizer made them, else None.
      channels: which output channel of a layer each value is the sum of, as `Analysis` numbers them, before
        anything but constants was added; -1 where none. It broadcasts like the scale. None: none anywhere.
    """

    low: int | float
    high: int | float
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.float64(1))
    bits: int | None = None
    channels: np.ndarray | None = None

    @property
    def uniform(self) -> bool:
        """Whether there is one scale for all values."""
        return self.scale.size == 1

    @property
    def bounded(self) -> bool:
        """Whether the range is known."""
        return max(-self.low, self.high) < math.inf

    @property
    def plain(self) -> bool:
        """Whether the values are the integers themselves."""
        return bool(np.all(self.scale == 1))

    @property
    def exact(self) -> bool:
        """Whether float32 holds all of the values, being integers."""
        return self.plain and max(-self.low, self.high) <= EXACT_FLOAT32

    def shares_scale_with(self, other: "Grid") -> bool:
        """Whether both have the same scale, but for what float32 makes of it for integers of this size."""
        if self.plain or other.plain:
            return self.plain and other.plain
        difference = np.max(np.abs(self.scale / other.scale - 1))
        largest = max(-self.low, self.high, -other.low, other.high)
        return bool(difference == 0 or difference <= _ROUNDED and difference * largest < 0.25)

    def rounded(self) -> "Grid":
        """With room for what float32 rounds such numbers to."""
        if not self.bounded or max(-self.low, self.high) <= _SURE:
            return self
        if not self.plain:
            return self.blurred()
        return dataclasses.replace(self, low=-_float32_from(-self.low), high=_float32_from(self.high))

    def blurred(self) -> "Grid":
        """With room for some roundings of what is behind a scale."""
        if not self.bounded or max(-self.low, self.high) <= _SURE:
            return self
        low, high = (abs(end) // _SURE + 1 for end in (self.low, self.high))
        return dataclasses.replace(self, low=self.low - low, high=self.high + high)

    def within(self, low: int, high: int) -> "Grid":
        """Values that were made of these, on the same grid; without what only these are."""
        return Grid(low=low, high=high, scale=self.scale)

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Grid":
        """The same integers elsewhere: `move` takes an array that broadcasts against the values with them."""
        channels = None if self.channels is None else move(self.channels)
        return dataclasses.replace(self, scale=move(self.scale), channels=channels)


def _float32_from(integer: int) -> int:
    """The least float32 number that is not below it."""
    nearest = np.float32(integer)
    return int(nearest if int(nearest) >= integer else np.nextafter(nearest, np.float32(np.inf)))


WHOLE = Grid(low=-math.inf, high=math.inf)


def constant_grid(array: np.ndarray, fmt: Format | None = None) -> Grid | None:
    """Of a constant of integers, or of whole numbers."""
    bits = fmt.bits if isinstance(fmt, IntegerFormat) else None
    if not array.size or bits is None and (fmt is not None or not whole(array)):
        return None
    return Grid(low=int(array.min()), high=int(array.max()), bits=bits)


def whole(array: np.ndarray) -> bool:
    """Whether all are numbers without a fraction."""
    return bool(np.isfinite(array).all() and np.array_equal(array, np.rint(array)))


def aligned(array: np.ndarray, ndim: int) -> np.ndarray:
    """With axes of size 1 in front, as broadcasting would."""
    array = np.asarray(array)
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def varies(array: np.ndarray, axes: Sequence[int]) -> bool:
    """Whether what broadcasts against values differs along some of their axes."""
    return any(array.shape[axis] > 1 for axis in axes)


def reshaped(array: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """What broadcasts against values of the shape `after` as `array` does against them in `before`.

    Axes along which nothing varies are of size 1 again, if reshaping leaves that to be seen.
    """
    array = np.broadcast_to(array, before).reshape(after)
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


def joined(arrays: Sequence[np.ndarray], shapes: Sequence[Sequence[int]], axis: int) -> np.ndarray:
    """What broadcasts against values of these shapes concatenated as `arrays` do against the parts."""

    def full(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        kept = [i == axis or any(varies(other, (i,)) for other in arrays) for i in range(len(shape))]
        return np.broadcast_to(array, [n if keep else 1 for n, keep in zip(shape, kept, strict=True)])

    return np.concatenate([full(*pair) for pair in zip(arrays, shapes, strict=True)], axis)


def nearly_whole(quotients: np.ndarray) -> np.ndarray:
    """Which ones are multiples of their divisor, but for rounding."""
    codes = np.rint(quotients)
    return np.abs(quotients - codes) <= 1e-3 + 1e-6 * np.abs(codes)
