"""Calibration: ranges of all quantizers of a model from batches of real data."""

from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import jax

from qflax.quantizers.collections import CALIBRATION, PARAMETERS, STATISTICS


def calibrate(
    model: nn.Module,
    variables: Mapping,
    batches: Iterable[jax.Array],
    *,
    roles: Sequence[str] = tuple(CALIBRATION),
    **call_arguments,
) -> dict:
    """Sets the ranges of all quantizers in one pass over `batches`.

    Weight ranges come from the weights, activation ranges from the inputs of each quantizer, averaged
    over the batches (of absolute maxima the maximum), with quantized weights and float activations.
    Batch norm's statistics and the weights are left as they are; earlier calibrations are forgotten.

    Args:
      model: a module built of qflax layers, without an axis of devices.
      variables: its variables.
      batches: model inputs, all of one shape, [batch, ...]; at least one.
      roles: whose quantizers: `weights`, `activations`.
      **call_arguments: passed to the model, such as `train=True` for batch norm by batch statistics.

    Returns:
      The variables with new quantizer parameters and statistics.
    """
    variables = dict(variables)
    if not (variables.get(PARAMETERS) or variables.get(STATISTICS)):
        return variables
    own = {name: variables.pop(name, {}) for name in (PARAMETERS, STATISTICS)}
    own[STATISTICS] = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if _counts(path, roles) else x, own[STATISTICS]
    )
    mutable = [PARAMETERS, STATISTICS, *(CALIBRATION[role] for role in roles)]
    mutable += [name for name in ("batch_stats",) if name in variables]

    @jax.jit
    def observe(variables, own, batch):
        _, state = model.apply({**variables, **own}, batch, mutable=mutable, **call_arguments)
        return {name: state.get(name, {}) for name in own}

    for batch in batches:
        own = observe(variables, own, batch)
    return {**variables, **own}


def _counts(path: tuple, roles: Sequence[str]) -> bool:
    """Whether a statistic counts batches for a quantizer of these roles, which layers name after them."""
    if path[-1].key != "count":
        return False
    return len(path) == 1 or ("weights" if path[-2].key == "weights" else "activations") in roles
