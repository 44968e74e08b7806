"""Gradients that stand in for the derivative of rounding, which is zero almost everywhere."""

import jax
import jax.numpy as jnp


def identity(g: jax.Array, offset: jax.Array, strength: float) -> jax.Array:
    """Straight-through: rounding passes its gradient on (Bengio et al. 2013)."""
    del offset, strength
    return g


def ewgs(g: jax.Array, offset: jax.Array, strength: float) -> jax.Array:
    """Element-wise gradient scaling `g * (1 + strength * sign(g) * offset)` (Lee et al. 2021, eq. 5)."""
    return g * (1 + strength * jnp.sign(g) * offset)


def psgd(g: jax.Array, offset: jax.Array, strength: float) -> jax.Array:
    """Position-based scaling `g * (|offset| + strength)` (Kim et al. 2020, section 3.1).

    Values near their grid point move little, which draws the distribution towards the grid; `strength`
    keeps a value that lies on the grid from being stuck there.
    """
    return g * (jnp.abs(offset) + strength)


def tanh(g: jax.Array, offset: jax.Array, strength: float) -> jax.Array:
    """Derivative of a soft staircase of slope `strength` (Gong et al. 2019, DSQ, eq. 4-7).

    Between two integers the staircase is a tanh centred at the half-way point; its derivative is
    normalised so that every step rises by one. Only for codes that lie one apart and change half-way.
    """
    from_centre = 0.5 - jnp.abs(offset)
    rise = 2 * jnp.tanh(0.5 * strength)
    return g * strength * (1 - jnp.tanh(strength * from_centre) ** 2) / rise


# Name -> (gradient rule, default strength).
SURROGATES = {
    "identity": (identity, 0.0),
    "ewgs": (ewgs, 1e-3),
    "psgd": (psgd, 1e-2),
    "tanh": (tanh, 4.0),
}
