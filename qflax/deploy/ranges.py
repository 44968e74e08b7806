"""Which values of a graph are integers, and between which."""

import math

import numpy as np

from qflax.deploy.graph import Graph, Node
from qflax.deploy.operations import EXECUTE, value_shapes
from qflax.numerics import IntegerFormat, accumulator_extremes

Range = tuple[int, int]

EXACT_IN_FLOAT32 = 2**24  # Sums of integers below are exact in float32, in any order.

_MOVES = ("slice", "reshape", "transpose")
_KEEPS = ("max_pool", "max", *_MOVES)


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


def accumulator_ranges(graph: Graph) -> dict[str, Range]:
    """By its output's name what the accumulator of each integer layer holds: sums, and with biases.

    Biases are all integers that are added to the sums before anything but their layout changes.
    """
    ranges, shapes = integer_ranges(graph), value_shapes(graph)
    extremes: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # Layer -> of each channel.
    sums: dict[str, tuple[str, np.ndarray]] = {}  # Value -> layer, channel of each element.
    for node in graph.nodes:
        layer, channels = next((sums[name] for name in node.inputs if name in sums), (None, None))
        constants = [graph.constants[name].array for name in node.inputs if name in graph.constants]
        if node.operation in ("conv", "dense") and node.output in ranges:
            extremes[node.output] = low, _ = _channel_extremes(node, ranges[node.inputs[0]], graph)
            sums[node.output] = node.output, np.broadcast_to(np.arange(len(low)), shapes[node.output])
        elif layer and node.operation in _MOVES:
            sums[node.output] = layer, EXECUTE[node.operation](node, channels)
        elif layer and node.operation == "add" and node.output in ranges and constants:
            channels, bias = np.broadcast_arrays(channels, constants[0].astype(np.int64))
            low, high = (np.zeros_like(end) for end in extremes[layer])
            np.minimum.at(low, channels, bias)
            np.maximum.at(high, channels, bias)
            extremes[layer] = extremes[layer][0] + low, extremes[layer][1] + high
            sums[node.output] = layer, channels
    return {name: (int(low.min()), int(high.max())) for name, (low, high) in extremes.items()}


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
    low, high = _channel_extremes(node, x, graph)
    return int(low.min()), int(high.max())


def _channel_extremes(node: Node, x: Range, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest sum of each channel."""
    low, high = min(x[0], 0), max(x[1], 0)  # Padding adds zeros.
    sums = zip(*weight_sums(node, graph), strict=True)
    extremes = [accumulator_extremes(int(p), int(n), low, high) for p, n in sums]
    return tuple(np.array(ends) for ends in zip(*extremes, strict=True))
