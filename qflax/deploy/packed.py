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
import pathlib
import zipfile

import numpy as np

from qflax.deploy.graph import OPERATIONS, Constant, Format, Graph, Node, format_from_json, format_to_json
from qflax.deploy.operations import value_shapes
from qflax.errors import UserError, one_line
from qflax.files import write_atomically
from qflax.numerics import IntegerFormat
from qflax.untrusted import TOTAL, Archive, size_of

VERSION = 1
_ENTRIES = ("graph.json", "codes.bin", "numbers.bin")
_GRAPH_BYTES = 2**24  # JSON takes a multiple of its bytes; that of a ResNet-152 has 2^19.
_NODES = 2**14  # Each is traced; a ResNet-152 has 2^11.
_BLOCK = 2**20  # Codes that are unpacked at a time, whole bytes.


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
        with Archive(path) as archive:
            header = json.loads(archive.read(_ENTRIES[0], _GRAPH_BYTES))
            codes, numbers = (archive.read(name) for name in _ENTRIES[1:])
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']!r}, not {VERSION}; update qflax")
        graph = _graph(header, codes, numbers)
        with np.errstate(all="ignore"):
            shapes = value_shapes(graph)  # Fails where a node does not fit its inputs.
        for shape in shapes.values():
            size_of(shape, least=0)
        return graph
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (
        *(LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError),
        *(MemoryError, NotImplementedError, UserError),
    ) as error:
        raise UserError(
            f"{path}: no packed file of qflax, or a damaged one ({one_line(error)}); export again"
        ) from None


def _graph(header, codes, numbers) -> Graph:
    constants, places, total = [], [0, 0], 0
    for entry in header["constants"]:
        fmt = format_from_json(entry["format"]) if "format" in entry else None
        size = size_of(entry["shape"])
        total += size
        if total > TOTAL:
            raise ValueError(f"constants of more than {TOTAL:,} elements together")
        if fmt is None:
            array = np.frombuffer(numbers, "<f4", size, places[1])
            places[1] += 4 * size
        else:
            array = _unpack(codes, places[0], size, fmt)
            places[0] += -(-size * fmt.bits // 8)
        array = array.reshape(entry["shape"]).astype(np.float32)
        bits = entry.get("accumulator_bits")
        if bits is not None:
            _whole(bits, 1, 64)
        constants.append(Constant(array=array, format=fmt, accumulator_bits=bits))
    if [len(codes), len(numbers)] != places:
        raise ValueError("lengths do not match")
    names = ["input", *(f"constant{i}" for i in range(len(constants)))]
    nodes = []
    if len(header["nodes"]) > _NODES:
        raise ValueError(f"more than {_NODES:,} nodes")
    for i, (operation, inputs, attributes, layer) in enumerate(header["nodes"]):
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}")
        if not isinstance(layer, str) or not layer.isprintable():
            raise ValueError(f"layer {layer!r} is no name")
        output = f"{layer}/{operation}.{i}" if layer else f"{operation}.{i}"
        inputs = tuple(names[_whole(number, 0, len(names) - 1)] for number in inputs)
        attributes = {name: _from_json(value) for name, value in attributes.items()}
        nodes.append(
            Node(operation=operation, inputs=inputs, output=output, attributes=attributes, layer=layer)
        )
        names.append(output)
    size_of(header["shape"])
    return Graph(
        input="input",
        shape=tuple(header["shape"]),
        output=names[_whole(header["output"], 0, len(names) - 1)],
        nodes=tuple(nodes),
        constants=dict(zip(names[1:], constants, strict=False)),
        metadata=header["metadata"],
    )


def _whole(value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


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
    array = np.empty(size, np.float32)
    for first in range(0, size, _BLOCK):
        count = min(_BLOCK, size - first)
        part = data[first * fmt.bits // 8 :]
        bits = np.unpackbits(part, count=count * fmt.bits, bitorder="little").reshape(count, fmt.bits)
        patterns = bits.astype(np.int64) @ (1 << np.arange(fmt.bits))
        if isinstance(fmt, IntegerFormat):
            array[first : first + count] = patterns * (2 if fmt.bipolar else 1) + fmt.lowest
        else:
            array[first : first + count] = fmt.decode(patterns)
    return array
