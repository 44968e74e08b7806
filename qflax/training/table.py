"""The per-layer table and the totals of a network's cost."""

import types
from collections.abc import Mapping, Sequence

from qflax.layers import Accumulation, LayerCost, sizes

_NONE = types.MappingProxyType({})


def cost_totals(costs: Sequence[LayerCost]) -> dict[str, float]:
    """Sums over the layers: bytes, operations; the maximum of the activations too.

    Weight bytes cover kernels and biases at their bits (float ones at 32); norm parameters are not counted,
    as they are folded into scales when deployed. Activation bytes are those of one example. Accumulator bits
    are what the widest layer of integers needs, exactly.
    """
    accumulators = [cost.accumulation.exact_bits for cost in costs if cost.accumulation is not None]
    return {
        "quantized_parameters": sum(cost.weights + cost.biases for cost in costs),
        "weight_bytes": float(sum(cost.weight_bytes for cost in costs)),
        "activation_elements": sum(cost.activations for cost in costs),
        "activation_bytes_sum": float(sum(cost.activation_bytes for cost in costs)),
        "activation_bytes_max": float(max((cost.activation_bytes for cost in costs), default=0)),
        "macs": sum(cost.macs for cost in costs),
        "bit_operations": float(sum(float(cost.bit_operations) for cost in costs)),
        **({"accumulator_bits": max(accumulators)} if accumulators else {}),
    }


def cost_table(
    costs: Sequence[LayerCost], targets: Mapping[str, float] = _NONE, strengths: Mapping[str, float] = _NONE
) -> str:
    """One line per layer that computes or stores something, a line of totals, and one for each size target.

    Args:
      costs: of the layers.
      targets: name of a size (`layers.sizes`) -> KiB; 0 is no target.
      strengths: of the penalties on what is beyond the targets.
    """
    header = (
        "layer",
        "parameters",
        "bits",
        "KiB",
        "MMAC",
        "input bits",
        "MBOP",
        "activations",
        "bits",
        "KiB",
        "accumulator bits: type",
        "norm",
        "exact",
    )
    rows = [_row(cost) for cost in costs if cost.macs or cost.activations]
    totals = cost_totals(costs)
    rows.append(
        (
            "total",
            f"{totals['quantized_parameters']:,}",
            "",
            f"{totals['weight_bytes'] / 1024:.2f}",
            f"{totals['macs'] / 1e6:.3f}",
            "",
            f"{totals['bit_operations'] / 1e6:.1f}",
            f"{totals['activation_elements']:,}",
            "",
            f"{totals['activation_bytes_sum'] / 1024:.2f}",
            "",
            "",
            f"{totals.get('accumulator_bits', '')}",
        )
    )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    lines += [_line(row, widths) for row in rows]
    lines.append(f"largest activation: {totals['activation_bytes_max'] / 1024:.2f} KiB")
    reached = sizes(costs)
    for name, target in targets.items():
        if target:
            size = float(reached[name])
            penalty = strengths[name] * max(size - target, 0) ** 2
            lines.append(f"{name} {size:.2f}, target {target:.2f}, penalty {penalty:.4g}")
    return "\n".join(lines)


def _row(cost: LayerCost) -> tuple[str, ...]:
    bounds = cost.accumulation
    computes, stores = cost.macs > 0, cost.activations > 0
    return (
        cost.path,
        f"{cost.weights + cost.biases:,}" if computes else "",
        _bits(cost.weight_bits) if computes else "",
        f"{float(cost.weight_bytes) / 1024:.2f}" if computes else "",
        f"{cost.macs / 1e6:.3f}" if computes else "",
        _bits(cost.input_bits) if computes else "",
        f"{float(cost.bit_operations) / 1e6:.1f}" if computes else "",
        f"{cost.activations:,}" if stores else "",
        _bits(cost.activation_bits) if stores else "",
        f"{float(cost.activation_bytes) / 1024:.2f}" if stores else "",
        *(("", "", "") if bounds is None else (f"{bits}" for bits in _accumulator_bits(bounds))),
    )


def _bits(bits) -> str:
    return "float" if bits == 32 else f"{bits:.2f}".removesuffix(".00")


def _accumulator_bits(bounds: Accumulation) -> tuple[int, int, int]:
    return bounds.data_type_bits, bounds.norm_bits, bounds.exact_bits


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])
