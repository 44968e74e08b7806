"""Statistics that choose the range of a uniform quantizer from data."""

import math

import jax
import jax.numpy as jnp

from qflax.numerics import IntegerFormat

STATISTICS_KINDS = ("absmax", "percentile", "mse", "kl", "mean")

_MSE_CANDIDATES = 100
_KL_BINS = 2048
_KL_CANDIDATES = 100
SMALLEST_RANGE = 1e-10


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
    x = x.astype(jnp.float32)
    magnitude = jnp.abs(x) if fmt.signed else jnp.maximum(x, 0.0)
    rows = magnitude.reshape(-1, magnitude.shape[-1]).T if per_channel else magnitude.reshape(1, -1)
    if kind == "absmax":
        ranges = jnp.max(rows, axis=1)
    elif kind == "percentile":
        ranges = jax.lax.stop_gradient(_percentile(rows, percentile))
    elif kind == "mean":
        mean = jnp.mean(rows, axis=1)
        ranges = jax.lax.stop_gradient(2 * mean / math.sqrt(fmt.highest) * fmt.threshold)
    else:
        divergence = _squared_error if kind == "mse" else _kl_divergence
        count = _MSE_CANDIDATES if kind == "mse" else _KL_CANDIDATES
        ranges = _search(jax.lax.stop_gradient(rows), fmt, divergence, count)
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
        n, tail = x.size, (100 - percentile) / 2
        first = max(math.ceil(0.01 * tail * n), 1) - 1
        last = min(math.floor(0.01 * (100 - tail) * n + 0.5), n) - 1
        ordered = jnp.sort(x)
        low, high = ordered[first], ordered[last]
    else:
        low, high = jnp.min(x), jnp.max(x)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if kind != "mse":
        return low, high

    def error(fraction):
        scale = jnp.maximum((high - low) * fraction, SMALLEST_RANGE) / (fmt.num_codes - 1)
        zero_point = jnp.clip(jnp.round(fmt.lowest - low * fraction / scale), fmt.lowest, fmt.highest)
        return jnp.sum((fmt.fake_quant(x, scale, zero_point) - x) ** 2)

    fractions = jnp.arange(1, _MSE_CANDIDATES + 1) / _MSE_CANDIDATES
    best = fractions[jnp.argmin(jax.lax.map(error, fractions))]
    return low * best, high * best


def _percentile(rows: jax.Array, percentile: float) -> jax.Array:
    n = rows.shape[1]
    rank = min(max(math.floor(0.01 * percentile * n + 0.5), 1), n)  # 1 is the smallest.
    return jax.lax.top_k(rows, n - rank + 1)[0][:, -1]


def _search(rows, fmt, divergence, count) -> jax.Array:
    """The fraction of each row's maximum with the least divergence from the data, times it."""
    largest = jnp.maximum(jnp.max(rows, axis=1), SMALLEST_RANGE)
    fractions = jnp.arange(1, count + 1, dtype=jnp.float32) / count
    costs = jax.lax.map(lambda fraction: divergence(rows, largest * fraction, fmt), fractions)
    return largest * fractions[jnp.argmin(costs, axis=0)]


def _squared_error(rows, ranges, fmt) -> jax.Array:
    # The rows hold magnitudes; bipolar and full-range formats are judged on their positive half.
    scale = (ranges / fmt.threshold)[:, None]
    return jnp.sum((fmt.fake_quant(rows, scale) - rows) ** 2, axis=1)


def _kl_divergence(rows, ranges, fmt) -> jax.Array:
    """KL(P || Q): P the clipped histogram of magnitudes, Q the same through the quantizer's bins."""
    levels = max(fmt.highest, 1)

    def one(row, limit):
        width = jnp.max(row) / _KL_BINS + SMALLEST_RANGE
        bins = jnp.clip((row / width).astype(jnp.int32), 0, _KL_BINS - 1)
        histogram = jnp.zeros(_KL_BINS).at[bins].add(1.0)
        centres = (jnp.arange(_KL_BINS) + 0.5) * width
        inside = centres <= limit
        reference = jnp.where(inside, histogram, 0.0)
        # Outliers are counted where clipping puts them, in the last bin inside.
        last = jnp.maximum(jnp.sum(inside) - 1, 0)
        reference = reference.at[last].add(jnp.sum(jnp.where(inside, 0.0, histogram)))
        level = jnp.clip(jnp.round(centres / limit * levels).astype(jnp.int32), 0, levels)
        kept = jnp.where(inside, histogram, 0.0)
        occupied = (kept > 0).astype(jnp.float32)
        mass = jnp.zeros(levels + 1).at[level].add(kept)
        share = jnp.zeros(levels + 1).at[level].add(occupied)
        model = jnp.where(occupied > 0, (mass / jnp.maximum(share, 1.0))[level], 0.0)
        p = reference / jnp.sum(reference)
        q = jnp.maximum(model / jnp.maximum(jnp.sum(model), 1.0), 1e-9)
        return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30) / q), 0.0))

    return jax.lax.map(lambda pair: one(*pair), (rows, ranges))
