"""The operations of a graph as ONNX nodes; what quantizers do is left to the dialect."""

import numpy as np

from qflax.deploy.graph import Node
from qflax.deploy.onnx_values import TO_NCHW, Quantizer, Values
from qflax.numerics import IntegerFormat

_BINARY = {"multiply": "Mul", "divide": "Div", "add": "Add", "subtract": "Sub", "minimum": "Min"}
_SAME = ("exp", "log", "tanh", "erf", "sqrt", "round", "floor", "ceil", "sign", "sin", "cos")
_UNARY = {
    "negative": "Neg",
    "absolute": "Abs",
    "logistic": "Sigmoid",
    **{name: name.capitalize() for name in _SAME},
}
_END = np.iinfo(np.int64).max


def add_node(values: Values, node: Node) -> str:
    """Adds a node of a graph and returns its output's tensor.

    Raises:
      UserError: the dialect does not know the node's number format.
    """
    if node.operation in _UNARY:
        return values.builder.add(_UNARY[node.operation], values.operand(node.inputs[0]))
    if node.operation in _BINARY:
        return values.builder.add(_BINARY[node.operation], *_operands(values, node))
    return _OPERATIONS[node.operation](values, node)


def _operands(values: Values, node: Node) -> list[str]:
    rank = max(map(values.rank, node.inputs))
    return [values.operand(name, rank) for name in node.inputs]


def _quantize(values: Values, node: Node) -> str:
    builder, fmt = values.builder, node.attributes["format"]
    x, scale, *zero_point = node.inputs
    quantizer = Quantizer(
        format=fmt,
        rounding=node.attributes["rounding"],
        scale=_unless(1, values, scale, x),
        zero_point=_unless(0, values, zero_point[0], x) if zero_point else None,
        range=values.ranges.get(x),
    )
    tensor = values.operand(x)
    if quantizer.scale is not None:
        tensor = builder.add("Div", tensor, quantizer.scale)
    if quantizer.zero_point is not None:
        tensor = builder.add("Add", tensor, quantizer.zero_point)
    tensor = values.dialect.quantize(builder, tensor, quantizer)
    return tensor if quantizer.zero_point is None else builder.add("Sub", tensor, quantizer.zero_point)


def _unless(neutral: int, values: Values, name: str, x: str) -> str | None:
    """A value as an operand beside `x`, or None if it is `neutral`."""
    constant = values.graph.constants.get(name)
    if constant is not None and np.all(constant.array == neutral):
        return None
    return values.operand(name, values.rank(x))


def _conv(values: Values, node: Node) -> str:
    x, kernel = node.inputs
    (top, bottom), (left, right) = node.attributes["padding"]
    kernel = values.conv_kernel(kernel)
    return values.builder.add(
        "Conv",
        values.operand(x),
        kernel,
        kernel_shape=values.builder.shape(kernel)[2:],
        strides=node.attributes["strides"],
        pads=(top, left, bottom, right),
        dilations=node.attributes["dilation"],
        group=node.attributes["groups"],
    )


def _dense(values: Values, node: Node) -> str:
    x, kernel = map(values.plain, node.inputs)
    whole = all(name in values.ranges for name in node.inputs)
    return values.from_plain(values.dialect.dense(values.builder, x, kernel, whole))


def _maximum(values: Values, node: Node) -> str:
    for x, other in (node.inputs, node.inputs[::-1]):
        constant = values.graph.constants.get(other)
        if constant is not None and constant.array.ndim == 0 and constant.array == 0:
            return values.builder.add("Relu", values.operand(x))
    return values.builder.add("Max", *_operands(values, node))


def _select(values: Values, node: Node) -> str:
    builder, (which, *cases) = values.builder, _operands(values, node)
    return builder.add("Where", builder.add("Greater", which, builder.constant(np.float32(0))), *cases)


def _rsqrt(values: Values, node: Node) -> str:
    return values.builder.add("Reciprocal", values.builder.add("Sqrt", values.operand(node.inputs[0])))


def _power(values: Values, node: Node) -> str:
    """By squaring, as compilers do it: Pow may round otherwise."""
    builder, exponent = values.builder, node.attributes["exponent"]
    factor, left, product = values.operand(node.inputs[0]), abs(exponent), None
    while left:
        if left % 2:
            product = factor if product is None else builder.add("Mul", product, factor)
        left //= 2
        if left:
            factor = builder.add("Mul", factor, factor)
    if product is None:
        return builder.add("Pow", factor, builder.constant(np.float32(0)))
    return product if exponent > 0 else builder.add("Reciprocal", product)


def _max_pool(values: Values, node: Node) -> str:
    (top, bottom), (left, right) = node.attributes["padding"]
    return values.builder.add(
        "MaxPool",
        values.operand(node.inputs[0]),
        kernel_shape=node.attributes["window"],
        strides=node.attributes["strides"],
        pads=(top, left, bottom, right),
    )


def _sum_pool(values: Values, node: Node) -> str:
    """A convolution with ones: AveragePool divides, which rounds."""
    builder, x, window = values.builder, node.inputs[0], node.attributes["window"]
    (top, bottom), (left, right) = node.attributes["padding"]
    channels, whole = builder.shape(values.operand(x))[1], x in values.ranges
    ones, bit = np.ones((channels, 1, *window), np.float32), IntegerFormat(bits=1, signed=False)
    return builder.add(
        "Conv",
        values.operand(x),
        values.dialect.constant(builder, ones, bit if whole else None, "ones"),
        kernel_shape=window,
        strides=node.attributes["strides"],
        pads=(top, left, bottom, right),
        group=channels,
    )


def _sum(values: Values, node: Node) -> str:
    return _reduced("ReduceSum", values, node)


def _max(values: Values, node: Node) -> str:
    return _reduced("ReduceMax", values, node)


def _reduced(operation: str, values: Values, node: Node) -> str:
    builder, x, axes = values.builder, node.inputs[0], node.attributes["axes"]
    if values.rank(x) == 4 and {1, 2} <= set(axes):  # What is left has the same order in both layouts.
        axes = builder.numbers(sorted(TO_NCHW.index(axis) for axis in axes))
        return builder.add(operation, values.operand(x), axes, keepdims=0)
    return values.from_plain(builder.add(operation, values.plain(x), builder.numbers(axes), keepdims=0))


def _pad(values: Values, node: Node) -> str:
    padding = _in_model(values, node.inputs[0], node.attributes["padding"])
    pads = [before for before, _ in padding] + [after for _, after in padding]
    return values.builder.add("Pad", values.operand(node.inputs[0]), values.builder.numbers(pads))


def _slice(values: Values, node: Node) -> str:
    builder, tensor = values.builder, values.operand(node.inputs[0])
    bounds = zip(*(node.attributes[name] for name in ("start", "stop", "step")), strict=True)
    bounds = [
        (axis, start, _END if stop is None else stop, step)
        for axis, (start, stop, step) in enumerate(_in_model(values, node.inputs[0], tuple(bounds)))
        if (start, stop, step) != (0, None, 1)
    ]
    if not bounds:
        return builder.add("Identity", tensor)
    axes, starts, stops, steps = map(builder.numbers, zip(*bounds, strict=True))
    return builder.add("Slice", tensor, starts, stops, axes, steps)


def _in_model(values: Values, name: str, per_axis: tuple) -> list:
    """What is given for every axis of a value, in the order of the tensor's axes."""
    return [per_axis[axis] for axis in (TO_NCHW if values.rank(name) == 4 else range(len(per_axis)))]


def _reshape(values: Values, node: Node) -> str:
    builder = values.builder
    shape = builder.numbers(node.attributes["shape"])
    return values.from_plain(builder.add("Reshape", values.plain(node.inputs[0]), shape))


def _transpose(values: Values, node: Node) -> str:
    permutation = list(node.attributes["permutation"])
    if len(permutation) == 4:
        permutation = [TO_NCHW.index(permutation[axis]) for axis in TO_NCHW]
    return values.builder.add("Transpose", values.operand(node.inputs[0]), perm=permutation)


def _concatenate(values: Values, node: Node) -> str:
    axis = node.attributes["axis"]
    axis = TO_NCHW.index(axis) if values.rank(node.inputs[0]) == 4 else axis
    return values.builder.add("Concat", *(values.operand(name) for name in node.inputs), axis=axis)


_OPERATIONS = {
    "quantize": _quantize,
    "conv": _conv,
    "dense": _dense,
    "maximum": _maximum,
    "select": _select,
    "rsqrt": _rsqrt,
    "power": _power,
    "max_pool": _max_pool,
    "sum_pool": _sum_pool,
    "sum": _sum,
    "max": _max,
    "pad": _pad,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _transpose,
    "concatenate": _concatenate,
}
