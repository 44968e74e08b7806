"""What translations of ONNX nodes work with."""

import typing
from collections.abc import Sequence

import numpy as np

from qflax.verify.executor import OPERATIONS
from qflax.verify.formats import Format, IntegerFormat
from qflax.verify.limits import cost
from qflax.verify.network import Builder

_ROUNDINGS = {
    **dict.fromkeys(("ROUND", "HALF_EVEN"), "half_even"),
    **dict.fromkeys(("ROUND_TO_ZERO", "DOWN"), "toward_zero"),
    "CEIL": "ceil",
    "FLOOR": "floor",
}
_INTEGERS = {
    f"{'' if signed else 'u'}int{n}": (n, signed) for n in (2, 4, 8, 16, 32) for signed in (True, False)
}


class Context:
    """An ONNX node that is being translated, and the network so far.

    Attributes:
      builder: of the network.
      values: name -> number, of what depends on the input, or was used as an operand.
      arrays: name -> array of its own dtype, of initializers and Constants.
      choices: name -> number of what is positive where a comparison holds, whose own result, 1 or 0, is no
        value; and whether that is 1 or -1.
      types: name -> dtype of what depends on the input, in the file.
      inputs: names; "" of an optional one that is left out.
      output: name.
      attributes: by name.
      layer: name of the node for people.
      promised, stored, loose: of the nodes that it becomes, see `network.Node`.
    """

    def __init__(
        self,
        builder: "Builder | Folder",
        values: dict[str, int],
        arrays: dict[str, np.ndarray],
        choices: dict[str, tuple[int, bool]],
        types: dict[str, np.dtype],
        node,
        promised: int | None = None,
    ):
        from onnx import helper

        self.builder, self.values, self.arrays, self.promised = builder, values, arrays, promised
        self.choices, self.types = choices, types
        self.stored: IntegerFormat | None = None
        self.loose = False
        self.inputs, self.output, self.layer = list(node.input), node.output[0], node.name or node.output[0]
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def attribute(self, name: str, default: typing.Any = None) -> typing.Any:
        """Of the node; text as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Whether the optional input is there."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def value(self, index: int) -> int:
        """Number of an input."""
        name = self.inputs[index]
        if name not in self.values:
            self.values[name] = self.constant(self.arrays[name])
        return self.values[name]

    def array(self, index: int) -> np.ndarray:
        """An input that must be constant."""
        name = self.inputs[index]
        if name in self.arrays:
            return self.arrays[name]
        if self.values[name] not in self.builder.fixed:
            raise ValueError(f"{name!r} must be constant")
        return self.builder.fixed[self.values[name]]

    def is_all(self, index: int, number: float) -> bool:
        """Whether an input is constant, and all of it this number."""
        name = self.inputs[index]
        array = self.arrays.get(name, self.builder.fixed.get(self.values.get(name)))
        return array is not None and bool(np.all(array == number))

    def is_broadcast_to(self, x: int, *others: int) -> bool:
        """Whether a value has the shape to which it and others are broadcast."""
        return np.broadcast_shapes(*map(self.shape, (x, *others))) == tuple(self.shape(x))

    def integers(self, name: str, index: int) -> list[int] | None:
        """From an input, in older versions of ONNX from an attribute; None without."""
        if self.has(index):
            return self.array(index).astype(np.int64).ravel().tolist()
        values = self.attribute(name)
        return None if values is None else list(values)

    def constant(self, array: np.ndarray) -> int:
        """Number of a new constant; stored integers have the format of their type."""
        array = np.asarray(array)
        fmt = integer_type(array.dtype) if array.dtype.name in _INTEGERS else None
        return self.builder.constant(array, fmt)

    def type_of(self, index: int) -> np.dtype:
        """Of an input, in the file."""
        name = self.inputs[index]
        return self.arrays[name].dtype if name in self.arrays else self.types[name]

    def node(self, operation: str, *inputs: int, **attributes: typing.Any) -> int:
        """Number of a new node's output."""
        return self.builder.node(
            operation, inputs, self.layer, stored=self.stored, loose=self.loose, **attributes
        )

    def shape(self, number: int) -> tuple[int, ...]:
        """Of a value."""
        return self.builder.shape_of(number)

    def reshaped(self, x: int, shape: Sequence[int]) -> int:
        """A value of another shape; the batch must stay in front, unless it is a constant."""
        if x in self.builder.fixed:
            return self.node("reshape", x, shape=tuple(shape))
        if shape[0] != self.builder.batch or self.shape(x)[0] != self.builder.batch:
            raise ValueError(f"moves the batch: {list(self.shape(x))} to {list(shape)}")
        return self.node("reshape", x, shape=(-1, *shape[1:]))

    def unary(self, operation: str) -> int:
        """The operation of the first input."""
        return self.node(operation, self.value(0))

    def variadic(self, operation: str) -> int:
        """The operation of two inputs, then with the next."""
        if self.attribute("broadcast", 0):
            raise ValueError("broadcasting along an axis, as before opset 7, is not supported")
        y = self.value(0)
        for i in range(1, len(self.inputs)):
            y = self.node(operation, y, self.value(i))
        return y

    def scaled(self, x: int, scale: int) -> int:
        """`x` times a scale, unless that is 1."""
        array = self.builder.fixed.get(scale)
        return x if array is not None and (array == 1).all() else self.node("multiply", x, scale)

    def rounding(self, default: str) -> str:
        """Rounding mode of a quantizer."""
        mode = self.attribute("rounding_mode", default).upper()
        if mode not in _ROUNDINGS:
            raise ValueError(f"rounding_mode {mode!r} is not known; choices: {', '.join(_ROUNDINGS)}")
        return _ROUNDINGS[mode]


def integer_type(dtype: np.dtype) -> IntegerFormat:
    """Format of a stored type; ValueError for one that is not of integers of at most 32 bits."""
    if dtype.name not in _INTEGERS:
        raise ValueError(f"{dtype.name} is no type of integers; known are {', '.join(_INTEGERS)}")
    bits, signed = _INTEGERS[dtype.name]
    return IntegerFormat.of(bits, signed=signed, narrow=False)


class Folder:
    """In a builder's place where all is constant, and keeps its types.

    Attributes:
      batch: there is none.
      fixed: all values.
    """

    def __init__(self):
        self.batch, self.fixed = None, {}

    def constant(self, array: np.ndarray, format: Format | None = None) -> int:
        """Number of a constant."""
        del format
        self.fixed[len(self.fixed)] = np.asarray(array)
        return len(self.fixed) - 1

    def node(
        self,
        operation: str,
        inputs: Sequence[int],
        layer: str,
        stored: IntegerFormat | None = None,
        loose: bool = False,
        **attributes: typing.Any,
    ) -> int:
        """Number of what an operation gives that moves numbers."""
        del layer, stored, loose
        arrays = [self.fixed[i] for i in inputs]
        cost(operation, [array.shape for array in arrays], attributes)
        return self.constant(OPERATIONS[operation](*arrays, **attributes))

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Of a value."""
        return self.fixed[number].shape
