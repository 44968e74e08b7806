"""Recipes of post-training quantization: methods in an order, each applied to what the one before left."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax

from qflax.errors import UserError, closest, require
from qflax.ptq.bias_correction import correct_biases, correct_biases_analytically
from qflax.ptq.equalization import equalize
from qflax.ptq.gptq import gptq
from qflax.ptq.norm_reestimation import reestimate_norms
from qflax.ptq.parts import block_parts, layer_parts
from qflax.ptq.ranges import set_ranges
from qflax.ptq.reconstruction import Reconstruction, reconstruct
from qflax.quantizers import STATISTICS, freeze_widths

_COLLECTIONS = ("params", "batch_stats")
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """A network to quantize, the float one, and their variables.

    Attributes:
      model: the quantized network.
      reference: the float network, of the same layers.
      immediate, immediate_reference: the same two, whose norms have momentum 0.
      variables: of the quantized one.
      reference_variables: of the float one; the function that is to be kept.
    """

    model: nn.Module
    reference: nn.Module
    immediate: nn.Module
    immediate_reference: nn.Module
    variables: Mapping
    reference_variables: Mapping

    def with_variables(self, variables: Mapping) -> "Networks":
        """The same with other variables of the quantized network."""
        return dataclasses.replace(self, variables=variables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of the methods.

    Attributes:
      over: how ranges of batches become one, see `quantizers.calibrate`.
      damping: of GPTQ.
      reconstruction: of AdaRound and BRECQ.
    """

    over: str = "batches"
    damping: float = 0.01
    reconstruction: Reconstruction = Reconstruction()


def _equalization(n: Networks, batches, settings, progress) -> Networks:
    del settings, progress
    equal = equalize(n.reference, n.reference_variables, next(iter(batches)))
    own = {name: equal[name] for name in _COLLECTIONS if name in equal}
    return dataclasses.replace(n, reference_variables=equal, variables={**n.variables, **own})


def _ranges(n: Networks, batches, settings, progress) -> Networks:
    del progress
    variables, _ = set_ranges(n.model, n.variables, batches, over=settings.over, train=False)
    # There is no training in which widths could be learned.
    return n.with_variables({**variables, STATISTICS: freeze_widths(variables.get(STATISTICS, {}))})


def _norm_reestimation(n: Networks, batches, settings, progress) -> Networks:
    del settings, progress
    networks = n.immediate, n.variables, n.immediate_reference, n.reference_variables
    return n.with_variables(reestimate_norms(*networks, batches))


def _bias_correction(n: Networks, batches, settings, progress) -> Networks:
    del settings
    networks = n.model, n.variables, n.reference, n.reference_variables
    return n.with_variables(correct_biases(*networks, batches, progress))


def _analytic_bias_correction(n: Networks, batches, settings, progress) -> Networks:
    del settings, progress
    example = next(iter(batches))[:1]
    return n.with_variables(
        correct_biases_analytically(n.model, n.variables, n.reference, n.reference_variables, example)
    )


def _gptq(n: Networks, batches, settings, progress) -> Networks:
    options = {"damping": settings.damping, "progress": progress}
    return n.with_variables(gptq(n.model, n.variables, batches, **options))


def _reconstruction(parts_of: Callable) -> Callable:
    def method(n: Networks, batches, settings, progress) -> Networks:
        parts = parts_of(n.model, n.reference, n.variables, next(iter(batches))[:1])
        variables = reconstruct(
            n.model,
            n.variables,
            n.reference,
            n.reference_variables,
            batches,
            parts,
            settings.reconstruction,
            progress,
        )
        return n.with_variables(variables)

    return method


METHODS: dict[str, Callable[[Networks, Iterable, Settings, Progress], Networks]] = {
    "equalization": _equalization,
    "ranges": _ranges,
    "norm_reestimation": _norm_reestimation,
    "bias_correction": _bias_correction,
    "analytic_bias_correction": _analytic_bias_correction,
    "gptq": _gptq,
    "adaround": _reconstruction(layer_parts),
    "brecq": _reconstruction(block_parts),
}

# What quantizers with scales are needed for, and what 'ranges' after it would undo.
_ROUNDING = ("gptq", "adaround", "brecq")
_BEHIND_RANGES = ("bias_correction", "analytic_bias_correction", "norm_reestimation", *_ROUNDING)


def check_recipe(recipe: Sequence[str], where: str = "recipe") -> None:
    """Raises `UserError` for an unknown method, or an order that cannot be."""
    for method in recipe:
        if method not in METHODS:
            raise UserError(
                f"{where}: no method {method!r}{closest(str(method), METHODS)}; choices: {', '.join(METHODS)}"
            )
    given = f"{where}={tuple(recipe)!r}"
    require("ranges" in recipe, f"{given}: without 'ranges' no quantizer has a scale; add it")
    calibrated = rounded = None
    for method in recipe:
        if method in _BEHIND_RANGES:
            require(calibrated, f"{given}: {method!r} needs quantizers with a scale; put 'ranges' before it")
        if method == "equalization":
            require(not calibrated, f"{given}: 'equalization' moves the ranges; put it before 'ranges'")
        if method in ("ranges", *_ROUNDING):
            require(
                not rounded,
                f"{given}: {method!r} would undo the {rounded!r} before it; leave one out",
            )
        calibrated = calibrated or method == "ranges"
        rounded = method if method in _ROUNDING else rounded


def apply_recipe(
    networks: Networks,
    recipe: Sequence[str],
    batches: Iterable[jax.Array],
    settings: Settings,
    *,
    done: Callable[[str, Networks], None] = lambda method, networks: None,
    progress: Progress = lambda text: None,
) -> Networks:
    """Applies the methods in their order.

    Args:
      networks: with the float network's weights in both variables.
      recipe: names of `METHODS`, see `check_recipe`.
      batches: calibration inputs [batch, ...], all of one shape; passed over many times.
      settings: of the methods.
      done: told of each method that is done, with what it made.
      progress: told of parts of methods that take long.
    """
    check_recipe(recipe)
    for method in recipe:
        networks = METHODS[method](networks, batches, settings, progress)
        done(method, networks)
    return networks
