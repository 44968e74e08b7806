"""The network of a file, whatever the file's format: numbered values, and the operations between them."""

import dataclasses
import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from qflax.verify.executor import evaluate
from qflax.verify.formats import Format
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
    """

    operation: str
    inputs: tuple[int, ...]
    output: int
    attributes: dict[str, typing.Any]
    layer: str
    promised: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network with one input, value 0, and one output.

    Attributes:
      path: of the file.
      dialect: `packed` or `QONNX`.
      shape: of one example: of images [height, width, channels].
      output: number of the value.
      nodes: in an order in which they can be executed.
      constants: number format of every constant of the file; None of one without.
      fixed: values that do not depend on the input: constants, and what is computed from them.
      shapes: of every value, for as many examples as the file declares.
      probe: what the trained network answered; None in files of other tools.
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


class Builder:
    """Takes up constants and nodes in order; every value gets the next number.

    It executes each node at once, for an example of zeros, so that shapes are known and a node that cannot be
    executed is found while its file is read.
    """

    def __init__(self, shape: Sequence[int], batch: int = 1):
        """The input is [batch, *shape]."""
        self.shape, self.batch = tuple(shape), batch
        self.nodes: list[Node] = []
        self.constants: dict[int, Format | None] = {}
        self.fixed: dict[int, np.ndarray] = {}
        self._values = [np.zeros((batch, *self.shape), np.float32)]

    def constant(self, array: np.ndarray, format: Format | None = None) -> int:
        """Number of a new constant."""
        number = self._add(np.asarray(array, np.float32))
        self.constants[number], self.fixed[number] = format, self._values[number]
        return number

    def node(
        self,
        operation: str,
        inputs: Sequence[int],
        layer: str = "",
        promised: int | None = None,
        **attributes: typing.Any,
    ) -> int:
        """Number of a new node's output."""
        value = evaluate(operation, [self._values[i] for i in inputs], attributes)
        number = self._add(value)
        if all(i in self.fixed for i in inputs):
            self.fixed[number] = value
        node = Node(
            operation=operation,
            inputs=tuple(inputs),
            output=number,
            attributes=attributes,
            layer=layer,
            promised=promised,
        )
        self.nodes.append(node)
        return number

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Of a value."""
        return self._values[number].shape

    def network(self, path: pathlib.Path, dialect: str, output: int, probe: Probe | None) -> Network:
        """What was built; ValueError if the output does not have the examples of the input."""
        if self.shape_of(output)[:1] != (self.batch,):
            raise ValueError(f"output {list(self.shape_of(output))} of {self.batch} example")
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
        )

    def _add(self, value: np.ndarray) -> int:
        self._values.append(value)
        return len(self._values) - 1
