"""What the quantizers of QONNX and ONNX are in terms of the executor's operations."""

from collections.abc import Callable

import numpy as np

from qflax.verify.formats import IntegerFormat, MinifloatFormat
from qflax.verify.qonnx_context import Context, integer_type


def _range(c: Context, bits: np.ndarray) -> IntegerFormat:
    """Of QONNX's attributes signed and narrow."""
    if bits.size != 1 or bits.item() != int(bits.item()):
        raise ValueError(f"bit width {bits.tolist()}: must be one whole number")
    signed, narrow = bool(c.attribute("signed", 1)), bool(c.attribute("narrow", 0))
    fmt = IntegerFormat.of(int(bits.item()), signed=signed, narrow=narrow)
    if narrow and not signed:
        fmt = IntegerFormat(bits=fmt.bits, lowest=0, highest=fmt.highest - 1)
    return fmt


def quant(c: Context) -> int:
    """Integers times their scale."""
    scale = c.value(1)
    codes = c.node(
        "quantize", c.value(0), scale, c.value(2), format=_range(c, c.array(3)), rounding=c.rounding("ROUND")
    )
    return c.scaled(codes, scale)


def bipolar_quant(c: Context) -> int:
    """-1 or +1, times the scale."""
    fmt, scale = IntegerFormat.of(1, signed=True, narrow=False), c.value(1)
    return c.scaled(c.node("quantize", c.value(0), scale, format=fmt, rounding="half_even"), scale)


def float_quant(c: Context) -> int:
    """Minifloats times their scale."""
    exponent, mantissa, bias = (int(c.array(i).item()) for i in (2, 3, 4))
    specials = "ieee" if c.attribute("has_inf", 0) else "nan" if c.attribute("has_nan", 0) else "none"
    saturate = bool(c.attribute("saturation", 1))
    # QONNX clips at max_val alone; which codes are no numbers shows in that, or matters for overflow.
    fmt = MinifloatFormat(
        exponent_bits=exponent,
        mantissa_bits=mantissa,
        bias=bias,
        specials="none" if saturate else specials,
        saturate=saturate,
        maximum=float(c.array(5).item()),
    )
    scale = c.value(1)
    rounding = c.rounding("ROUND")
    return c.scaled(c.node("quantize", c.value(0), scale, format=fmt, rounding=rounding), scale)


def trunc(c: Context) -> int:
    """Integers of which the lowest bits are dropped."""
    if len(c.inputs) != 6:
        raise ValueError("only opset 2, with six inputs, is known")
    scale, zero_point, out_scale = c.array(1), c.array(2), c.array(4)
    step = np.exp2(np.rint(np.log2(out_scale.astype(np.float64) / scale))).astype(np.float32)
    sums = c.node("add", c.node("divide", c.value(0), c.value(1)), c.value(2))
    codes = c.node(
        "quantize",
        c.node("round", sums),
        c.constant(step),
        c.constant(np.float32(0)),
        format=_range(c, c.array(5)),
        rounding=c.rounding("FLOOR"),
    )
    if zero_point.any():
        codes = c.node("subtract", codes, c.constant(zero_point / step))
    return c.scaled(codes, c.value(4))


def _in_float32(translate: Callable[[Context], int]) -> Callable[[Context], int]:
    """Whatever type the numbers are stored in."""

    def translated(c: Context) -> int:
        c.types[c.output] = np.dtype(np.float32)
        return translate(c)

    return translated


OF_QONNX = {
    **dict.fromkeys(("Quant", "IntQuant"), _in_float32(quant)),
    "FloatQuant": _in_float32(float_quant),
    "BipolarQuant": _in_float32(bipolar_quant),
    "Trunc": _in_float32(trunc),
}


def _along_axis(c: Context, index: int) -> int:
    """A scale or zero point of QuantizeLinear with its elements along `axis`."""
    if c.attribute("block_size", 0):
        raise ValueError("block_size is not supported")
    array = c.array(index).astype(np.float32)
    if array.size > 1:
        ndim = len(c.shape(c.value(0)))
        shape = [1] * ndim
        shape[c.attribute("axis", 1)] = array.size
        array = array.reshape(shape)
    return c.builder.constant(array)


def _stored_dtype(c: Context) -> np.dtype:
    """Of what QuantizeLinear gives: that of its zero point, or `output_dtype`."""
    from onnx import helper

    asked = c.attribute("output_dtype", 0)
    types = [c.array(2).dtype] if c.has(2) else []
    types += [helper.tensor_dtype_to_np_dtype(asked)] if asked else []
    if types[1:] and types[0] != types[1]:
        raise ValueError(f"output_dtype is {types[1]}, and the zero point {types[0]}")
    return np.dtype(types[0] if types else np.uint8)


def quantize_linear(c: Context) -> int:
    """Integers with their zero point, as ONNX stores them."""
    fmt = integer_type(_stored_dtype(c))
    zero_point = _along_axis(c, 2) if c.has(2) else c.constant(np.float32(0))
    # Rounded before the zero point is added, other than in Quant.
    rounded = c.node("round", c.node("divide", c.value(0), _along_axis(c, 1)))
    codes = c.node(
        "quantize", rounded, c.constant(np.float32(1)), zero_point, format=fmt, rounding="half_even"
    )
    c.types[c.output] = _stored_dtype(c)
    return c.node("add", codes, zero_point)


def dequantize_linear(c: Context) -> int:
    """Integers less their zero point, times the scale."""
    from onnx import TensorProto

    if c.attribute("output_dtype", 0) not in (0, TensorProto.FLOAT):
        raise ValueError("output_dtype must be float32")
    x = c.value(0)
    if c.has(2) and c.array(2).any():
        x = c.node("subtract", x, _along_axis(c, 2))
    c.types[c.output] = np.dtype(np.float32)
    return c.node("multiply", x, _along_axis(c, 1))


def cast(c: Context) -> int | None:
    """To an integer type: floats rounded toward zero and clipped, integers if they fit; else to float32."""
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(c.attribute("to"))
    if c.inputs[0] in c.arrays:
        c.arrays[c.output] = c.arrays[c.inputs[0]].astype(dtype)
        return None
    before, c.types[c.output] = c.type_of(0), dtype
    if dtype == np.float32:
        return c.value(0)
    if dtype.kind == "f":
        raise ValueError(f"to {dtype}: float32 and integers are supported")
    if before != np.float32:
        c.stored = integer_type(dtype)
        return c.node("round", c.value(0))
    one, zero = c.constant(np.float32(1)), c.constant(np.float32(0))
    return c.node("quantize", c.value(0), one, zero, format=integer_type(dtype), rounding="toward_zero")
