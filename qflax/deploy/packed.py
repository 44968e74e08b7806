"""Packed files: codes at their own widths, scales, and the graph.

A ZIP archive, whose entries any tool unpacks and whose checksums find damage:

- `graph.json`: `shape`, `constants`, `nodes`, `output`, `metadata`, see `graph.Graph`. Values are numbered:
  0 is the input, then come the constants, then the outputs of the nodes. A constant is its `shape` and, if it
  has them, `format` and `accumulator_bits`; a node is [operation, inputs, attributes, layer].
- `codes.bin`: the constants with a format, each from a whole byte on: elements in C order at the format's
  bits, the first in the lowest bits. An integer is stored as its distance from the lowest one, -1 and +1 as 0
  and 1, a minifloat as its pattern.
- `numbers.bin`: the other constants, float32, little endian.
"""

import dataclasses
import io
import json
import math
import pathlib
import zipfile
import zlib

import numpy as np

from qflax.deploy.graph import OPERATIONS, Constant, Format, Graph, Node, format_from_json, format_to_json
from qflax.errors import UserError, require
from qflax.files import write_atomically
from qflax.numerics import IntegerFormat

VERSION = 1
_ENTRIES = ("graph.json", "codes.bin", "numbers.bin")


def save(graph: Graph, path: pathlib.Path) -> None:
    """Writes a packed file; the same graph gives the same bytes."""
    names = [graph.input, *graph.constants, *(node.output for node in graph.nodes)]
    numbers = {name: i for i, name in enumerate(names)}
    header = {
        "format": "qflax",
        "version": VERSION,
        "shape": graph.shape,
        "constants": [_constant_to_json(constant) for constant in graph.constants.values()],
        "nodes": [
            [
                node.operation,
                [numbers[name] for name in node.inputs],
                {name: _to_json(value) for name, value in node.attributes.items()},
                node.layer,
            ]
            for node in graph.nodes
        ],
        "output": numbers[graph.output],
        "metadata": graph.metadata,
    }
    constants = graph.constants.values()
    parts = (
        json.dumps(header, separators=(",", ":")).encode(),
        b"".join(_pack(c.array, c.format) for c in constants if c.format is not None),
        b"".join(c.array.astype("<f4").tobytes() for c in constants if c.format is None),
    )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, part in zip(_ENTRIES, parts, strict=True):
            archive.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED, 9)
    write_atomically(path, content.getvalue())


def load(path: pathlib.Path) -> Graph:
    """Reads a packed file; names of values are those of their layers.

    Raises:
      UserError: no such file, none of ours, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header, codes, numbers = (archive.read(name) for name in _ENTRIES)
        header = json.loads(header)
        require(
            header["version"] == VERSION, f"{path}: version {header['version']}, not {VERSION}; update qflax"
        )
        return _graph(header, codes, numbers)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, IndexError, EOFError) as error:
        raise UserError(
            f"{path}: no packed file of qflax, or a damaged one ({error}); export again"
        ) from None


def _graph(header, codes, numbers) -> Graph:
    constants, places = [], [0, 0]
    for entry in header["constants"]:
        fmt = format_from_json(entry["format"]) if "format" in entry else None
        size = math.prod(entry["shape"])
        if fmt is None:
            array = np.frombuffer(numbers, "<f4", size, places[1])
            places[1] += 4 * size
        else:
            array = _unpack(codes, places[0], size, fmt)
            places[0] += -(-size * fmt.bits // 8)
        array = array.reshape(entry["shape"]).astype(np.float32)
        constants.append(Constant(array=array, format=fmt, accumulator_bits=entry.get("accumulator_bits")))
    if [len(codes), len(numbers)] != places:
        raise ValueError("lengths do not match")
    names = ["input", *(f"constant{i}" for i in range(len(constants)))]
    nodes = []
    for i, (operation, inputs, attributes, layer) in enumerate(header["nodes"]):
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}")
        output = f"{layer}/{operation}.{i}" if layer else f"{operation}.{i}"
        inputs = tuple(names[number] for number in inputs)
        attributes = {name: _from_json(value) for name, value in attributes.items()}
        nodes.append(
            Node(operation=operation, inputs=inputs, output=output, attributes=attributes, layer=layer)
        )
        names.append(output)
    return Graph(
        input="input",
        shape=tuple(header["shape"]),
        output=names[header["output"]],
        nodes=tuple(nodes),
        constants=dict(zip(names[1:], constants, strict=False)),
        metadata=header["metadata"],
    )


def _constant_to_json(constant: Constant) -> dict:
    entry = {"shape": constant.array.shape}
    if constant.format is not None:
        entry["format"] = format_to_json(constant.format)
    if constant.accumulator_bits is not None:
        entry["accumulator_bits"] = constant.accumulator_bits
    return entry


def _to_json(value):
    return format_to_json(value) if dataclasses.is_dataclass(value) else value


def _from_json(value):
    if isinstance(value, dict):
        return format_from_json(value)
    return tuple(_from_json(item) for item in value) if isinstance(value, list) else value


def _pack(array: np.ndarray, fmt: Format) -> bytes:
    if isinstance(fmt, IntegerFormat):
        step = 2 if fmt.bipolar else 1
        patterns = (array.astype(np.int64) - fmt.lowest) // step
    else:
        patterns = np.asarray(fmt.encode(array)).astype(np.int64)
    bits = (patterns.reshape(-1, 1) >> np.arange(fmt.bits)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _unpack(codes: bytes, start: int, size: int, fmt: Format) -> np.ndarray:
    data = np.frombuffer(codes, np.uint8, -(-size * fmt.bits // 8), start)
    bits = np.unpackbits(data, count=size * fmt.bits, bitorder="little").reshape(size, fmt.bits)
    patterns = bits.astype(np.int64) @ (1 << np.arange(fmt.bits))
    if isinstance(fmt, IntegerFormat):
        return patterns * (2 if fmt.bipolar else 1) + fmt.lowest
    return np.asarray(fmt.decode(patterns))
