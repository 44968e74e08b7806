"""Reads packed files: a ZIP archive of graph.json, codes.bin and numbers.bin."""

import json
import math
import pathlib
import typing

import numpy as np

from qflax.errors import UserError, closest, one_line, require
from qflax.untrusted import Archive, size_of
from qflax.verify.formats import Format, IntegerFormat, MinifloatFormat
from qflax.verify.limits import MALFORMED
from qflax.verify.network import Builder, Network
from qflax.verify.packed_attributes import ATTRIBUTES, accumulator_bits, format_of
from qflax.verify.probe import Probe

VERSION = 1
SUMS = ("conv", "dense")  # Operations with an accumulator.
GRAPH, CODES, NUMBERS = "graph.json", "codes.bin", "numbers.bin"
_GRAPH_BYTES = 2**24  # JSON takes a multiple of its bytes; that of a ResNet-152 has 2^19.
_BLOCK = 2**20  # Codes that are unpacked at a time, whole bytes.


def read(path: pathlib.Path) -> Network:
    """The network of a packed file; UserError if anything in it is not as it must be."""
    try:
        with Archive(path) as archive:
            names = sorted(archive.names)
            require(
                names == sorted((GRAPH, CODES, NUMBERS)),
                f"{path}: holds {', '.join(names[:5]) or 'nothing'}{', ...' if names[5:] else ''}; "
                f"a packed network has {GRAPH}, {CODES} and {NUMBERS}",
            )
            graph = _graph(path, archive.read(GRAPH, _GRAPH_BYTES))
            data = {name: archive.read(name) for name in (CODES, NUMBERS)}
    except (ValueError, OSError, MemoryError) as error:
        raise UserError(
            f"{path}: the archive is damaged: {one_line(error)}; copy or export it again"
        ) from None
    return _network(path, graph, data)


def _graph(path: pathlib.Path, text: bytes) -> dict[str, typing.Any]:
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {GRAPH}: {one_line(error)}") from None
    require(
        isinstance(graph, dict) and graph.get("format") == "qflax", f"{path}: {GRAPH} is no network of qflax"
    )
    version = graph.get("version")
    require(
        version == VERSION, f"{path}: version {version!r} is unknown; this program reads version {VERSION}"
    )
    return graph


class _At:
    """Adds the place to the errors of malformed fields."""

    def __init__(self, path: pathlib.Path):
        self.path, self.place = path, GRAPH

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind and issubclass(kind, MALFORMED):
            text = f"no {error}" if issubclass(kind, KeyError) else error
            raise UserError(f"{self.path}: {self.place}: {one_line(text)}") from None


def _network(path: pathlib.Path, graph: dict, data: dict[str, bytes]) -> Network:
    with _At(path) as at:
        builder = Builder(graph["shape"])
        reader, promises = _Arrays(data), {}
        for index, fields in enumerate(graph["constants"]):
            at.place = f"constant {index}"
            array, fmt = reader.next(fields)
            number = builder.constant(array, fmt)
            if "accumulator_bits" in fields:
                promises[number] = accumulator_bits(fields["accumulator_bits"])
        at.place = "constants"
        reader.finish()
        for index, fields in enumerate(graph["nodes"]):
            at.place = f"node {index}"
            _node(builder, fields, promises)
        at.place = "constants"
        kernels = {node.inputs[1] for node in builder.nodes if node.operation in SUMS}
        if promises.keys() - kernels:
            number = min(promises.keys() - kernels)
            raise ValueError(f"number {number} has accumulator_bits, but is the kernel of no conv or dense")
        at.place = "metadata: probe"
        probe = Probe.from_json(graph["metadata"]["probe"])
        at.place = "output"
        output = _number(graph["output"], len(builder.nodes) + len(builder.constants) + 1)
        if output <= len(builder.constants):
            raise ValueError(f"{output} is not the output of a node")
        network = builder.network(path, "packed", output, probe)
        if builder.mixing:
            at.place = f"node {builder.nodes.index(builder.mixing)}"
            raise ValueError(f"{builder.mixing.operation} does not keep the examples of a batch apart")
        at.place = "metadata: probe"
        _check_probe(network)
    return network


def _check_probe(network: Network) -> None:
    """ValueError where the probe does not fit the network."""
    probe, size = network.probe, math.prod(network.shapes[network.output][1:])
    if probe.outputs.shape[1] != size:
        raise ValueError(f"{probe.outputs.shape[1]} outputs; the network has {size}")
    for index in probe.sums:
        node = network.nodes[_number(index, len(network.nodes))]
        if not isinstance(node.attributes.get("format"), IntegerFormat):
            raise ValueError(f"node {index} has a sum, but gives no integers")


class _Arrays:
    """Takes constants from the two streams in order."""

    def __init__(self, data: dict[str, bytes]):
        self._data = data
        self._used = dict.fromkeys(data, 0)

    def next(self, fields: dict[str, typing.Any]) -> tuple[np.ndarray, Format | None]:
        """The array of the next constant, and its format."""
        shape = fields["shape"]
        size = size_of(shape)
        if "format" not in fields:
            return np.frombuffer(self._take(NUMBERS, 4 * size), "<f4").reshape(shape), None
        fmt = format_of(fields["format"])
        stored = np.frombuffer(self._take(CODES, -(-size * fmt.bits // 8)), np.uint8)
        array = np.empty(size, np.float32)
        for start in range(0, size, _BLOCK):
            codes = _unpack(stored[start * fmt.bits // 8 :], min(_BLOCK, size - start), fmt.bits)
            array[start : start + _BLOCK] = fmt.decode(codes)
        return array.reshape(shape), fmt

    def finish(self) -> None:
        """ValueError if something is left."""
        for name, data in self._data.items():
            if self._used[name] != len(data):
                raise ValueError(f"{name} has {len(data)} bytes; the constants take {self._used[name]}")

    def _take(self, name: str, count: int) -> bytes:
        start = self._used[name]
        self._used[name] = end = start + count
        if end > len(self._data[name]):
            raise ValueError(f"{name} ends after {len(self._data[name])} bytes; {end} are needed")
        return self._data[name][start:end]


def _unpack(stored: np.ndarray, count: int, width: int) -> np.ndarray:
    bits = np.unpackbits(stored, count=count * width, bitorder="little").reshape(count, width)
    codes = np.zeros(count, np.int64)
    for i in range(width):
        codes |= bits[:, i].astype(np.int64) << i
    return codes


def _node(builder: Builder, fields: list, promises: dict[int, int]) -> None:
    operation, inputs, attributes, layer = fields
    if operation not in ATTRIBUTES:
        raise ValueError(f"operation {operation!r} is unknown{closest(operation, ATTRIBUTES)}")
    known = len(builder.nodes) + len(builder.constants) + 1
    inputs = [_number(number, known) for number in inputs]
    parsers, counts = ATTRIBUTES[operation]
    if len(inputs) not in counts:
        raise ValueError(f"{operation} has {len(inputs)} inputs")
    if sorted(attributes) != sorted(parsers):
        raise ValueError(f"{operation} has attributes {sorted(attributes)}; it must have {sorted(parsers)}")
    attributes = {name: parse(attributes[name]) for name, parse in parsers.items()}
    if operation == "quantize" and isinstance(attributes["format"], MinifloatFormat) and len(inputs) == 3:
        raise ValueError("quantize to minifloats has no zero point")
    if not isinstance(layer, str):
        raise ValueError(f"layer {layer!r} is no text")
    promised = promises.get(inputs[1]) if operation in SUMS else None
    builder.node(operation, inputs, layer, promised, **attributes)


def _number(number: object, count: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        raise ValueError(f"number {number!r}; there are 0 ... {count - 1} so far")
    return number
