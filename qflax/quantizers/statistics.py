"""Statistics that choose the range of a uniform quantizer from data."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qflax.numerics import IntegerFormat, MinifloatFormat, product, quotient, total, vary_alike

STATISTICS_KINDS = ("absmax", "percentile", "mse", "kl", "mean")

_CANDIDATES = 100
_KL_BINS = 2048
_SAMPLE = 2**17  # Elements.
_BLOCK = 2**15  # Elements that a core's cache holds beside what is computed from them.
SMALLEST_RANGE = 1e-10


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic:
    """How a quantizer chooses its range, see `symmetric_range` and `asymmetric_range`.

    Attributes:
      kind: one of `STATISTICS_KINDS`.
      format: the format that the range will be divided into.
      symmetric: whether the range is one number, its end on both sides.
      per_channel: one range for each element of the last axis instead of one in all.
      percentile: in percent, for `percentile`.
    """

    kind: str
    format: IntegerFormat | MinifloatFormat
    symmetric: bool
    per_channel: bool
    percentile: float

    def rows(self, x: jax.Array) -> jax.Array:
        """What the range is chosen from, float32 [rows, elements]: magnitudes, or if asymmetric `x`."""
        if self.symmetric:
            return magnitudes(x, self.format, self.per_channel)
        return x.astype(jnp.float32).reshape(1, -1)

    def sample(self, x: jax.Array) -> jax.Array:
        """What of activations [..., channels] their range is chosen from: [positions, channels].

        All of them for `absmax` and `mean`. The other kinds pass over them many times, or sort them: at most
        about 2^17 elements, at positions as far from each other.
        """
        x = x.reshape(-1, x.shape[-1])
        if self.kind in ("absmax", "mean"):
            return x
        # Sizes of images are often powers of two, of which an odd stride visits all columns and rows.
        return x[:: math.ceil(x.size / _SAMPLE) | 1]

    @functools.partial(jax.jit, static_argnums=0)  # Traced once for all quantizers that see the same shape.
    def range_of(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """Lower end, which a symmetric range has none, and upper end: float32 [] or [channels]."""
        options = {"percentile": self.percentile}
        if self.symmetric:
            return None, symmetric_range(x, self.kind, self.format, per_channel=self.per_channel, **options)
        return asymmetric_range(x, self.kind, self.format, **options)


def symmetric_range(
    x: jax.Array, kind: str, fmt: IntegerFormat, *, per_channel: bool = False, percentile: float
) -> jax.Array:
    """Largest magnitude that the quantizer should represent.

    | kind       | range                                                                            |
    |------------|----------------------------------------------------------------------------------|
    | absmax     | max abs(x); the only one that passes a gradient to x                             |
    | percentile | k-th smallest abs(x), k = floor(percentile/100 n + 1/2) (Brevitas)               |
    | mse        | least squared error over 100 fractions of absmax                                 |
    | kl         | least Kullback-Leibler divergence of histograms (Migacz 2017), over 100 fractions |
    | mean       | 2 mean abs(x) / sqrt(highest code), times the threshold (LSQ's initial scale)    |

    Args:
      x: any shape, channels last. For an unsigned format negative elements count as 0.
      kind: one of `STATISTICS_KINDS`.
      fmt: the format that the range will be divided into.
      per_channel: one range for each element of the last axis instead of one in all.
      percentile: in percent, for `percentile`.

    Returns:
      float32 [] or [channels].
    """
    rows = magnitudes(x, fmt, per_channel)
    if kind == "absmax":
        ranges = jnp.max(rows, axis=1)
    elif kind == "percentile":
        ranges = jax.lax.stop_gradient(_percentile(rows, percentile))
    elif kind == "mean":
        ranges = jax.lax.stop_gradient(range_of_mean(quotient(total(rows.T), rows.shape[1]), fmt))
    else:
        rows = jax.lax.stop_gradient(rows)
        largest = jnp.max(rows, axis=1)
        if kind == "mse":
            costs = squared_errors(rows, largest, fmt)
        else:
            costs = divergences(histogram(rows, largest), largest, fmt)
        best = jnp.asarray(fractions())[jnp.argmin(costs, axis=0)]
        ranges = product(jnp.maximum(largest, SMALLEST_RANGE), best)
    return ranges if per_channel else ranges[0]


def asymmetric_range(
    x: jax.Array, kind: str, fmt: IntegerFormat, *, percentile: float
) -> tuple[jax.Array, jax.Array]:
    """Lower and upper end of a per-tensor range that contains zero: float32 scalars.

    `absmax` takes the extremes; `percentile` clips (100 - percentile)/2 percent on either side, as
    ranks of the sorted data; `mse` shrinks both extremes by the fraction of least squared error.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32).reshape(-1))
    if kind == "percentile":
        first, last = two_sided_ranks(percentile, x.size)
        ordered = jnp.sort(x)
        low, high = ordered[first], ordered[last]
    else:
        low, high = jnp.min(x), jnp.max(x)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if kind != "mse":
        return low, high
    best = jnp.asarray(fractions())[jnp.argmin(asymmetric_squared_errors(x, low, high, fmt))]
    return product(low, best), product(high, best)


def magnitudes(x: jax.Array, fmt: IntegerFormat, per_channel: bool) -> jax.Array:
    """What symmetric ranges are chosen from: float32 [1 or channels, elements], not negative."""
    x = x.astype(jnp.float32)
    magnitude = jnp.abs(x) if fmt.signed else jnp.maximum(x, 0.0)
    return magnitude.reshape(-1, magnitude.shape[-1]).T if per_channel else magnitude.reshape(1, -1)


def one_sided_rank(percentile: float, n: int) -> int:
    """Place of the percentile among `n` sorted magnitudes; 0 is the smallest."""
    return min(max(math.floor(0.01 * percentile * n + 0.5), 1), n) - 1


def two_sided_ranks(percentile: float, n: int) -> tuple[int, int]:
    """Places of the ends of the middle `percentile` percent among `n` sorted elements; 0 is the lowest."""
    tail = (100 - percentile) / 2
    first = max(math.ceil(0.01 * tail * n), 1) - 1
    last = min(math.floor(0.01 * (100 - tail) * n + 0.5), n) - 1
    return first, last


def range_of_mean(mean: jax.Array, fmt: IntegerFormat) -> jax.Array:
    """The range of `mean` from the mean magnitude."""
    return product(quotient(2 * mean, np.float32(math.sqrt(fmt.highest))), fmt.threshold)


def fractions() -> np.ndarray:
    """The candidates of `mse` and `kl`, as fractions of the largest magnitude: float32 [100]."""
    return np.arange(1, _CANDIDATES + 1, dtype=np.float32) / np.float32(_CANDIDATES)


def squared_errors(rows: jax.Array, largest: jax.Array, fmt: IntegerFormat) -> jax.Array:
    """Of every candidate the squared error summed over each row: [100, rows].

    Args:
      rows: magnitudes [rows, elements]; bipolar and full-range formats are judged on their positive half.
      largest: of the rows [rows], or of what they are a part of.
      fmt: the format that the ranges will be divided into.
    """
    largest = jnp.maximum(largest, SMALLEST_RANGE)

    def error(part, fraction):
        scale = (largest * fraction / fmt.threshold)[:, None]
        return jnp.sum((fmt.fake_quant(part, scale) - part) ** 2, axis=1)

    return _of_candidates(error, rows)


def asymmetric_squared_errors(x: jax.Array, low: jax.Array, high: jax.Array, fmt: IntegerFormat) -> jax.Array:
    """Of every candidate, a fraction of both ends, the squared error summed over `x` [elements]: [100]."""

    def error(part, fraction):
        scale = jnp.maximum((high - low) * fraction, SMALLEST_RANGE) / (fmt.num_codes - 1)
        zero_point = jnp.clip(jnp.round(fmt.lowest - low * fraction / scale), fmt.lowest, fmt.highest)
        return jnp.sum((fmt.fake_quant(part, scale, zero_point) - part) ** 2, axis=1)

    return _of_candidates(error, x[None])[:, 0]


def _of_candidates(error: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """Sums `error` [rows] of parts of `rows` [rows, elements] for every candidate: [100, rows].

    Part by part, which is twice as fast as candidate by candidate on a CPU. What is filled up with zeros has
    no error.
    """
    count, size = rows.shape
    width = min(max(_BLOCK // count, 1), size)
    parts = jnp.pad(rows, ((0, 0), (0, -size % width))).reshape(count, -1, width).swapaxes(0, 1)

    def add(sums, part):
        return sums + jax.lax.map(functools.partial(error, part), fractions()), None

    nothing, _ = vary_alike(jnp.zeros((_CANDIDATES, count)), rows)
    return jax.lax.scan(add, nothing, parts)[0]


def histogram(rows: jax.Array, largest: jax.Array) -> jax.Array:
    """Counts of the magnitudes `rows` in 2048 bins from 0 to `largest` [rows]: int32 [rows, bins]."""

    def one(row, width):
        bins = jnp.clip((row / width).astype(jnp.int32), 0, _KL_BINS - 1)
        return jnp.zeros(_KL_BINS, jnp.int32).at[bins].add(1)

    return jax.lax.map(lambda pair: one(*pair), (rows, _bin_width(largest)))


def divergences(histograms: jax.Array, largest: jax.Array, fmt: IntegerFormat) -> jax.Array:
    """Of every candidate KL(P || Q) for each row: [100, rows].

    P is the clipped histogram of magnitudes, Q the same through the quantizer's bins. The bin at zero counts
    as its neighbour: what a ReLU has made zero, any range represents.

    Args:
      histograms: counts [rows, 2048], of any dtype.
      largest: upper ends of the histograms [rows].
      fmt: the format that the ranges will be divided into.
    """
    widths, levels = _bin_width(largest), max(fmt.highest, 1)

    def of_rows(fraction):
        limits = jnp.maximum(largest, SMALLEST_RANGE) * fraction
        rows = histograms.astype(jnp.float32), widths, limits
        return jax.lax.map(lambda row: _divergence(*row, levels), rows)

    return jax.lax.map(of_rows, fractions())


def _divergence(counts: jax.Array, width: jax.Array, limit: jax.Array, levels: int) -> jax.Array:
    counts = counts.at[0].set(counts[1])
    centres = (jnp.arange(_KL_BINS) + 0.5) * width
    inside = centres <= limit
    reference = jnp.where(inside, counts, 0.0)
    # Outliers are counted where clipping puts them, in the last bin inside.
    last = jnp.maximum(jnp.sum(inside) - 1, 0)
    reference = reference.at[last].add(jnp.sum(jnp.where(inside, 0.0, counts)))
    level = jnp.clip(jnp.round(centres / limit * levels).astype(jnp.int32), 0, levels)
    kept = jnp.where(inside, counts, 0.0)
    occupied = (kept > 0).astype(jnp.float32)
    mass = jnp.zeros(levels + 1).at[level].add(kept)
    share = jnp.zeros(levels + 1).at[level].add(occupied)
    model = jnp.where(occupied > 0, (mass / jnp.maximum(share, 1.0))[level], 0.0)
    p = reference / jnp.maximum(jnp.sum(reference), 1.0)
    q = jnp.maximum(model / jnp.maximum(jnp.sum(model), 1.0), 1e-9)
    return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30) / q), 0.0))


def _bin_width(largest: jax.Array) -> jax.Array:
    return largest / _KL_BINS + SMALLEST_RANGE


def _percentile(rows: jax.Array, percentile: float) -> jax.Array:
    n = rows.shape[1]
    return jax.lax.top_k(rows, n - one_sided_rank(percentile, n))[0][:, -1]
