"""What the operations of ONNX are in terms of the executor's."""

import typing
from collections.abc import Callable, Sequence

import numpy as np

from qflax.verify import qonnx_quantizers as quantizers
from qflax.verify.onnx_file import array_of
from qflax.verify.qonnx_context import Context

SUMS = ("Conv", "MatMul", "Gemm")  # Operations with an accumulator.
LOOSE = ("BatchNormalization",)  # Programs differ in the order of what they compute.
MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Concat", "Identity")
WRAPPING = ("Add", "Sub", "Mul", "Neg", "Abs", "ReduceSum", "MatMul")  # Of integers, beyond their type.
# Of integers they give what they give of the same numbers in float32.
WHOLE = (
    *(*MOVING, *quantizers.OF_QONNX),
    *("Clip", "Max", "Min", "Relu", "MaxPool", "ReduceMax", "Sign", "Pad", "Dropout"),
    *("Where", "Greater", "GreaterOrEqual", "Constant", "Cast", "DequantizeLinear"),
)
_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def _constant(c: Context) -> None:
    (kind, value), *rest = c.attributes.items()
    if rest or kind not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise ValueError(f"constants of {sorted(c.attributes)} are not known")
    dtype = np.float32 if "float" in kind else np.int64
    c.arrays[c.output] = array_of(value) if kind == "value" else np.array(value, dtype)


def _pads(
    c: Context, size: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Border of the two axes of an image, (before, after) each."""
    mode = c.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = c.attribute("pads", [0, 0, 0, 0])
        return [(pads[0], pads[2]), (pads[1], pads[3])]
    if mode == "VALID":
        return [(0, 0), (0, 0)]
    total = [max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(size, window, strides, strict=True)]
    half = [n // 2 for n in total]
    pairs = [(low, n - low) for low, n in zip(half, total, strict=True)]
    return pairs if mode == "SAME_UPPER" else [pair[::-1] for pair in pairs]


def _conv(c: Context) -> int:
    x, kernel = c.node("transpose", c.value(0), permutation=_NHWC), c.value(1)
    kernel = c.node("transpose", kernel, permutation=(2, 3, 1, 0))
    strides, dilation = (tuple(c.attribute(name, [1, 1])) for name in ("strides", "dilations"))
    window = [(n - 1) * d + 1 for n, d in zip(c.shape(kernel)[:2], dilation, strict=True)]
    padding = _pads(c, c.shape(x)[1:3], window, strides)
    groups = c.attribute("group", 1)
    y = c.node(
        *("conv", x, kernel),
        strides=strides, padding=padding, dilation=dilation, groups=groups, promised=c.promised,
    )  # fmt: skip
    if c.has(2):
        y = c.node("add", y, c.value(2))
    return c.node("transpose", y, permutation=_NCHW)


def _matmul(c: Context) -> int:
    return c.node("dense", c.value(0), c.value(1), promised=c.promised)


def _gemm(c: Context) -> int:
    x, kernel = c.value(0), c.value(1)
    if c.attribute("transA", 0):
        raise ValueError("transA is not supported")
    if c.attribute("transB", 0):
        kernel = c.node("transpose", kernel, permutation=(1, 0))
    y = c.scaled(
        c.node("dense", x, kernel, promised=c.promised), c.constant(np.float32(c.attribute("alpha", 1.0)))
    )
    if not c.has(2):
        return y
    return c.node("add", y, c.scaled(c.value(2), c.constant(np.float32(c.attribute("beta", 1.0)))))


def _clip(c: Context) -> int:
    x = c.value(0)
    for index, name, operation in ((1, "min", "maximum"), (2, "max", "minimum")):
        if c.has(index):
            x = c.node(operation, x, c.value(index))
        elif name in c.attributes:
            x = c.node(operation, x, c.constant(np.float32(c.attribute(name))))
    return x


def _relu(c: Context) -> int:
    return c.node("maximum", c.value(0), c.constant(np.float32(0)))


def _reciprocal(c: Context) -> int:
    return c.node("divide", c.constant(np.float32(1)), c.value(0))


def _greater(c: Context) -> None:
    above = c.value(0)
    if not (c.is_all(1, 0) and c.is_broadcast_to(above, c.value(1))):
        above = c.node("subtract", above, c.value(1))
    c.choices[c.output] = above, False


def _greater_or_equal(c: Context) -> None:
    """Of QCDQ's bipolar quantizer, x >= 0 ? 1 : -1."""
    if not (c.is_all(1, 0) and c.is_broadcast_to(c.value(0), c.value(1))):
        raise ValueError("only x >= 0 is known")
    fmt = quantizers.IntegerFormat.of(1, signed=True, narrow=False)
    scale = c.constant(np.float32(1))
    c.choices[c.output] = c.node("quantize", c.value(0), scale, format=fmt, rounding="half_even"), True


def _where(c: Context) -> int:
    if c.inputs[0] not in c.choices:
        raise ValueError("chooses by something else than x > y or x >= 0")
    which, is_sign = c.choices[c.inputs[0]]
    cases = c.value(1), c.value(2)
    if is_sign and c.is_all(1, 1) and c.is_all(2, -1) and c.is_broadcast_to(which, *cases):
        return which
    return c.node("select", which, *cases)


def _leaky_relu(c: Context) -> int:
    x, slope = c.value(0), c.attribute("alpha", 0.01)
    return _by_sign(c, c.value(1) if c.has(1) else c.constant(np.float32(slope)), x)


def _elu(c: Context) -> int:
    below = c.node("subtract", c.unary("exp"), c.constant(np.float32(1)))
    return _by_sign(c, c.constant(np.float32(c.attribute("alpha", 1.0))), below)


def _by_sign(c: Context, slope: int, below: int) -> int:
    """The first input where it is positive, elsewhere `slope` times `below`."""
    return c.node("select", c.value(0), c.value(0), c.node("multiply", slope, below))


def _power(c: Context) -> int:
    exponent = c.array(1)
    if exponent.size == 1 and exponent.item() == 0.5:
        return c.unary("sqrt")
    if exponent.size != 1 or exponent.item() != int(exponent.item()):
        raise ValueError(f"exponent {exponent.tolist()}: must be 0.5 or a whole number")
    return c.node("power", c.value(0), exponent=int(exponent.item()))


def _dropout(c: Context) -> int:
    if c.has(2) and c.array(2).any():
        raise ValueError("training_mode is not supported")
    return c.value(0)


def _batch_normalization(c: Context) -> int:
    if c.attribute("training_mode", 0):
        raise ValueError("training_mode is not supported")
    scale, bias, mean, variance = (c.array(i).astype(np.float32) for i in range(1, 5))
    factor = scale / np.sqrt(variance + np.float32(c.attribute("epsilon", 1e-5)))
    offset = bias - mean * factor
    shape = (-1, *(1,) * (len(c.shape(c.value(0))) - 2))
    y = c.node("multiply", c.value(0), c.constant(factor.reshape(shape)))
    return c.node("add", y, c.constant(offset.reshape(shape)))


def _pool(c: Context, operation: str, x: int) -> tuple[int, dict[str, typing.Any]]:
    """The pooled value, NHWC, and the attributes."""
    if c.attribute("ceil_mode", 0) or any(d != 1 for d in c.attribute("dilations", [1, 1])):
        raise ValueError("ceil_mode and dilations are not supported")
    window, strides = tuple(c.attribute("kernel_shape")), tuple(c.attribute("strides", [1, 1]))
    padding = _pads(c, c.shape(x)[1:3], window, strides)
    attributes = dict(window=window, strides=strides, padding=padding)
    return c.node(operation, x, **attributes), attributes


def _max_pool(c: Context) -> int:
    y, _ = _pool(c, "max_pool", c.node("transpose", c.value(0), permutation=_NHWC))
    return c.node("transpose", y, permutation=_NCHW)


def _average_pool(c: Context) -> int:
    x = c.node("transpose", c.value(0), permutation=_NHWC)
    y, attributes = _pool(c, "sum_pool", x)
    counts = c.constant(np.float32(np.prod(attributes["window"])))
    if not c.attribute("count_include_pad", 0) and np.any(attributes["padding"]):
        ones = c.constant(np.ones((1, *c.shape(x)[1:3], 1), np.float32))
        counts = c.node("sum_pool", ones, **attributes)
    return c.node("transpose", c.node("divide", y, counts), permutation=_NCHW)


def _reduced(c: Context, operation: str, axes: Sequence[int], keep: bool) -> tuple[int, int]:
    """The value without its axes, or with size 1 there; and the number of elements each."""
    x = c.value(0)
    shape = c.shape(x)
    axes = tuple(axis % len(shape) for axis in axes)
    count = int(np.prod([shape[axis] for axis in axes]))
    y = c.node(operation, x, axes=axes)
    if keep:
        y = c.reshaped(y, [1 if axis in axes else size for axis, size in enumerate(shape)])
    return y, count


def _reduce(c: Context, operation: str, mean: bool = False) -> int:
    axes = c.integers("axes", 1)
    if not axes:
        if c.attribute("noop_with_empty_axes", 0):
            return c.value(0)
        axes = range(len(c.shape(c.value(0))))
    y, count = _reduced(c, operation, axes, bool(c.attribute("keepdims", 1)))
    return c.node("divide", y, c.constant(np.float32(count))) if mean else y


def _global_average_pool(c: Context) -> int:
    y, count = _reduced(c, "sum", range(2, len(c.shape(c.value(0)))), True)
    return c.node("divide", y, c.constant(np.float32(count)))


def _reshape(c: Context) -> int:
    x, shape = c.value(0), c.integers("shape", 1)
    if not c.attribute("allowzero", 0):
        shape = [c.shape(x)[i] if size == 0 else size for i, size in enumerate(shape)]
    return c.reshaped(x, np.empty(c.shape(x), np.bool_).reshape(shape).shape)


def _flatten(c: Context) -> int:
    shape, axis = c.shape(c.value(0)), c.attribute("axis", 1)
    return c.reshaped(c.value(0), (int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))


def _squeeze(c: Context) -> int:
    shape, axes = c.shape(c.value(0)), c.integers("axes", 1)
    if axes is None:
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    axes = [axis % len(shape) for axis in axes]
    if 0 in axes and c.value(0) not in c.builder.fixed:
        raise ValueError("the batch cannot be squeezed")
    return c.reshaped(c.value(0), [size for axis, size in enumerate(shape) if axis not in axes])


def _unsqueeze(c: Context) -> int:
    axes, shape = c.integers("axes", 1), c.shape(c.value(0))
    return c.reshaped(c.value(0), np.expand_dims(np.empty(shape, np.bool_), tuple(axes)).shape)


def _transpose(c: Context) -> int:
    ndim = len(c.shape(c.value(0)))
    return c.node("transpose", c.value(0), permutation=tuple(c.attribute("perm", range(ndim)[::-1])))


def _pad(c: Context) -> int:
    ndim, pads = len(c.shape(c.value(0))), c.integers("pads", 1)
    axes = c.integers("axes", 3) if c.has(3) else range(ndim)
    value = c.array(2) if c.has(2) else np.asarray(c.attribute("value", 0.0))
    if c.attribute("mode", "constant") != "constant" or value.any():
        raise ValueError("only padding with 0 is supported")
    padding = [(0, 0)] * ndim
    for axis, before, after in zip(axes, pads, pads[len(pads) // 2 :], strict=False):
        padding[axis] = (before, after)
    return c.node("pad", c.value(0), padding=tuple(padding))


def _slice(c: Context) -> int:
    shape = c.shape(c.value(0))
    starts, ends = c.integers("starts", 1), c.integers("ends", 2)
    axes = c.integers("axes", 3) or list(range(len(starts)))
    steps = c.integers("steps", 4) or [1] * len(starts)
    start, stop, step = [0] * len(shape), [None] * len(shape), [1] * len(shape)
    for axis, first, last, stride in zip(axes, starts, ends, steps, strict=True):
        beyond = last >= shape[axis] if stride > 0 else last < -shape[axis]
        first = max(first, -shape[axis])
        start[axis], stop[axis], step[axis] = first, None if beyond else last, stride
    return c.node("slice", c.value(0), start=tuple(start), stop=tuple(stop), step=tuple(step))


def _concat(c: Context) -> int:
    values = [c.value(i) for i in range(len(c.inputs))]
    return c.node("concatenate", *values, axis=c.attribute("axis") % len(c.shape(values[0])))


def _elementwise(method: Callable, table: dict[str, str]) -> dict[str, Callable[[Context], int]]:
    return {name: lambda c, operation=operation: method(c, operation) for name, operation in table.items()}


TRANSLATIONS: dict[str, Callable[[Context], int | None]] = {
    **quantizers.OF_QONNX,
    "QuantizeLinear": quantizers.quantize_linear,
    "DequantizeLinear": quantizers.dequantize_linear,
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    **_elementwise(Context.variadic, {"Add": "add", "Sub": "subtract", "Mul": "multiply", "Div": "divide"}),
    **_elementwise(Context.variadic, {"Max": "maximum", "Min": "minimum"}),
    **_elementwise(Context.unary, {"Sigmoid": "logistic", "Tanh": "tanh", "Exp": "exp", "Log": "log"}),
    **_elementwise(Context.unary, {"Sqrt": "sqrt", "Neg": "negative", "Abs": "absolute", "Erf": "erf"}),
    **_elementwise(Context.unary, {"Floor": "floor", "Ceil": "ceil", "Round": "round", "Sign": "sign"}),
    **_elementwise(Context.unary, {"Sin": "sin", "Cos": "cos"}),
    "Pow": _power,
    "Reciprocal": _reciprocal,
    "GreaterOrEqual": _greater_or_equal,
    "Greater": _greater,
    "Where": _where,
    "Clip": _clip,
    "Relu": _relu,
    **dict.fromkeys(("LeakyRelu", "PRelu"), _leaky_relu),
    "Elu": _elu,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "ReduceSum": lambda c: _reduce(c, "sum"),
    "ReduceMean": lambda c: _reduce(c, "sum", mean=True),
    "ReduceMax": lambda c: _reduce(c, "max"),
    "BatchNormalization": _batch_normalization,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _concat,
    "Identity": lambda c: c.value(0),
    "Dropout": _dropout,
    "Constant": _constant,
    "Cast": quantizers.cast,
}
