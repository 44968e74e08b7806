"""How much a network suffers from each layer that is quantized alone."""

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.errors import choose, require
from qflax.layers import layer_costs
from qflax.ptq.divergence import NO_LABEL, compare_outputs
from qflax.ptq.taps import Hook, apply_with_hooks, collect, first_of, record_calls
from qflax.quantizers import (
    PARAMETERS,
    STATISTICS,
    AccumulatorAware,
    MixedPrecision,
    Quantization,
    Quantizer,
    Spec,
    Uniform,
    calibrate,
    value_of,
)

_ROLES = ("weights", "activations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one quantizer does to the outputs of a network that is float otherwise.

    Attributes:
      path: the layer's path, `/` between module names.
      role: `weights` or `activations`.
      bits: of the quantizer.
      divergence: mean Kullback-Leibler divergence of the softmax outputs from the float network's, in nats.
      agreement: share of examples whose largest output is the float network's.
      accuracy: share of the labelled examples that are right; None where none is labelled.
      elements: weights of the layer, or activations of an example.
    """

    path: str
    role: str
    bits: int
    divergence: float
    agreement: float
    accuracy: float | None
    elements: int


def sensitivities(
    make_model: Callable[[Quantization], nn.Module],
    quantization: Quantization,
    variables: Mapping,
    calibration: Sequence[jax.Array],
    evaluation: Sequence[tuple[jax.Array, jax.Array | None]],
    *,
    bits: Sequence[int] = (8, 4, 2),
    roles: Sequence[str] = _ROLES,
    progress: Callable[[Sensitivity], None] | None = None,
) -> list[Sensitivity]:
    """Measures every quantizer of weights and activations alone, at each of some widths.

    Quantizers are calibrated in the float network, too. A minifloat and a truncation have the width that
    they have, and are measured once; a truncation on the grid of the first of `bits`. Biases and outputs
    are float. There is one program per width, not per layer.

    Args:
      make_model: makes the network, called with `train=False`, which returns logits [batch, classes].
      quantization: its policy; where a spec does not have a width the nearest one counts.
      variables: the float network's; those of quantizers are not looked at.
      calibration: batches of inputs [batch, ...], all of one shape; at least one.
      evaluation: batches of inputs and their labels [batch], or None; at least one.
      bits: widths, 1 to 16.
      roles: whose quantizers: `weights`, `activations`.
      progress: called with each row when it is measured.

    Returns:
      A row for each quantizer and width, in the order of the network.

    Raises:
      UserError: an unknown role, an impossible width or spec.
    """
    for role in roles:
        choose("roles", role, _ROLES)
    for width in bits:
        require(width in range(1, 17), f"bits={width!r}: a quantizer has 1 to 16 bits")
    inputs, labels = [x for x, _ in evaluation], _labels(evaluation)
    rows, reference = {}, None
    for width in bits:
        # No weights are trained, and widths of other layers are not made to freeze any.
        fields = {**vars(quantization), "freeze_oscillating": False}
        model = make_model(_AtWidth(**fields, bits=width))
        network = _SwitchedNetwork(model, variables, calibration)
        if reference is None:
            reference, elements = network.logits(inputs), network.elements()
        for layer, role, own_bits in network.sites(roles):
            if own_bits in rows.setdefault((layer, role), {}):
                continue
            results = compare_outputs(reference, network.logits(inputs, on=f"{layer}/{role}"), labels)
            row = Sensitivity(path=layer, role=role, bits=own_bits, elements=elements[layer, role], **results)
            rows[layer, role][own_bits] = row
            if progress is not None:
                progress(row)
    return [row for of_site in rows.values() for row in of_site.values()]


def table(rows: Sequence[Sensitivity]) -> str:
    """One line per layer and role, in the order of the rows, and two columns per width.

    The second one is the accuracy, or the agreement with the float network where there are no labels.
    """
    widths = sorted({row.bits for row in rows}, reverse=True)
    share = "agreement" if any(row.accuracy is None for row in rows) else "accuracy"
    header = ["layer", "role", "elements"]
    for width in widths:
        header += [f"{width}-bit divergence", share]
    lines = {}
    for row in rows:
        line = lines.setdefault((row.path, row.role), [row.path, row.role, f"{row.elements:,}"])
        line += [""] * (len(header) - len(line))
        place = 3 + 2 * widths.index(row.bits)
        line[place : place + 2] = f"{row.divergence:.3g}", f"{getattr(row, share):.2%}"
    cells = [header, *lines.values()]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Names to the left, numbers to the right.
    patterns = [f"{{:{'<' if i < 2 else '>'}{size}}}" for i, size in enumerate(sizes)]
    return "\n".join("  ".join(patterns).format(*line).rstrip() for line in cells)


@dataclasses.dataclass(frozen=True)
class _AtWidth(Quantization):
    """A policy whose weights and activations have one width, as far as their specs have it."""

    bits: int = 8

    def spec(self, role: str, path: str, *, by_default: bool = True) -> Spec | None:
        if role == "biases":
            return None  # They would be on the grid of sums even where all else is float.
        spec = super().spec(role, path, by_default=by_default)
        return _at(spec, self.bits) if role in _ROLES else spec


def _at(spec: Spec | None, bits: int) -> Spec | None:
    """The spec with `bits`, or with the nearest width that it has, whatever the sign of the data."""
    if not isinstance(spec, Uniform | MixedPrecision | AccumulatorAware):
        return spec
    bipolar = isinstance(spec, Uniform) and spec.symmetric and spec.rounding == "half_even"
    unsigned = getattr(spec, "signed", None) is False
    low, high = 1 if bipolar or unsigned else 2, 16
    if isinstance(spec, MixedPrecision):
        low, high = spec.min_bits or low, spec.max_bits
    return dataclasses.replace(spec, bits=min(max(bits, low), high))


class _SwitchedNetwork:
    """A network whose quantizers data switches on; they pass on their grids in any case."""

    def __init__(self, model: nn.Module, variables: Mapping, calibration: Sequence[jax.Array]):
        self._model, self._example = model, calibration[0][:1]
        fresh = _quantizer_variables(model, self._example)
        variables = {**variables, **fresh}
        calls = record_calls(model, variables, self._example)
        self._quantizers = {c.path: c.module for c in calls if isinstance(c.module, Quantizer)}
        hooks = _switches(self._flags(None))
        float_network = types.SimpleNamespace(apply=functools.partial(apply_with_hooks, model, hooks=hooks))
        self._variables = calibrate(float_network, variables, calibration, train=False)

        @jax.jit
        def logits(flags, variables, x):
            return value_of(first_of(apply_with_hooks(model, variables, x, _switches(flags), train=False)))

        self._logits = logits

    def logits(self, batches: Sequence[jax.Array], on: str | None = None) -> np.ndarray:
        """Outputs [examples, classes] with the quantizer at the path `on`, or with none."""
        return collect(functools.partial(self._logits, self._flags(on)), self._variables, batches)

    def sites(self, roles: Sequence[str]) -> list[tuple[str, str, int]]:
        """(path of the layer, role, bits) of the quantizers that have one of the roles, in call order."""
        found = []
        for path, quantizer in self._quantizers.items():
            layer, _, role = path.rpartition("/")
            if role in roles:
                spec = quantizer.spec
                found.append((layer, role, spec.bits if hasattr(spec, "bits") else quantizer.format.bits))
        return found

    def elements(self) -> dict[tuple[str, str], int]:
        """(path of the layer, role) -> weights, or activations of an example."""
        abstract = jax.eval_shape(lambda tree: tree, self._variables)
        elements = collections.Counter()
        for cost in layer_costs(self._model, abstract, self._example, train=False):
            elements[cost.path, "weights"] += cost.weights
            elements[cost.path, "activations"] += cost.activations
        return elements

    def _flags(self, on: str | None) -> dict[str, bool]:
        return {path: path == on for path in self._quantizers}


def _quantizer_variables(model: nn.Module, example: jax.Array) -> dict:
    @jax.jit
    def initial(example):
        variables = model.init(jax.random.key(0), example, train=False)
        return {name: variables.get(name, {}) for name in (PARAMETERS, STATISTICS)}

    return initial(example)


def _switches(flags: Mapping[str, jax.Array | bool]) -> dict[str, Hook]:
    """Hooks on quantizers, by their paths, that pass on float values unless a flag is set."""

    def switch(flag, call, x, *rest):
        quantized = call(x, *rest)
        return quantized.moved(jnp.where(flag, quantized.value, x.astype(jnp.float32)))

    return {path: functools.partial(switch, flag) for path, flag in flags.items()}


def _labels(evaluation: Sequence[tuple[jax.Array, jax.Array | None]]) -> np.ndarray:
    parts = [np.full(len(x), NO_LABEL) if labels is None else labels for x, labels in evaluation]
    return np.concatenate(parts)
