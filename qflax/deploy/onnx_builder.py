"""Building blocks of ONNX models: nodes, initializers, and the type of every tensor."""

import collections
import types
import typing

import numpy as np

from qflax.errors import UserError

OPSET, IR_VERSION = 20, 10


def import_onnx() -> types.ModuleType:
    """The package `onnx`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "onnx: not installed; run pip install -e '.[export]' in the folder of qflax"
        ) from error
    return onnx


class Builder:
    """The nodes of a model, in the order in which they are added.

    Attributes:
      onnx: the package.
      layer: path of the layer that nodes are now added for: they are named after it.
      nodes: so far.
      initializers: so far, by name.
      types: ONNX type of every tensor, by name, for the batch of the input.
      datatypes: what QONNX' tools should take the numbers of tensors for, by name.
    """

    def __init__(self):
        self.onnx = import_onnx()
        self.layer = ""
        self.nodes = []
        self.initializers = {}
        self.types = {}
        self.datatypes = {}
        self._names = collections.Counter(["output"])
        self._shared = {}
        self._opsets = [self.onnx.helper.make_opsetid("", OPSET)]

    @property
    def place(self) -> str:
        """The layer, for messages."""
        return self.layer or "the network"

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        """Adds a float32 input."""
        self.types[name] = self.onnx.helper.make_tensor_type_proto(self.onnx.TensorProto.FLOAT, shape)
        return self._unique(name)

    def constant(self, array: np.typing.ArrayLike, name: str | None = None) -> str:
        """Adds an initializer; one without a name of its own is shared by all that need the same."""
        array = np.asarray(array)
        key = (array.dtype, array.shape, array.tobytes())
        if name is None and key in self._shared:
            return self._shared[key]
        unique = self._unique(name or "constant")
        tensor = self.initializers[unique] = self.onnx.numpy_helper.from_array(array, unique)
        self.types[unique] = self.onnx.helper.make_tensor_type_proto(tensor.data_type, array.shape)
        if name is None:
            self._shared[key] = unique
        return unique

    def numbers(self, values: typing.Iterable[int]) -> str:
        """Adds an int64 vector, such as shapes and axes are."""
        return self.constant(np.array(tuple(values), np.int64))

    def add(self, operation: str, *inputs: str, domain: str = "", **attributes: typing.Any) -> str:
        """Adds a node of one output.

        Args:
          operation: ONNX' name of it.
          inputs: names of tensors.
          domain: of the operation; outside of ONNX' own, the output has the type of the first input.
          attributes: of the node.

        Returns:
          Name of the output, which is the node's too.
        """
        name = self._unique(f"{self.layer}/{operation}" if self.layer else operation)
        node = self.onnx.helper.make_node(operation, inputs, [name], name, domain=domain, **attributes)
        self.nodes.append(node)
        self.types[name] = self.types[inputs[0]] if domain else self._inferred(node)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(dim.dim_value for dim in self.types[name].tensor_type.shape.dim)

    def array(self, name: str) -> np.ndarray | None:
        """The initializer of that name, or None."""
        initializer = self.initializers.get(name)
        return None if initializer is None else self.onnx.numpy_helper.to_array(initializer)

    def output(self, name: str) -> None:
        """Makes a tensor the output, `output`."""
        if not any(name in node.output for node in self.nodes):
            name = self.add("Identity", name)
        self.types["output"] = self.types.pop(name)
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = ["output" if old == name else old for old in names]

    def _inferred(self, node):
        onnx = self.onnx
        return onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, OPSET, ""),
            node,
            {name: self.types[name] for name in node.input},
            {name: self.initializers[name] for name in node.input[1:] if name in self.initializers},
            opset_imports=self._opsets,
            ir_version=IR_VERSION,
        )[node.output[0]]

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        if self._names[name] == 1:
            return name
        return self._unique(f"{name}_{self._names[name] - 1}")
