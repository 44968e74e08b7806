"""Packed files written by hand, and a small network of integers."""

import hashlib
import json
import math
import zipfile

import jax.lax
import numpy as np
import pytest


def pack(stored, bits):
    """Bytes of the numbers at `bits` bits each, lowest first."""
    total = sum(int(code) << (i * bits) for i, code in enumerate(stored))
    return total.to_bytes(-(-len(stored) * bits // 8), "little")


class Packed:
    """A packed file in the making: constants first, then nodes; both return their number."""

    def __init__(self, shape):
        self.graph = {"format": "qflax", "version": 1, "shape": list(shape), "constants": [], "nodes": []}
        self.codes, self.numbers = b"", b""

    def stored(self, shape, codes, bits, fmt, **fields):
        self.codes += pack(codes, bits)
        return self._constant({"shape": list(shape), "format": fmt, **fields})

    def integers(self, array, bits, signed=True, narrow=True, **fields):
        lowest = (-(2 ** (bits - 1)) + narrow) if signed else 0
        fmt = {"kind": "integer", "bits": bits, "signed": signed, "narrow": narrow}
        return self.stored(array.shape, np.ravel(array).astype(int) - lowest, bits, fmt, **fields)

    def floats(self, array):
        array = np.asarray(array, np.float32)
        self.numbers += array.astype("<f4").tobytes()
        return self._constant({"shape": list(array.shape)})

    def node(self, operation, inputs, layer="", **attributes):
        self.graph["nodes"].append([operation, list(inputs), attributes, layer])
        self.graph["output"] = len(self.graph["constants"]) + len(self.graph["nodes"])
        return self.graph["output"]

    def save(self, path, outputs, sums=(), low=0.0, high=255.0, **fields):
        outputs = np.asarray(outputs, np.float32).astype(float).tolist()
        probe = {"count": len(outputs), "low": low, "high": high, "outputs": outputs, "sums": list(sums)}
        graph = {**self.graph, "metadata": {"probe": probe}, **fields}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("graph.json", json.dumps(graph))
            archive.writestr("codes.bin", self.codes)
            archive.writestr("numbers.bin", self.numbers)
        return path

    def _constant(self, fields):
        assert not self.graph["nodes"]
        self.graph["constants"].append(fields)
        return len(self.graph["constants"])


def probe_inputs(count, shape, low=0.0, high=255.0):
    size, stream, k = count * math.prod(shape), b"", 0
    while len(stream) < size:
        stream += hashlib.sha256(b"qflax" + k.to_bytes(8, "little")).digest()
        k += 1
    values = [np.float32(low + (high - low) * byte / 255) for byte in stream[:size]]
    return np.array(values, np.float32).reshape(count, *shape)


UINT4 = {"kind": "integer", "bits": 4, "signed": False, "narrow": False}
SAME = dict(strides=[1, 1], padding=[[1, 1], [1, 1]], dilation=[1, 1], groups=1)


class Small:
    """Quantizer, convolution, norm, quantizer, max pool, dense layer with an integer bias.

    What the trained network gives is worked out here once, whatever `save` then writes into the file.
    """

    shape = (6, 6, 2)

    def __init__(self):
        rng = np.random.default_rng(0)
        self.parts = dict(
            scale=np.float32(17.3),
            zero_point=np.float32(5),
            kernel=rng.integers(-7, 8, (3, 3, 2, 4)),
            factor=np.float32([0.02, 0.03, 0.011, 0.05]),
            offset=np.float32([0.3, -0.1, 0.7, 0.2]),
            scale2=np.float32(0.37),
            matrix=rng.integers(-127, 128, (36, 3)),
            bias=rng.integers(-2000, 2000, 3),
            factor2=np.float32(0.0123),
        )
        self.outputs, self.sums = self.execute(probe_inputs(2, self.shape))

    def execute(self, x):
        p = self.parts
        codes = np.clip(np.rint(x / p["scale"] + p["zero_point"]), 0, 15) - p["zero_point"]
        y = jax.lax.conv_general_dilated(
            *(codes, p["kernel"].astype(np.float32), (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = np.maximum(np.asarray(y) * p["factor"] + p["offset"], np.float32(0))
        codes2 = np.clip(np.rint(y / p["scale2"]), 0, 15)
        pooled = codes2.reshape(-1, 3, 2, 3, 2, 4).max((2, 4)).reshape(-1, 36)
        sums = pooled.astype(int) @ p["matrix"] + p["bias"]
        self.seen = {"first": np.asarray(y), "classifier": sums}
        return sums.astype(np.float32) * p["factor2"], [[0, int(codes.sum())], [5, int(codes2.sum())]]

    def build(self, bits=12, bits2=24, **changes):
        p, file = {**self.parts, **changes}, Packed(self.shape)
        kernel = file.integers(p["kernel"], 4, accumulator_bits=bits)
        matrix = file.integers(p["matrix"], 8, accumulator_bits=bits2)
        names = ("scale", "zero_point", "factor", "offset", "scale2", "bias", "factor2")
        numbers = {name: file.floats(p[name]) for name in names}
        zero = file.floats(0.0)

        def node(operation, *inputs, layer, **attributes):
            inputs = [numbers.get(i, i) for i in inputs]
            return file.node(operation, inputs, layer, **attributes)

        quantize = dict(format=UINT4, rounding="half_even")
        x = node("quantize", 0, "scale", "zero_point", layer="input", **quantize)
        x = node("conv", x, kernel, layer="block/conv", **SAME)
        x = node("multiply", x, "factor", layer="block/norm")
        x = node("add", x, "offset", layer="block/norm")
        x = node("maximum", x, zero, layer="block/act")
        x = node("quantize", x, "scale2", zero, layer="block/act", **quantize)
        x = node("max_pool", x, layer="pool", window=[2, 2], strides=[2, 2], padding=[[0, 0], [0, 0]])
        x = node("reshape", x, layer="", shape=[-1, 36])
        x = node("dense", x, matrix, layer="classifier")
        x = node("add", x, "bias", layer="classifier")
        node("multiply", x, "factor2", layer="classifier")
        return file

    def save(self, path, **changes):
        return self.build(**changes).save(path, self.outputs, self.sums)


@pytest.fixture(scope="session")
def small():
    """The small network."""
    return Small()


@pytest.fixture
def packed():
    """Makes packed files."""
    return Packed


@pytest.fixture
def probe():
    """Makes the inputs of a probe."""
    return probe_inputs
