"""ONNX models of graphs, for floating-point networks and for the dialects that know quantizers."""

import json
import typing

import numpy as np

from qflax.deploy.graph import Format, Graph
from qflax.deploy.onnx_builder import IR_VERSION, OPSET, Builder
from qflax.deploy.onnx_operations import add_node
from qflax.deploy.onnx_values import TO_NCHW, Dialect, Quantizer, Values
from qflax.errors import UserError

if typing.TYPE_CHECKING:
    import onnx


def to_onnx_float(graph: Graph, batch: int | None = None) -> "onnx.ModelProto":
    """The network as plain ONNX, without quantizers. Its float32 sums are of no certain order.

    Args:
      graph: see `deploy.lower`.
      batch: images in a batch; None leaves it open.

    Returns:
      The model, see `to_model`.

    Raises:
      UserError: the network has quantizers, or onnx is not installed.
    """
    return to_model(graph, FloatDialect(), batch)


def to_model(graph: Graph, dialect: Dialect, batch: int | None) -> "onnx.ModelProto":
    """A graph as an ONNX model.

    The input is `input`, the output `output`; images, and all values of rank 4, are NCHW. Nodes have the
    names of their layers. The entry `qflax` of the model's properties is JSON: `shape` of one example in the
    graph, without the batch; `accumulator_bits`, by name of the Conv or MatMul, that its weights were made
    for; `probe` of the graph's metadata, if it is there.

    Args:
      graph: see `deploy.lower`.
      dialect: what becomes of quantizers.
      batch: images in a batch, which gives all tensors a shape; None leaves it open.

    Raises:
      UserError: the dialect does not know a number format, or onnx is not installed.
    """
    builder = Builder()
    shape = (batch or 1, *graph.shape)
    shape = tuple(shape[axis] for axis in TO_NCHW) if len(shape) == 4 else shape
    values = Values(graph, builder, dialect, builder.input("input", shape))
    bits = {}
    for node in graph.nodes:
        builder.layer = node.layer
        values.add(node.output, add_node(values, node))
        constant = graph.constants.get(node.inputs[-1])
        if node.operation in ("conv", "dense") and constant is not None and constant.accumulator_bits:
            bits[_sums(builder)] = constant.accumulator_bits
    builder.layer = ""
    builder.output(values.operand(graph.output))
    return _model(graph, builder, dialect, batch, bits)


class FloatDialect:
    """ONNX without quantizers."""

    opsets: dict[str, int] = {}

    def constant(self, builder: Builder, array: np.ndarray, fmt: Format | None, name: str) -> str:
        """See `Dialect`."""
        del fmt
        return builder.constant(array, name)

    def dense(self, builder: Builder, x: str, kernel: str, whole: bool) -> str:
        """See `Dialect`."""
        del whole
        return builder.add("MatMul", x, kernel)

    def quantize(self, builder: Builder, x: str, quantizer: Quantizer) -> str:
        """See `Dialect`."""
        raise UserError(
            f"{builder.place}: plain ONNX has no quantizers; export to qonnx, qcdq or a packed file instead"
        )


def _sums(builder: Builder) -> str:
    """Name of the last node that adds up products."""
    return next(node.name for node in reversed(builder.nodes) if node.op_type in ("Conv", "MatMul"))


def _model(graph, builder, dialect, batch, bits) -> "onnx.ModelProto":
    helper, types = builder.onnx.helper, builder.types
    ends = {name: helper.make_value_info(name, types[name]) for name in ("input", "output")}
    if batch is None:
        for end in ends.values():
            end.type.tensor_type.shape.dim[0].dim_param = "N"
    inner = [name for node in builder.nodes for name in node.output if name != "output"]
    model = helper.make_model(
        helper.make_graph(
            builder.nodes,
            "qflax",
            [ends["input"]],
            [ends["output"]],
            list(builder.initializers.values()),
            value_info=[] if batch is None else [helper.make_value_info(n, types[n]) for n in inner],
        ),
        opset_imports=[helper.make_opsetid(*of) for of in {"": OPSET, **dialect.opsets}.items()],
        ir_version=IR_VERSION,
        producer_name="qflax",
    )
    for name, datatype in builder.datatypes.items():
        annotation = model.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="finn_datatype", value=datatype)
    helper.set_model_props(model, {"qflax": json.dumps(_properties(graph, bits))})
    return model


def _properties(graph: Graph, bits: dict[str, int]) -> dict:
    properties = {"shape": list(graph.shape), "accumulator_bits": bits}
    if "probe" in graph.metadata:
        probe = graph.metadata["probe"]
        properties["probe"] = {key: value for key, value in probe.items() if key != "sums"}
    return properties
