"""Norm statistics of a quantized network from data."""

from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.quantizers import apply_without_dropout

_STATISTICS = "batch_stats"
_SMALLEST = 1e-12  # A channel without variance in the float network keeps the one that it has.
_COLLAPSED = 1e-4  # Of the float network's variance: so does one that quantization has left (almost) none.


def reestimate_norms(
    model: nn.Module,
    variables: Mapping,
    reference: nn.Module,
    reference_variables: Mapping,
    batches: Iterable[jax.Array],
) -> dict:
    """Moves batch norms' running statistics by what quantization changes of them.

    Where a norm follows a layer this corrects the shift of the layer's outputs and their spread (Sun et al.
    2019, "Hybrid 8-bit floating point", section 4.2): what comes out has the mean and spread that the float
    network's norm gives for the same images. The statistics of these themselves are not taken: the running
    ones are those of augmented images, and those of plain ones may be far from them.

    Args:
      model: called with `train=True`; its norms must have momentum 0, so that they return a batch's own
        statistics.
      variables: its variables; without norms they come back as they are.
      reference: the float network, of the same layers, its norms likewise of momentum 0.
      reference_variables: its variables.
      batches: model inputs [batch, ...]; at least one; passed over twice.
    """
    if not variables.get(_STATISTICS):
        return dict(variables)
    own = _mean_statistics(model, variables, batches)
    goal = _mean_statistics(reference, reference_variables, batches)
    running = flatten_dict(variables[_STATISTICS])
    moved = dict(running)  # With what is not a norm's, as it is.
    for path, mean in ((path, (*path[:-1], "mean")) for path in running if path[-1] == "var"):
        if mean not in running:
            continue
        known = (goal[path] > _SMALLEST) & (own[path] > _COLLAPSED * goal[path])
        ratio = jnp.where(known, own[path] / jnp.maximum(goal[path], _SMALLEST), 1.0)
        moved[path] = running[path] * ratio
        # What lies between the running mean and that of these images stays in proportion to the spread.
        narrowed = (goal[mean] - running[mean]) * (1 - jnp.sqrt(ratio))
        moved[mean] = running[mean] + (own[mean] - goal[mean]) + narrowed
    return {**variables, _STATISTICS: unflatten_dict(moved)}


def _mean_statistics(model: nn.Module, variables: Mapping, batches: Iterable[jax.Array]) -> Mapping:
    """Path -> mean over the batches of their own statistics."""

    @jax.jit
    def statistics_of(variables, batch):
        return apply_without_dropout(model, variables, batch, train=True, mutable=[_STATISTICS])[1][
            _STATISTICS
        ]

    total, count = None, 0
    for batch in batches:
        new, count = statistics_of(variables, batch), count + 1
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return flatten_dict(jax.tree.map(lambda x: x / count, total))
