"""Learned rounding: every weight chooses between the two points of its grid next to it.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound), section 3.
"""

import jax
import jax.numpy as jnp

from qflax.numerics import IntegerFormat, MinifloatEstimator, MinifloatFormat, quotient
from qflax.quantizers import QuantizedArray

# The sigmoid is stretched beyond 0 and 1 and clipped, so that a choice can be made for good (eq. 23).
_LOW, _HIGH = -0.1, 1.1


def neighbours(x: jax.Array, grid: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """The points of a grid next to `x`, below and above; both the last one beyond its ends.

    Args:
      x: float32 array.
      grid: of integers of any kind or minifloats, symmetric.
    """
    fmt, scale = grid.format, grid.scale
    if isinstance(fmt, MinifloatFormat):
        floor, ceil = (MinifloatEstimator(rounding=mode) for mode in ("floor", "ceil"))
        return fmt.fake_quant(x, scale, estimator=floor), fmt.fake_quant(x, scale, estimator=ceil)
    if isinstance(fmt, IntegerFormat) and fmt.bipolar:
        return jnp.broadcast_to(-scale, x.shape), jnp.broadcast_to(scale, x.shape)
    low = jnp.floor(quotient(x, scale))
    return tuple(jnp.clip(code, fmt.lowest, fmt.highest) * scale for code in (low, low + 1))


def initial_choice(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The variables V with which `soft_value` is `x` itself."""
    gap = high - low
    share = jnp.where(gap > 0, (x - low) / jnp.where(gap > 0, gap, 1.0), 0.5)
    share = jnp.clip(share, 0.01, 0.99)  # Of weights beyond the grid, too: they have no choice.
    return -jnp.log((_HIGH - _LOW) / (share - _LOW) - 1)


def up(choice: jax.Array) -> jax.Array:
    """h(V) in [0, 1], 1 for the upper neighbour (eq. 23)."""
    return jnp.clip(jax.nn.sigmoid(choice) * (_HIGH - _LOW) + _LOW, 0.0, 1.0)


def soft_value(choice: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Values between the neighbours, as far up as `choice` has it."""
    return low + (high - low) * up(choice)


def hard_value(choice: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The neighbour that is nearer to `soft_value`."""
    return jnp.where(up(choice) >= 0.5, high, low)


def indecision(choice: jax.Array, sharpness: jax.Array) -> jax.Array:
    """The regularizer sum(1 - abs(2 h(V) - 1)^beta), 0 where every choice is made (eq. 24)."""
    distance = jnp.abs(2 * up(choice) - 1)
    return jnp.sum(1 - jnp.maximum(distance, 1e-6) ** sharpness)
