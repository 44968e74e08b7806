"""Iterative weight freezing: weights that oscillate between points of their grid stay at one of them.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 4.3 and algorithm 1. As
in their experiments weights of more than four bits are left alone: where an update is as large as a step of
the grid, all changes of direction would count. A record of a kernel has, of its shape:

| `code`      | float32 | in units of the scale, of the last training step; of a frozen weight for good |
| `mean`      | float32 | running average of the codes                                                  |
| `direction` | int8    | of the last change: -1, 1, or 0 before the first                              |
| `frequency` | float32 | running average of oscillations: of changes against the last direction        |
| `held`      | bool    | whether the weight is frozen                                                  |

and `steps` (int32), how many training steps it has seen, and the `threshold` (float32) of the frequency. Of a
layer that is called several times in a step, each call counts as one.

What is left of a frozen weight in `params` has no gradient, but would decay. A training step that names
`params` and `HELD` as mutable gets kernels with frozen weights on their points, to go on from.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.numerics import product

RECORD = "oscillation"  # Name of the variable.
MOST_BITS = 4  # Of weights that may freeze.
MOMENTUM = 0.01  # Of both averages, as in the paper's experiments.


def unobserved(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """The record of a kernel of `shape` before its first training step; it lets nothing freeze."""
    return {
        "code": jnp.zeros(shape),
        "mean": jnp.zeros(shape),
        "direction": jnp.zeros(shape, jnp.int8),
        "frequency": jnp.zeros(shape),
        "held": jnp.zeros(shape, bool),
        "steps": jnp.zeros((), jnp.int32),
        "threshold": jnp.ones(()),
    }


def in_record(path: tuple) -> bool:
    """Whether a leaf of the statistics is of such a record."""
    return len(path) > 1 and path[-2].key == RECORD


def hold(x: jax.Array, scale: jax.Array, record: Mapping[str, jax.Array]) -> jax.Array:
    """Weights `x` with those that are frozen on their points of the grid of `scale`.

    Frozen weights pass their gradients on to the scale, where it has one, times their codes.
    """
    return jnp.where(record["held"], product(record["code"], scale), x)


def observed(
    record: Mapping[str, jax.Array],
    codes: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    narrow: jax.Array | bool,
) -> dict[str, jax.Array]:
    """The record after a training step with these `codes`, in units of the scale.

    A weight freezes at the point nearest to its mean once its frequency exceeds the threshold.

    Args:
      record: before the step.
      codes: of the record's shape.
      rounded: puts a mean of codes on the grid.
      narrow: whether the weights have few enough bits to freeze; broadcastable to the record.
    """
    first = record["steps"] == 0
    change = jnp.where(first, 0.0, jnp.sign(codes - record["code"])).astype(jnp.int8)
    oscillates = change * record["direction"] < 0
    frequency = record["frequency"] + MOMENTUM * (oscillates - record["frequency"])
    mean = jnp.where(first, codes, record["mean"] + MOMENTUM * (codes - record["mean"]))
    freezing = (frequency > record["threshold"]) & ~record["held"] & narrow
    return {
        "code": jnp.where(freezing, rounded(mean), codes),
        "mean": mean,
        "direction": jnp.where(change == 0, record["direction"], change),
        "frequency": frequency,
        "held": record["held"] | freezing,
        "steps": record["steps"] + 1,
        "threshold": record["threshold"],
    }


def set_oscillation_threshold(quantizer_stats: Mapping, threshold: jax.Array | float) -> dict:
    """Statistics in which weights freeze that oscillate more often than `threshold`, in (0, 1].

    The frequency of a weight is a running average with the momentum 0.01, of 1 where it changes back against
    the direction of its last change and of 0 elsewhere. With 1 nothing freezes.

    Raises:
      UserError: no such frequency (of a number; an array is not looked at).
    """
    require(
        isinstance(threshold, jax.Array) or 0 < threshold <= 1,
        f"threshold={threshold!r}: a frequency of oscillations is in (0, 1]",
    )

    def change(path, value):
        given = in_record(path) and path[-1].key == "threshold"
        return jnp.full_like(value, threshold) if given else value

    return jax.tree_util.tree_map_with_path(change, quantizer_stats)


def frozen_share(quantizer_stats: Mapping) -> jax.Array | None:
    """Fraction of the weights that are frozen, of all kernels with a record; None if there are none."""
    leaves = jax.tree_util.tree_leaves_with_path(quantizer_stats)
    held = [value for path, value in leaves if in_record(path) and path[-1].key == "held"]
    if not held:
        return None
    return sum(jnp.sum(value, dtype=jnp.float32) for value in held) / sum(value.size for value in held)
