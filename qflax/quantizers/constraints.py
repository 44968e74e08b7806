"""Bounds that quantizer parameters keep after every update, whatever the gradients."""

import jax
import jax.numpy as jnp

_LARGEST_LOG2 = 24.0
_POSITIVE = (2.0**-_LARGEST_LOG2, 2.0**_LARGEST_LOG2)

BOUNDS = {
    "scale": _POSITIVE,
    "x_max": _POSITIVE,
    "width": _POSITIVE,
    "log2_scale": (-_LARGEST_LOG2, _LARGEST_LOG2),
    "x_min": (-_POSITIVE[1], 0.0),
}


def constrain(quantizer_params: dict) -> dict:
    """Projects every quantizer parameter into the box of its name (`BOUNDS`); NaN stays NaN."""

    def project(path, value):
        low, high = BOUNDS[path[-1].key]
        return jnp.clip(value, low, high)

    return jax.tree_util.tree_map_with_path(project, quantizer_params)
