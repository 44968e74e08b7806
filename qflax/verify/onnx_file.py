"""Opens ONNX files: nothing outside of them is read, and no array is made that is larger than any need be."""

import pathlib
import typing
from collections.abc import Iterator

import numpy as np

from qflax.errors import UserError, one_line, require
from qflax.untrusted import open_file, size_of


def open_model(path: pathlib.Path):
    """The ModelProto of a file; UserError if it is none, or of several files."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UserError(
            f"{path}: is no packed network; for an ONNX file install the package onnx: pip install onnx"
        ) from None
    try:
        # Not by its name, of which onnx.load would take the kind of file, and read others that it names.
        with open_file(path) as file:
            model = onnx.load_model_from_string(file.read())
        _check(model)
    except (DecodeError, OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{path}: is neither a packed network nor an ONNX file (StableHLO cannot be verified): "
            f"{one_line(error)}"
        ) from None
    require(
        len(model.graph.node) > 0 and len(model.graph.output) == 1,
        f"{path}: is neither a packed network nor an ONNX network with one output",
    )
    return model


def array_of(tensor) -> np.ndarray:
    """The array of a TensorProto."""
    from onnx import numpy_helper

    try:
        size_of(tensor.dims, least=0)
        array = numpy_helper.to_array(tensor)
    except Exception as error:  # Whatever the package raises of damaged data.
        raise ValueError(f"tensor {tensor.name!r}: {error}") from None
    if array.dtype.kind in "cO":  # Complex numbers and text.
        raise ValueError(f"tensor {tensor.name!r} has type {array.dtype}")
    return array


def _check(model) -> None:
    """ValueError for what other programs would read differently, or not from this file alone."""
    import onnx

    if model.functions:
        raise ValueError("functions are not supported")
    for opset in model.opset_import:
        newest = onnx.defs.onnx_opset_version()
        if opset.domain in ("", "ai.onnx") and not 1 <= opset.version <= newest:
            raise ValueError(f"opset {opset.version} is unknown; the package onnx knows 1 to {newest}")
    names = [tensor.name for tensor in model.graph.initializer]
    names += [output for node in model.graph.node for output in node.output if output]
    names += [value.name for value in model.graph.input if value.name not in set(names)]
    if len(set(names)) < len(names):
        raise ValueError(f"{_repeated(names)!r} is made twice")
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and (message.external_data or message.data_location):
            raise ValueError(f"tensor {message.name!r} is in another file; save all in one")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        # What is not declared is 0.
        _check_declared(value.name, [n.dim_value or 1 for n in value.type.tensor_type.shape.dim])


def _check_declared(name: str, shape: list[int]) -> None:
    try:
        size_of(shape)
    except ValueError as error:
        raise ValueError(f"the shape of {name!r}: {error}") from None


def _repeated(names: list[str]) -> str:
    seen = set()
    return next(name for name in names if name in seen or seen.add(name))


def _messages(message) -> Iterator[typing.Any]:
    """A protobuf message and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from _messages(part)
