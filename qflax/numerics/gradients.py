"""Gradients of a quantizer's own parameters: identities that shape them, and their sum."""

import jax
import jax.numpy as jnp

from qflax.numerics.varying import vary_alike


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Returns `x` exactly; its gradient is multiplied by `factor`.

    `x * factor + stop_gradient(x * (1 - factor))`, the usual form, is off by rounding.
    """
    del factor
    return x


scale_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


@jax.custom_vjp
def floor_at(x: jax.Array, lowest: float) -> jax.Array:
    """`max(x, lowest)` whose gradient is 1 on both sides, so that a scale at its floor can recover."""
    return jnp.maximum(x, lowest)


floor_at.defvjp(lambda x, lowest: (jnp.maximum(x, lowest), None), lambda _, g: (g, None))


@jax.custom_vjp
def power_of_two(x: jax.Array) -> jax.Array:
    """Power of two nearest to positive `x` in the log domain, exactly representable.

    Gradient `y / x`: straight-through for the rounding of `log2(x)` (Jain et al. 2020, TQT, section 3.3).
    """
    exponent = jnp.round(jnp.log2(x)).astype(jnp.int32)
    # exp2 is inexact at integers on some backends; ldexp never is.
    return jnp.ldexp(jnp.ones_like(x), exponent)


def _power_of_two_forward(x):
    y = power_of_two(x)
    return y, y / x


power_of_two.defvjp(_power_of_two_forward, lambda ratio, g: (g * ratio,))


def straight_through(value: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `value` exactly; the gradient goes to `x` (Bengio et al. 2013, section 3)."""
    return _straight_through(*vary_alike(value, x))


@jax.custom_vjp
def _straight_through(value, x):
    del x
    return value


_straight_through.defvjp(lambda value, x: (value, None), lambda _, g: (jnp.zeros_like(g), g))


def sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums over the axes along which an operand of `shape` was broadcast to the shape of `x`."""
    leading = x.ndim - len(shape)
    stretched = [leading + i for i, n in enumerate(shape) if n == 1 and x.shape[leading + i] != 1]
    summed = jnp.sum(x, axis=(*range(leading), *stretched))
    return summed.reshape(shape)


def passed_on(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """`gradient * x`, and 0 where there is no gradient, whatever `x` is there."""
    return gradient * jnp.where(gradient == 0, 0.0, x)
