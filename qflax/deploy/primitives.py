"""What becomes of each primitive of JAX, and of each operation of the quantizers, in a graph."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qflax.deploy.call import Call, Comparison, Known, Value
from qflax.deploy.moving import MOVING, reshaped, sliced
from qflax.errors import require
from qflax.numerics import IntegerFormat

ELEMENTWISE = {
    "mul": "multiply",
    "div": "divide",
    "add": "add",
    "add_any": "add",
    "sub": "subtract",
    "max": "maximum",
    "min": "minimum",
    "product": "multiply",
    "quotient": "divide",
    "neg": "negative",
    "abs": "absolute",
    "round": "round",
    **{name: name for name in ("exp", "log", "tanh", "logistic", "erf", "sqrt", "rsqrt")},
    **{name: name for name in ("floor", "ceil", "sign", "sin", "cos")},
}


def _elementwise(call: Call) -> Value:
    """One of `ELEMENTWISE`."""
    if call.name == "round":
        half_even = call.parameters["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN
        call.require(half_even, "away from zero")
    return call.elementwise(ELEMENTWISE[call.name], *call.inputs)


def _power(call: Call) -> Value:
    return call.elementwise("power", *call.inputs, exponent=call.parameters["y"])


def _square(call: Call) -> Value:
    return call.elementwise("multiply", *call.inputs * 2)


def _clamp(call: Call) -> Value:
    low, x, high = call.inputs
    return call.elementwise("minimum", call.elementwise("maximum", x, low), high)


def _compare(call: Call) -> Comparison | Known:
    """Of NaN, which is not greater either, the answer may be another."""
    a, b = call.inputs
    if isinstance(a, Value) and isinstance(b, Value) and a.name == b.name:  # So JAX looks for NaN.
        return Known(np.full((1,) * len(call.shape), call.name in ("ge", "le", "eq")), call.shape)
    call.require(call.name not in ("eq", "ne"), "of what depends on the input: order is known, equality not")
    if call.name in ("lt", "ge"):
        a, b = b, a
    if isinstance(b, Known) and not np.any(b.array):
        difference = a
    elif isinstance(a, Known) and not np.any(a.array):
        difference = call.elementwise("negative", b)
    else:
        difference = call.elementwise("subtract", a, b)
    return Comparison(difference, negated=call.name in ("ge", "le"))


def _not(call: Call) -> Comparison:
    (x,) = call.inputs
    return dataclasses.replace(x, negated=not x.negated)


def _select(call: Call) -> Value | Known | Comparison:
    which, *cases = call.inputs
    if isinstance(which, Known) and which.array.size == 1:
        return cases[int(which.array.reshape(()))]
    call.require(len(cases) == 2, "among more than two")
    if isinstance(which, Known):
        which = Comparison(_truth(call, which))
    if not which.negated:
        cases = cases[::-1]
    truths = [isinstance(x, Comparison) or isinstance(x, Known) and x.array.dtype == bool for x in cases]
    operands = [which.value, *(_truth(call, x) if any(truths) else x for x in cases)]
    chosen = call.elementwise("select", *operands)
    return Comparison(chosen) if any(truths) else chosen


def _convert(call: Call) -> Value | Known:
    dtype, x = call.parameters["new_dtype"], call.inputs[0]
    call.require(dtype == jnp.float32, f"to {dtype}: a graph computes in float32")
    return _truth(call, x) if isinstance(x, Comparison) else x


def _truth(call: Call, x: Comparison | Known) -> Value | Known:
    """1 where something holds, else 0."""
    if isinstance(x, Known):
        return dataclasses.replace(x, array=x.array.astype(np.float32))
    cases = [Known(np.float32(x.negated == negated), ()) for negated in (False, True)]
    return call.elementwise("select", x.value, *cases)


def _combine(call: Call) -> Comparison:
    operation = {"and": "minimum", "or": "maximum"}[call.name]
    return Comparison(call.elementwise(operation, *(_truth(call, x) for x in call.inputs)))


def _expm1(call: Call) -> Value:
    return call.elementwise("subtract", call.elementwise("exp", *call.inputs), Known(np.float32(1), ()))


def _log1p(call: Call) -> Value:
    return call.elementwise("log", call.elementwise("add", *call.inputs, Known(np.float32(1), ())))


def _erfc(call: Call) -> Value:
    return call.elementwise("subtract", Known(np.float32(1), ()), call.elementwise("erf", *call.inputs))


def _same(call: Call) -> Value | Known:
    return call.inputs[0]


def _quantize_integer(call: Call) -> Value:
    x, scale, zero_point = call.inputs
    options = {"format": call.parameters["format"], "rounding": _rounding(call)}
    return call.node("quantize", call.whole(x), scale, zero_point, **options)


def _quantize_minifloat(call: Call) -> Value:
    x, *scale = call.inputs
    options = {"format": call.parameters["format"], "rounding": _rounding(call)}
    return call.node("quantize", call.whole(x), *(scale or [Known(np.float32(1), ())]), **options)


def _rounding(call: Call) -> str:
    rounding = call.parameters["rounding"]
    return "half_even" if rounding == "stochastic" else rounding  # Without a key it is that.


def _quantize_range(call: Call) -> Value:
    x, step, _, highest = call.inputs
    fmt = learned_format(highest.array, call.parameters["signed"], call.layer)
    zero = Known(np.float32(0), ())
    codes = call.node("quantize", call.whole(x), step, zero, format=fmt, rounding="half_even")
    if np.all(highest.array == fmt.highest):
        return codes
    codes = call.node("minimum", codes, highest)
    lowest = dataclasses.replace(highest, array=-highest.array)
    return call.node("maximum", codes, lowest) if fmt.signed else codes


def learned_format(highest: np.ndarray, signed: bool, layer: str) -> IntegerFormat:
    """The format of codes up to `highest`, of a width that was learned; the widest of several channels."""
    bits = np.log2(np.float64(highest) + 1)
    require(
        np.all(bits == np.round(bits)),
        f"{layer}: its bit width is still being learned; train on until widths are frozen, or lower "
        "config.freeze_widths_after",
    )
    return IntegerFormat(bits=int(bits.max()) + signed, signed=signed, narrow=signed)


# Of convolutions whose images and kernels have the channels last, by number of axes.
_CHANNELS_LAST = {3: ((0, 2, 1), (2, 1, 0), (0, 2, 1)), 4: ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


def _conv(call: Call) -> Value:
    x, kernel = (call.whole(value) for value in call.inputs)
    p = call.parameters
    numbers = p["dimension_numbers"]
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    call.require(layout == _CHANNELS_LAST.get(len(call.shape)), "is not NHWC with HWIO, or NWC with WIO")
    call.require(p["batch_group_count"] == 1, "sums over the batch")
    call.require(min(end for pair in p["padding"] for end in pair) >= 0, "crops its input")
    call.require(isinstance(x, Value), "of a constant by what depends on the input")
    x = _dilated(call, x, p["lhs_dilation"])
    attributes = {
        "strides": tuple(p["window_strides"]),
        "padding": tuple(tuple(pair) for pair in p["padding"]),
        "dilation": tuple(p["rhs_dilation"]),
    }
    groups = p["feature_group_count"]
    if len(call.shape) == 4:
        return call.node("conv", x, kernel, **attributes, groups=groups)
    call.require(isinstance(kernel, Known), "over one axis by what depends on the input")
    kernel = dataclasses.replace(kernel, array=kernel.array[None], shape=(1, *kernel.shape))
    return _as_image(call, "conv", x, kernel, **attributes, groups=groups)


def _dilated(call: Call, x: Value, steps: Sequence[int]) -> Value:
    """`x` [batch, ..., channels] with zeros between its elements, for strided transposed convolutions."""
    if set(steps) == {1}:
        return x
    n, *sizes, channels = x.shape
    apart = [n, *(size for pair in zip(sizes, [1] * len(sizes), strict=True) for size in pair), channels]
    filled = [n, *(size for pair in zip(sizes, steps, strict=True) for size in pair), channels]
    padding = tuple((0, after - before) for before, after in zip(apart, filled, strict=True))
    x = call.node("pad", reshaped(call, x, tuple(apart)), result=tuple(filled), padding=padding)
    dilated = [size * step for size, step in zip(sizes, steps, strict=True)]
    x = reshaped(call, x, (n, *dilated, channels))
    ends = [(size - 1) * step + 1 for size, step in zip(sizes, steps, strict=True)]
    shape = (n, *ends, channels)
    return sliced(call, x, (0,) * len(shape), shape, (1,) * len(shape), shape)


def _as_image(call: Call, operation: str, x: Value, *kernel: Known, **attributes) -> Value:
    """An operation over the width of `x` [batch, width, channels], as of an image of height 1."""
    first = {"strides": 1, "dilation": 1, "window": 1, "padding": (0, 0)}
    attributes = {name: (first[name], *of) if name in first else of for name, of in attributes.items()}
    n, *rest = x.shape
    y = call.node(
        operation,
        reshaped(call, x, (n, 1, *rest)),
        *kernel,
        result=(n, 1, *call.shape[1:]),
        **attributes,
    )
    return reshaped(call, y, call.shape)


def _dot(call: Call) -> Value:
    x, other = (call.whole(value) for value in call.inputs)
    contracted, batch = call.parameters["dimension_numbers"]
    call.require(isinstance(x, Value), "of a constant by what depends on the input")
    if isinstance(other, Value):
        batched = [axes[0] if axes else None for axes in batch] == [0, 0]
    else:
        batched = not any(batch) and 0 not in contracted[0]
    call.require(batched, "sums over the batch, or moves it")
    x = _as_matrices(call, x, batch[0], contracted[0], last=True)
    other = _as_matrices(call, other, batch[1], contracted[1], last=False)
    shape = (*x.shape[:-1], other.shape[-1])
    product = call.node("dense", x, other, result=shape)
    return product if shape == call.shape else reshaped(call, product, call.shape)


def _as_matrices(call: Call, x: Value | Known, batch, contracted, *, last: bool) -> Value | Known:
    """An operand as matrices behind its batch axes, the contracted axes as one, `last` or else before it.

    The input's other axes are left apart where there are no batch axes, as they are for a kernel.
    """
    free = [axis for axis in range(len(x.shape)) if axis not in (*batch, *contracted)]
    order = (*batch, *free, *contracted) if last else (*batch, *contracted, *free)
    depth = int(np.prod([x.shape[axis] for axis in contracted]))
    rows = [x.shape[axis] for axis in free]
    if batch or not last:
        rows = [int(np.prod(rows))]
    shape = (*(x.shape[axis] for axis in batch), *((*rows, depth) if last else (depth, *rows)))
    ordered = tuple(x.shape[axis] for axis in order)
    if isinstance(x, Known):
        return dataclasses.replace(x, array=x.array.transpose(order).reshape(shape), shape=shape)
    if order != tuple(range(len(order))):
        x = call.node("transpose", x, result=ordered, permutation=order)
    return x if shape == ordered else reshaped(call, x, shape)


def _window(call: Call) -> Value:
    p = call.parameters
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    images = len(window) in (3, 4) and all(w[0] == w[-1] == 1 for w in (window, strides))
    images = images and not any((*padding[0], *padding[-1]))
    dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    call.require(images and not dilated, "over other axes than height and width, or dilated")
    operation = {"reduce_window_max": "max_pool", "reduce_window_sum": "sum_pool"}[call.name]
    attributes = {
        "window": tuple(window[1:-1]),
        "strides": tuple(strides[1:-1]),
        "padding": tuple(tuple(pair) for pair in padding[1:-1]),
    }
    x = call.whole(call.inputs[0])
    make = call.node if len(window) == 4 else functools.partial(_as_image, call)
    return make(operation, x, **attributes)


def _reduce(call: Call) -> Value:
    axes = tuple(call.parameters["axes"])
    call.require(0 not in axes, "over the batch")
    operation = {"reduce_sum": "sum", "reduce_max": "max"}[call.name]
    return call.node(operation, call.whole(call.inputs[0]), axes=axes)


def _least(call: Call) -> Value:
    """By the largest of the negative: reduce_min, reduce_window_min."""
    (x,) = call.inputs
    name = call.name.replace("min", "max")
    negative = call.node("negative", call.whole(x), result=x.shape)
    return call.node("negative", RULES[name](dataclasses.replace(call, name=name, inputs=[negative])))


# What a comparison may go into.
TAKING_COMPARISONS = ("not", "and", "or", "select_n", "convert_element_type", "broadcast_in_dim", "copy")

RULES = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "integer_pow": _power,
    "square": _square,
    "clamp": _clamp,
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _compare),
    "not": _not,
    **dict.fromkeys(("and", "or"), _combine),
    "expm1": _expm1,
    "log1p": _log1p,
    "erfc": _erfc,
    "select_n": _select,
    "convert_element_type": _convert,
    "stop_gradient": _same,
    "copy": _same,
    "copy_p": _same,
    "quantize_integer": _quantize_integer,
    "quantize_minifloat": _quantize_minifloat,
    "quantize_range": _quantize_range,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "reduce_window_max": _window,
    "reduce_window_sum": _window,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _least,
    "reduce_window_min": _least,
    **MOVING,
}
