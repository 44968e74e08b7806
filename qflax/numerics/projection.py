"""Euclidean projection onto the L1 ball."""

import jax
import jax.numpy as jnp

from qflax.numerics.arithmetic import quotient


def project_onto_l1_ball(x: jax.Array, radius: jax.Array) -> jax.Array:
    """The nearest point to each channel of `x` whose L1 norm is at most `radius`.

    Sort-based (Duchi et al. 2008, fig. 1): soft thresholding by the one threshold that gives the norm.
    Channels within the ball come back as they are.

    Args:
      x: float32 [..., channels].
      radius: [] or [channels], not negative.
    """
    columns = jnp.abs(x).reshape(-1, x.shape[-1])
    ordered = -jnp.sort(-columns, axis=0)
    excess = jnp.cumsum(ordered, axis=0) - radius
    counts = jnp.arange(1, len(ordered) + 1, dtype=x.dtype)[:, None]
    kept = jnp.maximum(jnp.sum(ordered * counts > excess, axis=0, keepdims=True), 1)
    threshold = quotient(jnp.take_along_axis(excess, kept - 1, axis=0), kept.astype(x.dtype))[0]
    inside = jnp.sum(columns, axis=0) <= radius
    above = jnp.abs(x) - threshold
    # The threshold is good to the last place of the largest element, which may be far more than the radius:
    # once more, from what is left above it.
    axes = tuple(range(x.ndim - 1))
    rest = jnp.sum(jnp.maximum(above, 0.0), axes) - radius
    above -= rest / jnp.maximum(jnp.sum(above > 0, axes), 1)
    return jnp.where(inside, x, jnp.sign(x) * jnp.maximum(above, 0.0))
