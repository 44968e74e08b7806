"""A graph's values as tensors of an ONNX model, in the layouts that its operations want.

Values of rank 4 are NHWC in the graph and NCHW in the model, whatever they are; those of other ranks are the
same in both.
"""

import dataclasses
import typing

import numpy as np

from qflax.deploy.graph import Format, Graph
from qflax.deploy.onnx_builder import Builder
from qflax.deploy.ranges import Range, integer_ranges

TO_NCHW, TO_NHWC, _TO_OIHW = (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """What a `quantize` node does.

    Attributes:
      format: number format.
      rounding: rounding mode.
      scale: tensor; None if it is 1.
      zero_point: tensor; None if it is 0.
      range: of the node's input, if that is known to be integers.
    """

    format: Format
    rounding: str
    scale: str | None
    zero_point: str | None
    range: Range | None


class Dialect(typing.Protocol):
    """How a kind of ONNX model says what quantizers do; methods add nodes and return the tensor.

    Attributes:
      opsets: version of each domain that nodes are of, besides ONNX' own.
    """

    opsets: dict[str, int]

    def constant(self, builder: Builder, array: np.ndarray, fmt: Format | None, name: str) -> str:
        """Adds an array of the network, of the number format `fmt` if any."""
        ...

    def dense(self, builder: Builder, x: str, kernel: str, whole: bool) -> str:
        """Adds a product of matrices; `whole` if both are known to be integers."""
        ...

    def quantize(self, builder: Builder, x: str, quantizer: Quantizer) -> str:
        """Adds rounding and clipping to codes; `x` is in units of the scale, with the zero point added."""
        ...


class Values:
    """The tensors of a graph's values.

    Attributes:
      graph: whose values they are.
      builder: of the model.
      dialect: of the model.
      ranges: of values that are integers.
    """

    def __init__(self, graph: Graph, builder: Builder, dialect: Dialect, tensor: str):
        """Begins with the graph's input as `tensor`."""
        self.graph, self.builder, self.dialect = graph, builder, dialect
        self.ranges = integer_ranges(graph)
        self._tensors = {graph.input: tensor}
        self._others: dict[tuple[str, object], str] = {}

    def add(self, name: str, tensor: str) -> None:
        """Says which tensor a value is."""
        self._tensors[name] = tensor

    def rank(self, name: str) -> int:
        """Number of dimensions of a value."""
        if name in self.graph.constants:
            return self.graph.constants[name].array.ndim
        return len(self.builder.shape(self._tensors[name]))

    def operand(self, name: str, rank: int | None = None) -> str:
        """A value as an operand of an elementwise operation.

        Args:
          name: of the value.
          rank: of the operation's result; None is that of the value. Constants may have less; other values,
            whose first axis is the batch, do not.
        """
        if name not in self.graph.constants:
            return self._tensors[name]
        if (self.rank(name) if rank is None else rank) != 4:
            return self.plain(name)
        return self._constant(name, "operand", _to_nchw)

    def plain(self, name: str) -> str:
        """A value in the layout of the graph."""
        if name in self.graph.constants:
            return self._constant(name, "plain", np.asarray)
        if self.rank(name) != 4:
            return self._tensors[name]
        return self._transposed(name, TO_NHWC)

    def from_plain(self, tensor: str) -> str:
        """A tensor in the layout of the model from one in the layout of the graph."""
        if len(self.builder.shape(tensor)) != 4:
            return tensor
        return self.builder.add("Transpose", tensor, perm=TO_NCHW)

    def conv_kernel(self, name: str) -> str:
        """A value [height, width, in, out] as [out, in, height, width]."""
        if name in self.graph.constants:
            return self._constant(name, "kernel", lambda array: array.transpose(_TO_OIHW))
        return self._transposed(name, tuple(TO_NCHW.index(axis) for axis in _TO_OIHW))

    def _constant(self, name, layout, arrange):
        if (name, layout) not in self._others:
            constant = self.graph.constants[name]
            array = arrange(constant.array.astype(np.float32))
            tensor = self.dialect.constant(self.builder, array, constant.format, name)
            self._others[name, layout] = tensor
        return self._others[name, layout]

    def _transposed(self, name, permutation):
        if (name, permutation) not in self._others:
            tensor = self.builder.add("Transpose", self._tensors[name], perm=permutation)
            self._others[name, permutation] = tensor
        return self._others[name, permutation]


def _to_nchw(array: np.ndarray) -> np.ndarray:
    """What broadcasts against NCHW as `array` does against NHWC."""
    transposed = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(TO_NCHW)
    while array.ndim < 4 and transposed.shape[:1] == (1,):
        transposed = transposed[0]
    return transposed
