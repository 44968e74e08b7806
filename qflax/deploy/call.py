"""What the rules for primitives work with: values of a traced program, and the equation at hand."""

import dataclasses
import typing

import numpy as np

from qflax.deploy.graph import Format
from qflax.errors import UserError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """The output of a node, or the input.

    Attributes:
      name: in the graph.
      shape: in the traced program.
      held: of the array in the graph, which may have an axis of 1 where `shape` has more, as operands of
        elementwise operations may.
    """

    name: str
    shape: Shape
    held: Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What does not depend on the input.

    Attributes:
      array: of the shape `held`, see `Value`.
      shape: in the traced program.
      format, accumulator_bits: as of `graph.Constant`.
    """

    array: np.ndarray
    shape: Shape
    format: Format | None = None
    accumulator_bits: int | None = None

    @property
    def held(self) -> Shape:
        """See `Value`."""
        return self.array.shape

    def whole(self) -> np.ndarray:
        """The array in its full shape."""
        return np.broadcast_to(self.array, self.shape)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What holds where a value is positive; the other way about if it is `negated`."""

    value: Value | Known
    negated: bool = False

    @property
    def shape(self) -> Shape:
        """Of the value."""
        return self.value.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """An equation, whose inputs have been looked up.

    Attributes:
      name: of the primitive or of the quantizers' operation.
      parameters: of the primitive; of an operation its options.
      inputs: at least one of them a `Value`.
      shape: of the output.
      layer: path of the module.
      emit: makes a node of (operation, inputs, attributes), whose value has the shape given.
    """

    name: str
    parameters: dict[str, typing.Any]
    inputs: list[Value | Known]
    shape: Shape
    layer: str
    emit: typing.Callable[..., Value]

    def node(
        self, operation: str, *inputs: Value | Known, result: Shape | None = None, **attributes
    ) -> Value:
        """A node of this equation, or of a part of it that has the shape `result`."""
        return self.emit(operation, inputs, self.shape if result is None else result, attributes, self.layer)

    def elementwise(self, operation: str, *inputs: Value | Known, **attributes) -> Value:
        """A node whose operands are broadcast, and so may be held with axes of 1."""
        held = np.broadcast_shapes(*(x.held for x in inputs))
        return dataclasses.replace(self.node(operation, *inputs, **attributes), held=held)

    def refuse(self, why: str) -> UserError:
        """The error for what a graph cannot say."""
        where = self.layer or "the function"
        return UserError(
            f"{where}: cannot be exported: {self.name} {why}; see qflax/deploy/graph.py for what can"
        )

    def require(self, condition: bool, why: str) -> None:
        """Raises if not."""
        if not condition:
            raise self.refuse(why)

    def whole(self, value: Value | Known) -> Value | Known:
        """`value` with its full shape in the graph, too."""
        return whole(value, self.emit, self.layer)


def whole(value: Value | Known, emit: typing.Callable[..., Value], layer: str) -> Value | Known:
    """`value` with its full shape in the graph, too, by `emit` of `Call`."""
    if isinstance(value, Known):
        return dataclasses.replace(value, array=value.whole())
    for axis, (held, size) in enumerate(zip(value.held, value.shape, strict=True)):
        value = dataclasses.replace(repeated(value, axis, size // held, emit, layer), shape=value.shape)
    return value


def repeated(value: Value, axis: int, times: int, emit: typing.Callable[..., Value], layer: str) -> Value:
    """What the graph holds, several times along an axis."""
    if times == 1:
        return value
    shape = (*value.held[:axis], times * value.held[axis], *value.held[axis + 1 :])
    return emit("concatenate", [value] * times, shape, {"axis": axis}, layer)
