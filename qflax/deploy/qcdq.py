"""QCDQ: plain ONNX for onnxruntime, with QuantizeLinear, Clip and DequantizeLinear for quantizers."""

import typing

import numpy as np

from qflax.deploy.graph import Format, Graph
from qflax.deploy.onnx_builder import Builder
from qflax.deploy.onnx_model import to_model
from qflax.deploy.onnx_values import Quantizer
from qflax.errors import UserError
from qflax.numerics import IntegerFormat

if typing.TYPE_CHECKING:
    import onnx

_WIDEST_EXACT = 24  # Bits of integers that float32 holds.


def to_qcdq(graph: Graph, batch: int | None = None) -> "onnx.ModelProto":
    """The network as QCDQ.

    Quantizers of at most 8 bits are QuantizeLinear, Clip where the format is narrower than its type, and
    DequantizeLinear, with the scale 1 and the zero point 0; wider ones round and clip in float32. Weights
    are integers before a DequantizeLinear. All scales are explicit, as Div before a quantizer and Mul behind
    a sum: the sums themselves are of integers, and below 2^24 exact in float32, in any order.

    onnxruntime then gives the graph's numbers bit for bit, with all its optimizations. Some of these would
    change them and are kept away: a Round, which changes no integer, stands where onnxruntime would merge a
    scale into a MatMul, make a MatMul or Conv of 8-bit integers, whose sums saturate on some processors, or a
    MatMulNBits, which rounds its inputs to 8 bits once more.
    DequantizeLinear keeps it from merging a scale into the weights of a Conv.

    Args:
      graph: see `deploy.lower`.
      batch: images in a batch; None leaves it open.

    Returns:
      The model, see `onnx_model.to_model`.

    Raises:
      UserError: the network has minifloats, or onnx is not installed.
    """
    return to_model(graph, QcdqDialect(), batch)


class QcdqDialect:
    """Quantizers as conversions to 8-bit integers and back."""

    opsets: dict[str, int] = {}

    def constant(self, builder: Builder, array: np.ndarray, fmt: Format | None, name: str) -> str:
        """See `Dialect`."""
        if fmt is None:
            return builder.constant(array, name)
        _check(builder, fmt)
        if fmt.bits > _WIDEST_EXACT:
            return builder.constant(array, name)
        dtype = _dtype(fmt) if fmt.bits <= 8 else np.int32
        return _dequantized(builder, builder.constant(array.astype(dtype), name), dtype)

    def dense(self, builder: Builder, x: str, kernel: str, whole: bool) -> str:
        """See `Dialect`."""
        if not whole:
            return builder.add("MatMul", x, kernel)
        return builder.add("Round", builder.add("MatMul", *(builder.add("Round", y) for y in (x, kernel))))

    def quantize(self, builder: Builder, x: str, quantizer: Quantizer) -> str:
        """See `Dialect`."""
        fmt = quantizer.format
        _check(builder, fmt)
        if fmt.bipolar:
            return _bipolar(builder, x)
        bare = quantizer.scale is None and quantizer.zero_point is None
        if quantizer.rounding != "half_even" or fmt.bits > 8 or bare:
            x = _rounded(builder, x, quantizer.rounding)
        if fmt.bits > 8:
            return builder.add("Clip", x, *_limits(builder, fmt, np.float32))
        dtype = _dtype(fmt)
        x = builder.add("QuantizeLinear", x, builder.constant(np.float32(1)), builder.constant(dtype(0)))
        if (fmt.lowest, fmt.highest) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
            x = builder.add("Clip", x, *_limits(builder, fmt, dtype))
        return _dequantized(builder, x, dtype)


def _check(builder: Builder, fmt: Format) -> None:
    if not isinstance(fmt, IntegerFormat):
        raise UserError(f"{builder.place}: QCDQ has no minifloats; export to qonnx or a packed file instead")


def _dtype(fmt: IntegerFormat) -> type:
    return np.int8 if fmt.signed else np.uint8


def _limits(builder: Builder, fmt: IntegerFormat, dtype: type) -> list[str]:
    return [builder.constant(dtype(limit)) for limit in (fmt.lowest, fmt.highest)]


def _dequantized(builder: Builder, tensor: str, dtype: type) -> str:
    one, zero = builder.constant(np.float32(1)), builder.constant(dtype(0))
    return builder.add("DequantizeLinear", tensor, one, zero)


def _rounded(builder: Builder, x: str, rounding: str) -> str:
    if rounding == "toward_zero":
        magnitude = builder.add("Floor", builder.add("Abs", x))
        return builder.add("Mul", builder.add("Sign", x), magnitude)
    return builder.add({"half_even": "Round", "floor": "Floor", "ceil": "Ceil"}[rounding], x)


def _bipolar(builder: Builder, x: str) -> str:
    positive = builder.add("GreaterOrEqual", x, builder.constant(np.float32(0)))
    plus, minus = (builder.constant(np.float32(value)) for value in (1, -1))
    return builder.add("Where", positive, plus, minus)
