"""NumPy execution: sums of integers exactly, all other arithmetic in float32 step by step.

Sums of what is not integers are made in float64 and then rounded to float32. So are elementary functions.
"""

import math
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qflax.errors import UserError, one_line, require
from qflax.verify.formats import IntegerFormat
from qflax.verify.limits import MALFORMED, cost

if typing.TYPE_CHECKING:
    from qflax.verify.network import Network

EXACT_FLOAT32 = 2**24  # Up to here all integers are float32 numbers.
_COLUMNS = 2**19  # Elements of the matrix that a convolution is turned into at a time: some MiB of cache.


def run(
    network: "Network", x: np.ndarray, observe: Callable[[int, np.ndarray], None] | None = None
) -> np.ndarray:
    """Executes a network.

    Args:
      network: what `load` returned.
      x: [examples, *network.shape].
      observe: is told the number and the array of every value that a node computes, for as many examples at
        a time as are executed at once.

    Returns:
      float32 [examples, ...].
    """
    require(
        x.shape[1:] == network.shape,
        f"{network.path}: an input of {list(x.shape[1:])} was given; it takes {list(network.shape)}",
    )
    count, step = len(x), network.examples
    if not network.apart:  # As many as the file declares, always.
        x = np.concatenate([x, np.zeros((-count % step, *network.shape), x.dtype)])
    parts = [x[i : i + step] for i in range(0, max(1, len(x)), step)]
    return np.concatenate([_run(network, part, observe) for part in parts])[:count]


def _run(network: "Network", x: np.ndarray, observe: Callable[[int, np.ndarray], None] | None) -> np.ndarray:
    last = {i: index for index, node in enumerate(network.nodes) for i in node.inputs}
    values = {0: np.asarray(x, np.float32), **network.fixed}
    for index, node in enumerate(network.nodes):
        if node.output in network.fixed:
            continue
        try:
            y = evaluate(node.operation, [values[i] for i in node.inputs], node.attributes)
        except MALFORMED as error:
            raise UserError(
                f"{network.path}: {node.operation} of {node.layer!r}: {one_line(error)}"
            ) from None
        values[node.output] = y
        if observe:
            observe(node.output, y)
        for i in node.inputs:
            if last[i] == index and i != network.output:
                values.pop(i, None)
    y = values[network.output]
    require(y.shape[:1] == x.shape[:1], f"{network.path}: {len(y)} outputs of {len(x)} examples")
    return y


def evaluate(operation: str, arrays: Sequence[np.ndarray], attributes: dict[str, typing.Any]) -> np.ndarray:
    """float32 value of one operation of `OPERATIONS`; ValueError if it would take too much memory."""
    cost(operation, [array.shape for array in arrays], attributes)
    with np.errstate(all="ignore"):
        return np.asarray(OPERATIONS[operation](*arrays, **attributes), np.float32)


def quantize(x, scale=np.float32(1), zero_point=np.float32(0), *, format, rounding):  # noqa: B008
    """Integers less the zero point, or minifloats, in units of the scale."""
    u = x / scale
    if isinstance(format, IntegerFormat):
        return format.nearest(u + zero_point, rounding) - zero_point
    return format.nearest(u, rounding)


def conv(x, kernel, *, strides, padding, dilation, groups):
    """x [n, height, width, in], kernel [height, width, in / groups, out]: a matrix product of all windows."""
    height, width, depth, features = kernel.shape
    if x.shape[-1] != depth * groups or features % groups:
        raise ValueError(f"inputs {list(x.shape)} do not fit a kernel {list(kernel.shape)}, groups={groups}")
    dtype = _sum_dtype(x, kernel)
    x = np.pad(x.astype(dtype), ((0, 0), *padding, (0, 0)))
    span = [(size - 1) * step + 1 for size, step in zip((height, width), dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, span, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    n, rows, columns = windows.shape[:3]
    windows = windows.reshape(n, rows, columns, groups, depth, height, width)
    windows = windows.transpose(3, 0, 1, 2, 5, 6, 4)
    matrix = kernel.astype(dtype).reshape(-1, groups, features // groups).transpose(1, 0, 2)
    y = np.empty((n, rows, columns, groups, features // groups), np.float32)
    step = max(1, _COLUMNS // max(1, windows[:, :1].size))
    for i in range(0, n, step):
        part = windows[:, i : i + step].reshape(groups, -1, matrix.shape[1]) @ matrix
        y[i : i + step] = part.transpose(1, 0, 2).reshape(-1, rows, columns, *y.shape[3:])
    return y.reshape(n, rows, columns, features)


def dense(x, kernel):
    """x [..., in], kernel [in, out]."""
    dtype = _sum_dtype(x, kernel)
    return x.astype(dtype) @ kernel.astype(dtype)


def _sum_dtype(x, kernel):
    """float32, which is faster, where it holds all sums of products exactly, else float64."""
    if not (np.array_equal(x, np.rint(x)) and np.array_equal(kernel, np.rint(kernel))):
        return np.float64
    norms = np.abs(kernel).astype(np.float64).reshape(-1, kernel.shape[-1]).sum(0)
    largest = np.abs(x).max(initial=0).astype(np.float64) * norms.max(initial=0)
    return np.float32 if largest <= EXACT_FLOAT32 else np.float64


def _places(x, window, strides, padding, fill) -> Iterator[np.ndarray]:
    """What every place of a window sees: [n, rows, columns, channels] each."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    rows, columns = ((size - w) // s + 1 for size, w, s in zip(x.shape[1:3], window, strides, strict=True))
    for i in range(window[0]):
        for j in range(window[1]):
            yield x[:, i :: strides[0], j :: strides[1]][:, :rows, :columns]


def max_pool(x, *, window, strides, padding):
    """Largest of every window."""
    places = _places(x, window, strides, padding, -np.inf)
    y = next(places).copy()
    for place in places:
        np.maximum(y, place, out=y)
    return y


def sum_pool(x, *, window, strides, padding):
    """Sum of every window."""
    return sum(_places(x.astype(np.float64), window, strides, padding, 0.0))


def power(x, *, exponent):
    """Products by repeated squaring; a negative exponent is the reciprocal of the positive one."""
    y, factor, rest = None, x, abs(exponent)
    while rest:
        if rest % 2:
            y = factor if y is None else y * factor
        rest //= 2
        factor = factor * factor if rest else factor
    y = np.ones_like(x) if y is None else y
    return np.float32(1) / y if exponent < 0 else y


def reshape(x, *, shape):
    """-1 is the batch."""
    return x.reshape(shape)


def slice_(x, *, start, stop, step):
    """Per axis."""
    if not len(start) == len(stop) == len(step) == x.ndim:
        raise ValueError(f"start, stop and step must have {x.ndim} numbers, one an axis")
    return x[tuple(slice(*bounds) for bounds in zip(start, stop, step, strict=True))]


def _wide(function):
    """In float64."""
    return lambda x: function(x.astype(np.float64))


ELEMENTARY = {
    "exp": _wide(np.exp),
    "log": _wide(np.log),
    "tanh": _wide(np.tanh),
    "logistic": _wide(lambda x: 1 / (1 + np.exp(-x))),
    "erf": _wide(lambda x: np.fromiter(map(math.erf, x.flat), np.float64, x.size).reshape(x.shape)),
    "rsqrt": _wide(lambda x: 1 / np.sqrt(x)),
    "sin": _wide(np.sin),
    "cos": _wide(np.cos),
}
BINARY = {
    "multiply": np.multiply,
    "divide": np.divide,
    "add": np.add,
    "subtract": np.subtract,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
UNARY = {
    **ELEMENTARY,
    "negative": np.negative,
    "absolute": np.abs,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "sign": np.sign,
}
OPERATIONS = {
    "quantize": quantize,
    "conv": conv,
    "dense": dense,
    **BINARY,
    **UNARY,
    "select": lambda which, a, b: np.where(which > 0, a, b),
    "power": power,
    "max_pool": max_pool,
    "sum_pool": sum_pool,
    "sum": lambda x, *, axes: x.astype(np.float64).sum(axes),
    "max": lambda x, *, axes: x.max(axes),
    "pad": lambda x, *, padding: np.pad(x, padding),
    "slice": slice_,
    "reshape": reshape,
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "concatenate": lambda *arrays, axis: np.concatenate(arrays, axis),
}
