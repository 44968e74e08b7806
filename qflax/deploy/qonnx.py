"""QONNX: ONNX with operations for quantizers of any width, as the tools around FINN and Brevitas read it."""

import typing

import numpy as np

from qflax.deploy.graph import Format, Graph
from qflax.deploy.onnx_builder import Builder
from qflax.deploy.onnx_model import to_model
from qflax.deploy.onnx_values import Quantizer
from qflax.errors import require
from qflax.numerics import IntegerFormat, MinifloatFormat, width_of_extremes

if typing.TYPE_CHECKING:
    import onnx

DOMAIN = "qonnx.custom_op.general"

_ROUNDING = {"half_even": "ROUND", "floor": "FLOOR", "ceil": "CEIL", "toward_zero": "DOWN"}


def to_qonnx(graph: Graph, batch: int | None = 1) -> "onnx.ModelProto":
    """The network as QONNX.

    Weights are initializers of integers or minifloats, followed by their own `Quant`, `BipolarQuant` or
    `FloatQuant`. All scales are explicit: the input of a quantizer is divided by its scale, sums are
    multiplied by theirs. Sums of integers below 2^24 are then exact in float32, in any order. A quantizer
    that drops the last bits of integers is a `Trunc`.

    The executor of qonnx gives the graph's numbers bit for bit, but for some minifloats: minus zero of a
    format `fnuz` stays; infinity becomes NaN, even where it should saturate; and as the exponent is found by
    a logarithm, magnitudes within a few float32 steps below a power of two may be a step off with `floor`,
    `ceil` and `toward_zero`, or with more than 20 mantissa bits, and those below 1e-35 with 8 exponent bits.
    `qonnx.util.cleanup` folds the `FloatQuant` of weights into them and renames nodes; the model's property
    `qflax` does not follow.

    Args:
      graph: see `deploy.lower`.
      batch: images in a batch; None leaves it open, which qonnx' executor does not accept.

    Returns:
      The model, see `onnx_model.to_model`.

    Raises:
      UserError: a number format that QONNX does not have, or onnx is not installed.
    """
    return to_model(graph, QonnxDialect(), batch)


class QonnxDialect:
    """Quantizers as operations of their own, all with the scale 1 but for `Trunc`."""

    opsets = {DOMAIN: 2}

    def constant(self, builder: Builder, array: np.ndarray, fmt: Format | None, name: str) -> str:
        """See `Dialect`."""
        tensor = builder.constant(array, name)
        if fmt is None:
            return tensor
        if isinstance(fmt, IntegerFormat):
            builder.datatypes[tensor] = _datatype(fmt)
        return _quant(builder, tensor, fmt, "half_even")

    def dense(self, builder: Builder, x: str, kernel: str, whole: bool) -> str:
        """See `Dialect`."""
        del whole
        return builder.add("MatMul", x, kernel)

    def quantize(self, builder: Builder, x: str, quantizer: Quantizer) -> str:
        """See `Dialect`."""
        if quantizer.zero_point in builder.initializers:
            builder.datatypes[quantizer.zero_point] = "INT32"
        if _truncates(builder, quantizer):
            return _trunc(builder, x, quantizer)
        return _quant(builder, x, quantizer.format, quantizer.rounding)


def _datatype(fmt: IntegerFormat) -> str:
    return "BIPOLAR" if fmt.bipolar else f"{'INT' if fmt.signed else 'UINT'}{fmt.bits}"


def _scalars(builder: Builder, *numbers: float) -> list[str]:
    return [builder.constant(np.float32(number)) for number in numbers]


def _quant(builder: Builder, x: str, fmt: Format, rounding: str) -> str:
    if isinstance(fmt, MinifloatFormat):
        return _float_quant(builder, x, fmt, rounding)
    if fmt.bipolar:
        return builder.add("BipolarQuant", x, *_scalars(builder, 1), domain=DOMAIN)
    return builder.add(
        "Quant",
        x,
        *_scalars(builder, 1, 0, fmt.bits),
        domain=DOMAIN,
        signed=int(fmt.signed),
        narrow=int(fmt.signed and fmt.narrow),
        rounding_mode=_ROUNDING[rounding],
    )


def _float_quant(builder: Builder, x: str, fmt: MinifloatFormat, rounding: str) -> str:
    require(
        fmt.signed and fmt.subnormals,
        f"{builder.place}: QONNX has no minifloats without sign or subnormals; export to a packed file",
    )
    return builder.add(
        "FloatQuant",
        x,
        *_scalars(builder, 1, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.max),
        domain=DOMAIN,
        has_inf=int(fmt.specials == "ieee"),
        has_nan=int(fmt.specials != "none"),
        has_subnormal=1,
        saturation=int(fmt.saturate),
        rounding_mode=_ROUNDING[rounding],
    )


def _truncates(builder: Builder, quantizer: Quantizer) -> bool:
    """Whether what the quantizer does is to drop the last bits of integers."""
    fmt, scale = quantizer.format, builder.array(quantizer.scale)
    if not isinstance(fmt, IntegerFormat) or fmt.bipolar or quantizer.zero_point or quantizer.range is None:
        return False
    shift = scale is not None and scale.ndim == 0 and scale > 1 and np.frexp(scale)[0] == 0.5
    return shift and quantizer.rounding == "floor" and (fmt.signed or quantizer.range[0] >= 0)


def _trunc(builder: Builder, x: str, quantizer: Quantizer) -> str:
    """`x` is divided already: it is on the grid of 1 / scale, and the output on that of 1."""
    fmt, step = quantizer.format, 1 / builder.array(quantizer.scale)
    low, high = quantizer.range
    bits = width_of_extremes(min(low, 0), max(high, 0)) - (not fmt.signed)
    return builder.add(
        "Trunc",
        x,
        *_scalars(builder, step, 0, bits, 1, fmt.bits),
        domain=DOMAIN,
        signed=int(fmt.signed),
        narrow=int(fmt.signed and fmt.narrow),
        rounding_mode="FLOOR",
    )
