"""Observers: the exact range of a set of arrays that comes in parts, in memory that does not grow with it."""

import abc
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qflax.quantizers.statistics import (
    Statistic,
    asymmetric_squared_errors,
    divergences,
    fractions,
    histogram,
    one_sided_rank,
    range_of_mean,
    squared_errors,
    two_sided_ranks,
)

_DIGITS = (11, 11, 10)  # Of the 32 bits of a float, how many each pass for a percentile finds.
_SIGN = np.uint32(0x80000000)


@flax.struct.dataclass
class Observed:
    """What came into a quantizer.

    Attributes:
      x: array of any shape, channels last.
      statistic: how its range is chosen.
    """

    x: jax.Array
    statistic: Statistic = flax.struct.field(pytree_node=False)


class Observer(abc.ABC):
    """Chooses a range from the parts of a set, all of which it must see in each of its passes.

    What it keeps of them is on the host, where counts are int64 and sums float64; of one part alone, of less
    than 2^31 elements, they are int32 and float32.

    Attributes:
      done: whether no pass is left.
    """

    def __init__(self, statistic: Statistic):
        self.done = False
        self._statistic = statistic
        self._merge = np.add
        self._total, self._elements = None, 0  # Of this pass; elements of one row.
        self._nan = False  # Whether there is one, which may have a rank beyond the one sought.
        self._ends = None  # Lower and upper ends [2, rows].

    def update(self, x: jax.Array) -> None:
        """Sees one part, of any number of elements."""
        part = np.asarray(self._measure(x))
        part = part.astype(np.int64 if part.dtype.kind == "i" else np.float64)
        self._total = part if self._total is None else self._merge(self._total, part)
        self._elements += x.size // (x.shape[-1] if self._statistic.per_channel else 1)
        self._nan = self._nan or bool(jnp.isnan(x).any())

    def end_pass(self) -> None:
        """Takes notice that all parts were seen."""
        self.done = self._conclude(self._total)
        self._total, self._elements = None, 0

    def ends(self) -> dict[str, jax.Array]:
        """`x_max` and if asymmetric `x_min`, once done: float32 [] or [channels]; of NaN NaN."""
        ends = np.full_like(self._ends, np.nan) if self._nan else self._ends
        ends = ends if self._statistic.per_channel else ends[:, 0]
        x_min, x_max = jnp.asarray(ends, jnp.float32)
        return {"x_max": x_max} if self._statistic.symmetric else {"x_min": x_min, "x_max": x_max}

    @abc.abstractmethod
    def _measure(self, x: jax.Array) -> jax.Array:
        """Numbers of one part, of which `_merge` makes those of the set: float32 or int32."""

    @abc.abstractmethod
    def _conclude(self, total: np.ndarray) -> bool:
        """Takes from the set's numbers what is needed next; returns whether that is the range."""


class _Extremes(Observer):
    """The largest magnitude, or both extremes."""

    def __init__(self, statistic: Statistic):
        super().__init__(statistic)
        self._merge = np.maximum

    def _measure(self, x):
        return _extents(self._statistic, x)

    def _conclude(self, total):
        below, above = np.maximum(total, 0.0)
        self._ends = np.stack([0.0 - below, above])
        return True


class _Mean(Observer):
    """A multiple of the mean magnitude."""

    def _measure(self, x):
        return _sums(self._statistic, x)

    def _conclude(self, total):
        high = range_of_mean(total / self._elements, self._statistic.format)
        self._ends = np.stack([np.zeros_like(high), high])
        return True


class _Search(_Extremes):
    """The fraction of the extremes at the least cost: first the extremes, then what costs are made of."""

    def _measure(self, x):
        return super()._measure(x) if self._ends is None else self._evidence(x)

    def _conclude(self, total):
        if self._ends is None:
            self._merge = np.add
            return not super()._conclude(total)
        best = np.argmin(self._costs(total), axis=0)
        self._ends = self._ends * fractions()[best]
        return True

    @abc.abstractmethod
    def _evidence(self, x: jax.Array) -> jax.Array:
        """Numbers of one part that add up to those of the set."""

    @abc.abstractmethod
    def _costs(self, total: np.ndarray) -> np.ndarray:
        """Of each candidate [100, rows]."""


class _SquaredError(_Search):
    def _evidence(self, x):
        return _errors(self._statistic, x, self._ends)

    def _costs(self, total):
        return total


class _Divergence(_Search):
    def _evidence(self, x):
        return _histograms(self._statistic, x, self._ends)

    def _costs(self, total):
        return np.asarray(_divergences(self._statistic, total.astype(np.float32), self._ends))


class _Percentile(Observer):
    """Elements of given ranks, by radix selection.

    Each pass counts the next digits of the elements whose digits so far are those of the one sought: of
    floats mapped to integers of the same order.
    """

    def __init__(self, statistic: Statistic):
        super().__init__(statistic)
        self._widths = list(_DIGITS)  # In bits, of the digits to come.
        self._prefix = np.zeros((1, 1), np.uint32)  # The digits so far, as a number [ends, rows].
        self._rank = None  # Among the elements with this prefix [ends, rows]; 0 is the lowest.

    def _measure(self, x):
        shift, width = sum(self._widths[1:]), self._widths[0]
        return _digit_counts(self._statistic, x, self._prefix, shift=shift, width=width)

    def _conclude(self, total):
        if self._rank is None:
            self._rank = np.array(self._ranks(self._elements))[:, None]
        # Where passes differ in the last bits, an element may have left its digit.
        rank = np.minimum(self._rank, np.sum(total, axis=-1) - 1)
        digit = np.sum(np.cumsum(total, axis=-1) <= rank[..., None], axis=-1)
        lower = np.arange(total.shape[-1]) < digit[..., None]
        self._rank = rank - np.sum(total * lower, axis=-1)
        self._prefix = self._prefix << self._widths.pop(0) | digit.astype(np.uint32)
        if self._widths:
            return False
        found = _floats(self._prefix)
        self._ends = np.stack([np.minimum(found[0], 0.0), np.maximum(found[-1], 0.0)])
        return True

    def _ranks(self, n: int) -> tuple[int, ...]:
        if self._statistic.symmetric:
            return (one_sided_rank(self._statistic.percentile, n),)
        return two_sided_ranks(self._statistic.percentile, n)


_OBSERVERS = {
    "absmax": _Extremes,
    "percentile": _Percentile,
    "mse": _SquaredError,
    "kl": _Divergence,
    "mean": _Mean,
}


def observer_of(statistic: Statistic) -> Observer:
    """The observer that finds the range of `statistic`."""
    return _OBSERVERS[statistic.kind](statistic)


@jax.jit
def _extents(statistic, x):
    rows = statistic.rows(x)
    return jnp.stack([jnp.max(-rows, axis=1), jnp.max(rows, axis=1)])


@jax.jit
def _sums(statistic, x):
    return jnp.sum(statistic.rows(x), axis=1)


@jax.jit
def _errors(statistic, x, ends):
    rows, fmt = statistic.rows(x), statistic.format
    if statistic.symmetric:
        return squared_errors(rows, ends[1], fmt)
    return asymmetric_squared_errors(rows[0], ends[0, 0], ends[1, 0], fmt)[:, None]


@jax.jit
def _histograms(statistic, x, ends):
    return histogram(statistic.rows(x), ends[1])


@jax.jit
def _divergences(statistic, histograms, ends):
    return divergences(histograms, ends[1], statistic.format)


@functools.partial(jax.jit, static_argnames=("shift", "width"))
def _digit_counts(statistic, x, prefixes, *, shift, width):
    """Counts of the next digits of the elements with each prefix [ends, rows]: [ends, rows, 2^width]."""
    bits = jax.lax.bitcast_convert_type(statistic.rows(x), jnp.uint32)
    keys = jnp.where(bits & _SIGN, ~bits, bits | _SIGN)  # In the order of the floats.
    places = keys >> shift & (2**width - 1)
    places = places.astype(jnp.int32) + 2**width * jnp.arange(len(keys))[:, None]
    size = 2**width * len(keys)

    def count(prefix):
        # In two steps, because the first digit leaves nothing before it.
        belongs = keys >> shift >> width == prefix[:, None]
        return jnp.zeros(size, jnp.int32).at[jnp.where(belongs, places, size)].add(1, mode="drop")

    return jax.lax.map(count, prefixes).reshape(len(prefixes), len(keys), -1)


def _floats(keys: np.ndarray) -> np.ndarray:
    """Inverse of the mapping to keys."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float32)
