"""A table of the integer layers of a graph."""

import math

from qflax.deploy.graph import Graph
from qflax.deploy.ranges import accumulator_ranges, integer_ranges
from qflax.numerics import width_of_extremes


def layer_table(graph: Graph) -> str:
    """Per layer with a kernel: weights, their format, the range of its integer inputs, accumulator bits."""
    ranges, accumulators = integer_ranges(graph), accumulator_ranges(graph)
    rows = [("layer", "weights", "format", "inputs", "accumulator", "promised")]
    for node in graph.nodes:
        if node.operation not in ("conv", "dense") or node.inputs[1] not in graph.constants:
            continue
        kernel = graph.constants[node.inputs[1]]
        inputs = ranges.get(node.inputs[0])
        sums = accumulators.get(node.output)
        rows.append(
            (
                node.layer or node.output,
                f"{math.prod(kernel.array.shape):,}",
                describe(kernel.format),
                "float" if inputs is None else f"{inputs[0]} to {inputs[1]}",
                "float" if sums is None else f"{width_of_extremes(*sums)} bits",
                "" if kernel.accumulator_bits is None else f"{kernel.accumulator_bits} bits",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *padded)))
    return "\n".join(lines)


def describe(fmt) -> str:
    """A number format in a word."""
    if fmt is None:
        return "float32"
    if hasattr(fmt, "exponent_bits"):
        return f"e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    return f"{'' if fmt.signed else 'u'}int{fmt.bits}"
