"""The widths of layers under a configuration's size targets, each by its layer's sensitivity."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from qflax.errors import UserError, require
from qflax.ptq.allocation import allocate, rules_of
from qflax.ptq.sensitivity import Sensitivity, sensitivities
from qflax.quantizers import MixedPrecision
from qflax.training import build
from qflax.training.calibration import CalibrationBatches
from qflax.training.state import initial_variables

_WIDTHS = (8, 6, 4, 3, 2)  # That layers may get.
_EXAMPLES = 512
_KIB = 8 * 1024  # Bits.


def measure(
    config: ml_collections.ConfigDict,
    weights: Mapping,
    batches: CalibrationBatches,
    *,
    bits: Sequence[int],
    roles: Sequence[str] = ("weights", "activations"),
    say: Callable[[str], None] = lambda line: None,
) -> list[Sensitivity]:
    """What each quantizer of a configuration alone does to a float network, on training images.

    Args:
      config: of the quantized network.
      weights: the float network's variables.
      batches: to calibrate on, the first of them alone; the images after them are what is judged on.
      bits: widths to measure.
      roles: whose quantizers.
      say: called with a line for every measurement.

    Raises:
      UserError: an impossible width; no training images are left to judge by.
    """
    return sensitivities(
        functools.partial(build.model, config),
        build.quantization(config),
        weights,
        list(batches)[:1],
        batches.others(_EXAMPLES),
        bits=bits,
        roles=roles,
        progress=lambda row: say(f"{row.path}  {row.role}  {row.bits} bits  divergence {row.divergence:.3g}"),
    )


def allocate_widths(
    config: ml_collections.ConfigDict,
    weights: Mapping,
    batches: CalibrationBatches,
    *,
    learned_alone: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[ml_collections.ConfigDict, list[Sensitivity]]:
    """Gives layers widths so that the size targets hold.

    Args:
      config: of the quantized network, with a target at least.
      weights: the float network's variables.
      batches: see `measure`.
      learned_alone: leave widths that are not learned as they are; else every layer gets one.
      say: called with a line for every measurement.

    Returns:
      The configuration with the widths added to its rules, and what they are based on.

    Raises:
      UserError: the narrowest widths are beyond a target; no images are left to judge by.
    """
    targets = config.size_targets
    wanted = {
        "weights": targets.weight_kib,
        "activations": targets.activation_kib_sum or targets.activation_kib_max,
    }
    roles = [role for role, target in wanted.items() if target]
    rows = measure(config, weights, batches, bits=_WIDTHS, roles=roles, say=say)
    if learned_alone:
        policy = build.quantization(config)
        rows = [row for row in rows if isinstance(policy.spec(row.role, row.path), MixedPrecision)]
    variables = initial_variables(build.model(config), build.image_format(config).image_shape, config.seed)
    costs = build.measure_costs(config, {**variables, **weights})
    rules = tuple(config.rules)
    if wanted["weights"]:
        chosen = {row.path for row in _of(rows, "weights")}
        fixed = sum(cost.biases * float(cost.bias_bits) for cost in costs)
        fixed += sum(c.weights * float(c.weight_bits) for c in costs if c.path not in chosen)
        rules += _rules(rows, "weights", "weight_kib", targets.weight_kib * _KIB, fixed)
    if wanted["activations"]:
        largest = targets.activation_kib_max * _KIB or math.inf
        measured = _of(rows, "activations")
        fitting = [row for row in measured if row.elements * row.bits <= largest]
        left = {row.path for row in measured} - {row.path for row in fitting}
        require(
            not left,
            f"config.size_targets.activation_kib_max={targets.activation_kib_max}: "
            f"{', '.join(sorted(left)[:3])} is larger even at {_WIDTHS[-1]} bits; allow more",
        )
        chosen = {row.path for row in fitting}
        fixed = sum(c.activations * float(c.activation_bits) for c in costs if c.path not in chosen)
        widest = fixed + sum(row.elements * row.bits for row in fitting)
        budget = targets.activation_kib_sum * _KIB or widest
        rules += _rules(fitting, "activations", "activation_kib_sum", budget, fixed)
    allocated = config.copy_and_resolve_references()
    with allocated.unlocked():
        allocated.rules = rules
    return allocated, rows


def _of(rows: Sequence[Sensitivity], role: str) -> list[Sensitivity]:
    return [row for row in rows if row.role == role]


def _rules(rows, role: str, target: str, budget: float, fixed: float) -> tuple[dict, ...]:
    """Rules with the widths of a role under a target of so many bits."""
    try:
        return rules_of(allocate(rows, budget, fixed_bits=fixed, role=role), role=role)
    except UserError as error:
        raise UserError(f"config.size_targets.{target}: {error}") from None
