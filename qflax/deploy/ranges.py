"""Which values of a graph are integers, and between which."""

import math

import numpy as np

from qflax.deploy.graph import Graph, Node
from qflax.deploy.operations import value_shapes
from qflax.numerics import IntegerFormat, accumulator_extremes

Range = tuple[int, int]

EXACT_IN_FLOAT32 = 2**24  # Sums of integers below are exact in float32, in any order.

_KEEPS = ("max_pool", "max", "slice", "reshape", "transpose")


def integer_ranges(graph: Graph) -> dict[str, Range]:
    """Least and largest integer of each value that holds integers whatever the input is.

    Of convolutions and dense layers these are the extremes of the sums for their weights, which an input
    attains unless the layer before cannot make it.
    """
    ranges: dict[str, Range] = {}
    shapes = value_shapes(graph)
    for name, constant in graph.constants.items():
        if _whole(constant.array):
            ranges[name] = int(constant.array.min()), int(constant.array.max())
    for node in graph.nodes:
        found = _range(node, [ranges.get(name) for name in node.inputs], graph, shapes)
        if found is not None:
            ranges[node.output] = found
    return ranges


def weight_sums(node: Node, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the positive and of the absolute negative integer weights of each channel, int64."""
    kernel = graph.constants[node.inputs[1]].array.astype(np.int64)
    axes = tuple(range(kernel.ndim - 1))
    return np.maximum(kernel, 0).sum(axes), np.maximum(-kernel, 0).sum(axes)


def _whole(array: np.ndarray) -> bool:
    """Whether an array is of integers that int64 holds."""
    return bool(array.size and np.all(np.abs(array) < 2.0**63) and np.all(array == np.round(array)))


def _range(node: Node, inputs: list[Range | None], graph: Graph, shapes: dict) -> Range | None:
    operation = node.operation
    if operation == "quantize":
        fmt = node.attributes["format"]
        if not isinstance(fmt, IntegerFormat) or node.inputs[2] not in graph.constants:
            return None
        zero_point = graph.constants[node.inputs[2]].array
        return fmt.lowest - int(zero_point.max()), fmt.highest - int(zero_point.min())
    if operation == "rescale":
        return int(np.min(node.attributes["lowest"])), int(np.max(node.attributes["highest"]))
    if any(value is None for value in inputs):
        return None
    x = inputs[0]
    if operation in ("conv", "dense"):
        return _sums(node, x, graph)
    if operation in _KEEPS:
        return x
    if operation == "sum":
        count = math.prod(shapes[node.inputs[0]]) // math.prod(shapes[node.output])
        return x[0] * count, x[1] * count
    if operation == "sum_pool":
        count = math.prod(node.attributes["window"])
        return min(x[0], 0) * count, max(x[1], 0) * count
    if operation == "pad":
        return min(x[0], 0), max(x[1], 0)
    if operation == "concatenate":
        return min(low for low, _ in inputs), max(high for _, high in inputs)
    if operation == "add":
        return x[0] + inputs[1][0], x[1] + inputs[1][1]
    if operation == "maximum":
        return max(x[0], inputs[1][0]), max(x[1], inputs[1][1])
    if operation == "minimum":
        return min(x[0], inputs[1][0]), min(x[1], inputs[1][1])
    return None


def _sums(node: Node, x: Range, graph: Graph) -> Range | None:
    if node.inputs[1] not in graph.constants or graph.constants[node.inputs[1]].format is None:
        return None
    low, high = min(x[0], 0), max(x[1], 0)  # Padding adds zeros.
    sums = zip(*weight_sums(node, graph), strict=True)
    extremes = [accumulator_extremes(int(p), int(n), low, high) for p, n in sums]
    return min(low for low, _ in extremes), max(high for _, high in extremes)
