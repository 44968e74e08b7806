"""Losses of logits against label distributions."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross entropy of each example.

    Args:
      logits: [batch, classes].
      labels: [batch, classes], rows sum to one.

    Returns:
      [batch].
    """
    return optax.softmax_cross_entropy(logits, labels)


def squared_hinge(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the classes of max(0, 1 - t y)^2 with t = 2 p - 1, so -1 or +1 for hard labels.

    Arguments and result as of `cross_entropy`.
    """
    targets = 2 * labels - 1
    return jnp.mean(jnp.maximum(0.0, 1 - targets * logits) ** 2, axis=-1)


def smooth(labels: jax.Array, amount: float) -> jax.Array:
    """Moves `amount` of the probability to the uniform distribution (Szegedy et al. 2016, section 7)."""
    return labels * (1 - amount) + amount / labels.shape[-1]


LOSSES = {"cross_entropy": cross_entropy, "squared_hinge": squared_hinge}
