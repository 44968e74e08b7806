"""Reads ONNX files with QONNX's quantizers, or with QuantizeLinear; NCHW becomes NHWC at the input."""

import json
import math
import pathlib
import typing
import warnings
from collections.abc import Callable

import numpy as np

from qflax.errors import UserError, one_line
from qflax.verify.limits import MALFORMED
from qflax.verify.network import Builder, Network
from qflax.verify.onnx_file import array_of, open_model
from qflax.verify.packed_attributes import accumulator_bits
from qflax.verify.probe import Probe
from qflax.verify.qonnx_context import Context, Folder, integer_type
from qflax.verify.qonnx_operations import LOOSE, MOVING, SUMS, TRANSLATIONS, WHOLE, WRAPPING

DOMAINS = ("", "ai.onnx", "qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")
METADATA = "qflax"
PACKAGES = {"ONNX": "onnxruntime", "QONNX": "qonnx"}  # Dialect -> what executes it.


def read(path: pathlib.Path) -> Network:
    """The network of an ONNX file; UserError if it is none, or has an operation that is not known."""
    model = open_model(path)
    try:
        with np.errstate(all="ignore"):
            return _network(path, model)
    except MALFORMED as error:
        raise UserError(f"{path}: {_line(error)}") from None


def _dialect(model) -> str:
    return "ONNX" if all(node.domain in ("", "ai.onnx") for node in model.graph.node) else "QONNX"


def execute(path: pathlib.Path, x: np.ndarray) -> np.ndarray:
    """Outputs of its package for x [examples, *network.shape], as many at a time as the file declares.

    Raises:
      ImportError: if the package is not installed.
    """
    model = open_model(path)
    value = _input(model.graph)
    x = (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).astype(_type(value))
    batch, *_ = _declared(value)
    missing = -len(x) % batch
    padded = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
    with warnings.catch_warnings():  # Of packages, such as of `np.fix` in qonnx: not of the file.
        warnings.simplefilter("ignore")
        serve = (_onnxruntime if _dialect(model) == "ONNX" else _qonnx)(model, value.name)
        outputs = [serve(padded[i : i + batch]) for i in range(0, len(x), batch)]
    return np.concatenate(outputs)[: len(x)]


def _onnxruntime(model, name: str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # Of what it warns of nothing changes the outputs.
    if not _metadata(model):  # Its integer kernels round otherwise than the operations that they stand for.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda x: session.run(None, {name: x})[0]


def _qonnx(model, name: str) -> Callable[[np.ndarray], np.ndarray]:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    output, wrapped = model.graph.output[0].name, ModelWrapper(model).transform(InferShapes())
    return lambda x: execute_onnx(wrapped, {name: x})[output]


def _declared(value) -> list[int]:
    """The shape of a value; a batch that is left open is 1."""
    batch, *shape = (dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
    return [batch or 1, *shape]


def _type(value) -> np.dtype:
    """Of the network's input."""
    from onnx import TensorProto, helper

    kind = value.type.tensor_type.elem_type or TensorProto.FLOAT
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8):
        name = TensorProto.DataType.Name(kind)
        raise ValueError(f"the input {value.name!r} is of {name}; FLOAT, UINT8 and INT8 are supported")
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _input(graph):
    """The graph's input that is no initializer."""
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initializers]
    if len(inputs) != 1:
        raise ValueError(f"the network has {len(inputs)} inputs; one is supported")
    return inputs[0]


def _network(path: pathlib.Path, model) -> Network:
    value = _input(model.graph)
    batch, *shape = _declared(value)
    if not all(shape):
        raise ValueError(f"the input {value.name!r} has no fixed shape: {shape}")
    images = len(shape) == 3
    builder = Builder([shape[1], shape[2], shape[0]] if images else shape, batch)
    first, dtype, inputs = 0, _type(value), None
    if dtype != np.float32:
        one, zero, fmt = builder.constant(np.float32(1)), builder.constant(np.float32(0)), integer_type(dtype)
        first = builder.node("quantize", [0, one, zero], "input", format=fmt, rounding="half_even")
        inputs = (float(fmt.lowest), float(fmt.highest))
    if images:
        first = builder.node("transpose", [first], "input", permutation=(0, 3, 1, 2))
    values, types = {value.name: first}, {value.name: dtype}
    arrays = {tensor.name: array_of(tensor) for tensor in model.graph.initializer}
    choices: dict[str, tuple[int, bool]] = {}
    metadata = _metadata(model)
    promises = {name: accumulator_bits(bits) for name, bits in metadata.get("accumulator_bits", {}).items()}
    for node in model.graph.node:
        promised = promises.get(node.name) if node.op_type in SUMS else None
        _translate(node, promised, builder, values, arrays, choices, types)
    others = promises.keys() - {node.name for node in model.graph.node if node.op_type in SUMS}
    if others:
        raise ValueError(f"metadata: {min(others)!r} has accumulator_bits, but is no convolution or product")
    probe = Probe.from_json(metadata["probe"]) if metadata else None
    network = builder.network(path, _dialect(model), values[model.graph.output[0].name], probe, inputs)
    if probe:
        _check_metadata(network, metadata)
    return network


def _translate(
    node,
    promised: int | None,
    builder: Builder,
    values: dict[str, int],
    arrays: dict[str, np.ndarray],
    choices: dict[str, tuple[int, bool]],
    types: dict[str, np.dtype],
) -> None:
    place = f"{node.op_type} {node.name or ', '.join(node.output)!r}"
    if node.domain not in DOMAINS or node.op_type not in TRANSLATIONS:
        raise ValueError(f"{place}: operation of domain {node.domain!r} that is not known")
    constant = node.op_type in MOVING and all(name in arrays for name in node.input if name)
    try:
        context = Context(
            Folder() if constant else builder,
            {} if constant else values,
            arrays,
            choices,
            types,
            node,
            promised,
        )
        _check_type(context, node.op_type)
        result = TRANSLATIONS[node.op_type](context)
        if result is None:
            return
        if constant:
            arrays[context.output] = context.builder.fixed[result]
            builder.keep(arrays[context.output].size)
            return
        values[context.output] = result
        types.setdefault(context.output, context.type_of(node.op_type == "Where"))
    except MALFORMED as error:
        raise ValueError(f"{place}: {_line(error)}") from None


def _check_type(context: Context, operation: str) -> None:
    """Has what is computed in integers stay in their range, or be refused."""
    context.loose = operation in LOOSE
    first = context.inputs[0] if context.inputs else ""
    known = first in context.arrays or first in context.types
    if not known or operation in WHOLE or context.type_of(0) == np.float32:
        return
    if operation not in WRAPPING:
        raise ValueError(f"of {context.type_of(0)}: only float32 is supported")
    context.stored = integer_type(context.type_of(0))


def _metadata(model) -> dict[str, typing.Any]:
    texts = {entry.key: entry.value for entry in model.metadata_props}
    metadata = json.loads(texts[METADATA]) if METADATA in texts else {}
    if not isinstance(metadata, dict) or METADATA in texts and "probe" not in metadata:
        raise ValueError(f"metadata {METADATA!r}: there is no probe")
    return metadata


def _check_metadata(network: Network, metadata: dict[str, typing.Any]) -> None:
    if list(network.shape) != metadata["shape"]:
        raise ValueError(f"metadata: shape {metadata['shape']}; the input has {list(network.shape)}")
    size = math.prod(network.shapes[network.output][1:])
    if network.probe.outputs.shape[1] != size or network.probe.sums:
        raise ValueError(f"metadata: probe: {network.probe.outputs.shape[1]} outputs; the network has {size}")


def _line(error: Exception) -> str:
    return one_line(f"no {error}" if isinstance(error, KeyError) else error)
