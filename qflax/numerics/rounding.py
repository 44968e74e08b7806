"""Rounding of real numbers to integers."""

import jax
import jax.numpy as jnp

_DETERMINISTIC = {
    "half_even": jnp.round,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "toward_zero": jnp.trunc,
}

ROUNDING_MODES = (*_DETERMINISTIC, "stochastic")


def round_to_integer(x: jax.Array, mode: str = "half_even", key: jax.Array | None = None) -> jax.Array:
    """Rounds every element to an integer, kept in the dtype of `x`.

    | mode        |  2.5 | -2.5 |  1.2 | -1.2 |
    |-------------|------|------|------|------|
    | half_even   |    2 |   -2 |    1 |   -1 |
    | floor       |    2 |   -3 |    1 |   -2 |
    | ceil        |    3 |   -2 |    2 |   -1 |
    | toward_zero |    2 |   -2 |    1 |   -1 |

    `stochastic` rounds up with the probability of the fractional part, so that its mean is `x` and
    integers stay (Gupta et al. 2015, section 3); without a key it is `half_even`, which is what
    evaluation and export use.

    Args:
      x: floating-point array of any shape.
      mode: one of `ROUNDING_MODES`.
      key: random key, read by `stochastic` only.
    """
    if mode != "stochastic":
        return _DETERMINISTIC[mode](x)
    if key is None:
        return jnp.round(x)
    low = jnp.floor(x)
    # `floor(x + uniform)` would move large integers: the sum is rounded before the floor.
    return low + (jax.random.uniform(key, x.shape, x.dtype) < x - low)
