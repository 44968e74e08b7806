"""The variables that training starts from: random or another run's, calibrated for the quantizers."""

import pathlib
from collections.abc import Callable, Iterable

import jax
import ml_collections

from qflax.layers import correct_biases, reestimate_norms
from qflax.quantizers import BUDGETS, ROLES, calibrate, project_weights
from qflax.training import build
from qflax.training.state import initial_variables
from qflax.training.workdir import start_from


def starting_variables(config: ml_collections.ConfigDict, batches: Callable[[], Iterable[jax.Array]]) -> dict:
    """Variables of step 0.

    Another run's weights are projected onto what accumulators allow, where they are accumulator-aware
    (EP-init); activation ranges, norm statistics and biases are then set again, behind the projected weights.

    Args:
      config: of the run.
      batches: gives the calibration batches, as often as it is called.

    Raises:
      UserError: `config.init_from` is no run of the same network.
    """
    network = build.model(config)
    variables = initial_variables(network, build.image_format(config).image_shape, config.seed)
    if not config.init_from:
        return calibrate(network, variables, batches(), train=True)
    original = start_from(pathlib.Path(config.init_from), config, variables)
    variables = calibrate(network, original, batches(), train=True)
    example = next(iter(batches()))[:1]
    _, state = network.apply(variables, example, train=False, mutable=[BUDGETS])
    if not state.get(BUDGETS):
        return variables
    variables = project_weights(variables, state[BUDGETS])
    variables = calibrate(network, variables, batches(), roles=("activations",), train=True)
    immediate = config.copy_and_resolve_references()
    immediate.batch_norm_momentum = 0.0
    variables = reestimate_norms(build.model(immediate), variables, batches())
    reference = config.copy_and_resolve_references()
    with reference.unlocked():
        for role in ROLES:
            reference[role] = None
        reference.rules = ()
    return correct_biases(network, variables, build.model(reference), original, batches())
