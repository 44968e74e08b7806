"""Calibration: ranges of all quantizers of a model from batches of real data."""

from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax

from qflax.quantizers.collections import PARAMETERS, STATISTICS


def calibrate(model: nn.Module, variables: Mapping, batches: Iterable[jax.Array], **call_arguments) -> dict:
    """Sets the ranges of all quantizers in one pass over `batches`.

    Weight ranges come from the weights, activation ranges from the inputs of each quantizer, averaged
    over the batches (of absolute maxima the maximum), with quantized weights and float activations.
    Batch norm's statistics and the weights are left as they are; earlier calibrations are forgotten.

    Args:
      model: a module built of qflax layers, without an axis of devices.
      variables: its variables.
      batches: model inputs, all of one shape, [batch, ...]; at least one.
      **call_arguments: passed to the model, such as `train=True` for batch norm by batch statistics.

    Returns:
      The variables with new quantizer parameters and statistics.
    """
    variables = dict(variables)
    if not (variables.get(PARAMETERS) or variables.get(STATISTICS)):
        return variables
    own = {name: variables.pop(name, {}) for name in (PARAMETERS, STATISTICS)}
    own[STATISTICS] = jax.tree.map(lambda x: x * 0, own[STATISTICS])
    mutable = [PARAMETERS, STATISTICS, *(["batch_stats"] if "batch_stats" in variables else [])]

    @jax.jit
    def observe(variables, own, batch):
        _, state = model.apply({**variables, **own}, batch, mutable=mutable, **call_arguments)
        return {name: state.get(name, {}) for name in own}

    for batch in batches:
        own = observe(variables, own, batch)
    return {**variables, **own}
