"""The network of a file, whatever the file's format: numbered values, and the operations between them."""

import dataclasses
import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from qflax.errors import one_line
from qflax.untrusted import ELEMENTS, TOTAL, size_of
from qflax.verify.examples import keeps_apart
from qflax.verify.executor import evaluate
from qflax.verify.formats import Format, IntegerFormat
from qflax.verify.limits import WORK, cost
from qflax.verify.probe import Probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """An operation of `executor.OPERATIONS`.

    Attributes:
      operation: its name.
      inputs: numbers of values.
      output: number of the value.
      attributes: of the operation.
      layer: name for people: a path of modules, or the name in the file.
      promised: width of the accumulator that a conv's or dense's kernel was made for, or None.
      stored: type that the file has the value in, where it is computed in that: beyond it wraps around.
      loose: whether programs differ in how they round it.
    """

    operation: str
    inputs: tuple[int, ...]
    output: int
    attributes: dict[str, typing.Any]
    layer: str
    promised: int | None = None
    stored: IntegerFormat | None = None
    loose: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network with one input, value 0, and one output.

    Attributes:
      path: of the file.
      dialect: `packed`, `QONNX`, or `ONNX` as of QCDQ files.
      shape: of one example: of images [height, width, channels].
      output: number of the value.
      nodes: in an order in which they can be executed.
      constants: number format of every constant of the file; None of one without.
      fixed: values that do not depend on the input: constants, and what is computed from them.
      shapes: of every value, for as many examples as the file declares.
      probe: what the trained network answered; None in files of other tools.
      examples: how many are executed at once.
      apart: whether an example's outputs do not depend on the others that are executed with it.
      inputs: least and greatest number of the input, or None where the file does not tell.
    """

    path: pathlib.Path
    dialect: str
    shape: tuple[int, ...]
    output: int
    nodes: tuple[Node, ...]
    constants: dict[int, Format | None]
    fixed: dict[int, np.ndarray]
    shapes: dict[int, tuple[int, ...]]
    probe: Probe | None
    examples: int
    apart: bool
    inputs: tuple[float, float] | None


class Builder:
    """Takes up constants and nodes in order; every value gets the next number.

    It executes each node at once, for an example of zeros, so that shapes are known and a node that cannot be
    executed is found while its file is read. ValueError if all of it would take too much memory or time.
    """

    def __init__(self, shape: Sequence[int], batch: int = 1):
        """The input is [batch, *shape]."""
        self.shape, self.batch = tuple(shape), batch
        self.nodes: list[Node] = []
        self.constants: dict[int, Format | None] = {}
        self.fixed: dict[int, np.ndarray] = {}
        self.mixing: Node | None = None  # The first one that does something across examples.
        self._largest, self._work, self._kept = size_of((batch, *self.shape)), 0, 0
        self._values = [_zeros((batch, *self.shape))]

    def constant(self, array: np.ndarray, format: Format | None = None) -> int:
        """Number of a new constant; ValueError for integers that float32 does not hold."""
        size_of(array.shape, least=0)
        with np.errstate(over="ignore"):
            numbers = np.asarray(array, np.float32)
        if isinstance(format, IntegerFormat) and not np.array_equal(numbers.astype(np.float64), array):
            raise ValueError("integers that float32 does not hold, beyond 2^24")
        number = self._add(numbers, fixed=True)
        self.constants[number] = format
        return number

    def node(
        self,
        operation: str,
        inputs: Sequence[int],
        layer: str = "",
        promised: int | None = None,
        stored: IntegerFormat | None = None,
        loose: bool = False,
        **attributes: typing.Any,
    ) -> int:
        """Number of a new node's output."""
        arrays = [self._values[i] for i in inputs]
        if operation == "quantize" and inputs[1] in self.fixed:
            _require_scale(arrays[1])
        largest, work = cost(operation, [array.shape for array in arrays], attributes)
        self._largest, self._work = max(self._largest, largest), self._work + work
        self._require_work(1)
        value = evaluate(operation, arrays, attributes)
        number = self._add(value, fixed=all(i in self.fixed for i in inputs))
        node = Node(
            operation=operation,
            inputs=tuple(inputs),
            output=number,
            attributes=attributes,
            layer=one_line(layer),
            promised=promised,
            stored=stored,
            loose=loose,
        )
        self.nodes.append(node)
        if number not in self.fixed and not keeps_apart(
            operation,
            [array.shape for array in arrays],
            [i in self.fixed for i in inputs],
            value.shape,
            attributes,
        ):
            self.mixing = self.mixing or node
        return number

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Of a value."""
        return self._values[number].shape

    def network(
        self,
        path: pathlib.Path,
        dialect: str,
        output: int,
        probe: Probe | None,
        inputs: tuple[float, float] | None = None,
    ) -> Network:
        """What was built; ValueError if the output does not have the examples of the input."""
        if self.shape_of(output)[:1] != (self.batch,) or 0 in self.shape_of(output):
            raise ValueError(f"output {list(self.shape_of(output))} of {self.batch} example")
        if probe:
            size_of((len(probe.outputs), *self.shape))
            self._require_work(-(-len(probe.outputs) // self.batch))
        return Network(
            path=path,
            dialect=dialect,
            shape=self.shape,
            output=output,
            nodes=tuple(self.nodes),
            constants=self.constants,
            fixed=self.fixed,
            shapes={number: value.shape for number, value in enumerate(self._values)},
            probe=probe,
            examples=self.batch if self.mixing else max(1, self.batch * ELEMENTS // self._largest),
            apart=self.mixing is None,
            inputs=(probe.low, probe.high) if probe else inputs,
        )

    def _add(self, value: np.ndarray, fixed: bool) -> int:
        self._values.append(value if fixed else _zeros(value.shape))
        number = len(self._values) - 1
        if fixed:
            self.fixed[number] = value
            self.keep(value.size)
        return number

    def keep(self, size: int) -> None:
        """Counts elements that are kept while the file is read."""
        self._kept += size
        if self._kept > TOTAL:
            raise ValueError(f"constants of more than {TOTAL:,} elements together")

    def _require_work(self, times: int) -> None:
        if self._work * times > WORK:
            raise ValueError(f"executing it takes more than {WORK:,} products")


def _zeros(shape: Sequence[int]) -> np.ndarray:
    """Takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def _require_scale(scale: np.ndarray) -> None:
    wrong = scale[~((scale > 0) & (scale < np.inf))]
    if wrong.size:
        raise ValueError(f"a scale of {wrong[0]}; scales are positive numbers")
