"""Damaged packed files are read correctly by the integer runner's reader, or refused in one line."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from hostile import archive, damaged, entries, mutated

from qflax.deploy import packed
from qflax.errors import UserError

U1 = {"kind": "integer", "bits": 1, "signed": False, "narrow": False}
U4 = {**U1, "bits": 4}
CONV = {"strides": [1, 1], "padding": [[0, 0], [0, 0]], "dilation": [1, 1], "groups": 1}
NODES = [
    ["quantize", [0, 2, 3], {"format": U4, "rounding": "half_even"}, "input"],
    ["conv", [4, 1], CONV, "conv"],
    ["max_pool", [5], {"window": [2, 2], "strides": [1, 1], "padding": [[0, 0], [0, 0]]}, ""],
    ["reshape", [6], {"shape": [-1, 27]}, ""],
]


def small(**changes):
    header = {"format": "qflax", "version": 1, "shape": [1], "constants": [], "output": 1, "metadata": {}}
    return {**header, "nodes": [["sign", [0], {}, ""]], **changes}


@pytest.fixture
def whole(tmp_path):
    """A packed file."""
    constants = [{"shape": [1, 1, 2, 3], "format": U4, "accumulator_bits": 9}, {"shape": []}, {"shape": []}]
    graph = small(shape=[4, 4, 2], constants=constants, nodes=NODES, output=7)
    path = archive(tmp_path / "whole", graph, b"\x12\x34\x56", np.float32([2, 0]).tobytes())
    assert read(path)
    return path


def read(path):
    """Whether a file is read; what it is refused with is checked."""
    try:
        packed.load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        return False
    return True


@pytest.mark.parametrize("seed", range(2))
def test_changed_graphs(whole, tmp_path, seed):
    graph, codes, numbers = entries(whole)
    graph, rng = json.loads(graph), random.Random(seed)
    results = {read(archive(tmp_path / "m", mutated(graph, rng), codes, numbers)) for _ in range(30)}
    assert results == {True, False}


@pytest.mark.parametrize("seed", range(2))
def test_damaged_bytes(whole, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(20):
        (tmp_path / "m").write_bytes(damaged(whole.read_bytes(), rng))
        read(tmp_path / "m")


CASES = {
    "huge shape": small(shape=[10**12]),
    "huge constant": small(constants=[{"shape": [10**12]}], output=2),
    "size of 4000 digits": small(constants=[{"shape": [10**4000] * 60}]),
    "negative": small(constants=[{"shape": [-1]}]),
    "beyond the data": small(constants=[{"shape": [1000], "format": U1}]),
    "bits": small(constants=[{"shape": [1], "format": {**U1, "bits": 99}}]),
    "promise": small(constants=[{"shape": [1], "accumulator_bits": 10**9}]),
    "later value": small(nodes=[["sign", [1], {}, ""]]),
    "value from the end": small(nodes=[["sign", [-1], {}, ""]]),
    "output": small(output=-1),
    "no whole output": small(output=True),
    "operation": small(nodes=[["import", [0], {}, ""]]),
    "attributes": small(nodes=[["sign", [0], {"x": 1}, ""], ["max_pool", [1], {}, ""]]),
    "pad": small(nodes=[["pad", [0], {"padding": [[0, 0], [0, 10**12]]}, ""]]),
    "layer": small(nodes=[["sign", [0], {}, "a\nb"]]),
    "no layer": small(nodes=[["sign", [0], {}, None]]),
    "many nodes": small(nodes=[["sign", [0], {}, ""]] * 20_000),
    "deep": "[" * 100_000,
    "other JSON": "[1]",
    "nothing": "",
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be(tmp_path, name):
    path = archive(tmp_path / "m", CASES[name])
    tracemalloc.start()
    try:
        assert not read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [7, 2**20 + 9])
def test_codes_are_unpacked_in_parts(tmp_path, size):
    fmt = {"kind": "integer", "bits": 3, "signed": False, "narrow": False}
    codes = np.random.default_rng(0).integers(0, 8, size)
    bits = (codes[:, None] >> np.arange(3)) & 1
    stored = np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
    graph = small(constants=[{"shape": [size], "format": fmt}], output=2)
    (constant,) = packed.load(archive(tmp_path / "m", graph, stored)).constants.values()
    np.testing.assert_array_equal(constant.array, codes)
