"""Ranges of all quantizers behind given weights, and weights that accumulators allow (EP-init)."""

from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax

from qflax.quantizers import calibrate, project_weights
from qflax.quantizers.checks import check_several_passes


def set_ranges(
    model: nn.Module, variables: Mapping, batches: Iterable[jax.Array], **calibration
) -> tuple[dict, bool]:
    """Calibrates all quantizers; accumulator-aware weights are projected onto what accumulators allow.

    The projection (Colbert et al. 2024, "A2Q+", section 3.3) changes kernels, so that activation ranges are
    set again behind them; norm statistics and biases should be, too.

    Args:
      model: the quantized network, which can be called with `train=False`.
      variables: its variables.
      batches: model inputs [batch, ...], all of one shape; passed over several times, as a list can be.
      **calibration: arguments of `quantizers.calibrate`, and of the model.

    Returns:
      The variables, and whether weights were projected.

    Raises:
      UserError: `batches` can be passed over only once; see also `quantizers.calibrate`.
    """
    check_several_passes("set_ranges", batches)
    variables = calibrate(model, variables, batches, **calibration)
    variables, projected = project_weights(model, variables, next(iter(batches))[:1], train=False)
    if projected:
        variables = calibrate(model, variables, batches, roles=("activations",), **calibration)
    return variables, projected
