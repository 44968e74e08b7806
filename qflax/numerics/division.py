"""Division that compilers leave a division."""

import jax
import jax.numpy as jnp


def quotient(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """`x / divisor`, the same bits in every program; `divisor` broadcasts against `x`.

    XLA turns a division by a constant or by a broadcast scalar into `x * (1 / divisor)`, in some
    programs and not in others, and may fuse that product with an addition that follows: codes close to a
    rounding boundary would depend on what else was compiled with them. It leaves a divisor alone that
    depends on `x`, as this one does, if in name only.
    """
    return x / jnp.where(jnp.isnan(x), x, divisor)
