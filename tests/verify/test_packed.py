"""Packed files are read to the bit, and damage to them is told in one line."""

import json
import zipfile

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.numerics import MinifloatFormat
from qflax.verify import load, run


def identity(file, number, path):
    """What the file's constant is read as."""
    file.node("add", [0, number], "here")
    return load(file.save(path, [[0.0] * max(1, np.prod(file.graph["constants"][-1]["shape"]))])).fixed[
        number
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12, 16, 25])
@pytest.mark.parametrize("signed, narrow", [(True, True), (True, False), (False, False)])
def test_integers_are_read_to_the_bit(packed, tmp_path, bits, signed, narrow):
    lowest, highest = (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    inner = np.random.default_rng(bits).integers(lowest, highest, 11, endpoint=True)
    array = np.float32([lowest, *inner, highest])
    array = np.where(np.abs(array) > 2**24, 0, array).reshape(1, 13)
    file = packed((1,))
    file.integers(np.zeros((1, 3)), 3)  # The next constant begins at a whole byte.
    number = file.integers(array, bits, signed, narrow)
    np.testing.assert_array_equal(identity(file, number, tmp_path / "n"), array)


def test_bipolar_integers(packed, tmp_path):
    file = packed((1,))
    fmt = {"kind": "integer", "bits": 1, "signed": True, "narrow": False}
    number = file.stored([1, 5], [0, 1, 1, 0, 1], 1, fmt)
    np.testing.assert_array_equal(identity(file, number, tmp_path / "n"), [[-1, 1, 1, -1, 1]])


FORMATS = [
    dict(exponent_bits=4, mantissa_bits=3, specials="nan"),
    dict(exponent_bits=5, mantissa_bits=2, specials="ieee"),
    dict(exponent_bits=4, mantissa_bits=3, specials="fnuz", bias=8),
    dict(exponent_bits=3, mantissa_bits=1, signed=False),
    dict(exponent_bits=8, mantissa_bits=0, subnormals=False, signed=False, bias=127, specials="nan"),
    dict(exponent_bits=2, mantissa_bits=1),
    dict(exponent_bits=8, mantissa_bits=3),
]


@pytest.mark.parametrize("fields", FORMATS)
def test_minifloats_are_read_to_the_bit(packed, tmp_path, fields):
    fmt = MinifloatFormat(**fields)
    codes = np.arange(2**fmt.bits)
    values = np.asarray(fmt.decode(codes))
    codes, special = codes[np.isfinite(values)], codes[~np.isfinite(values)]
    values = values[np.isfinite(values)]
    names = ("exponent_bits", "mantissa_bits", "bias", "specials", "signed", "subnormals", "saturate")
    stored = {"kind": "minifloat", **{name: getattr(fmt, name) for name in names}}
    file = packed((1,))
    read = identity(file, file.stored([1, len(codes)], codes, fmt.bits, stored), tmp_path / "n")
    np.testing.assert_array_equal(read.view(np.uint32), values.view(np.uint32)[None])
    for code in special:
        file = packed((1,))
        number = file.stored([1, 1], [code], fmt.bits, stored)
        with pytest.raises(UserError, match="constant 0: code 0x.* is not a number"):
            identity(file, number, tmp_path / "n")


def test_a_code_outside_of_the_format(packed, tmp_path):
    file = packed((1,))
    fmt = {"kind": "integer", "bits": 4, "signed": True, "narrow": True}
    number = file.stored([1, 2], [14, 15], 4, fmt)
    with pytest.raises(UserError, match=r"constant 0: code 8 is outside of -7 ... 7"):
        identity(file, number, tmp_path / "n")


def test_it_executes_what_it_read(small, tmp_path):
    network = load(small.save(tmp_path / "n"))
    x = np.random.default_rng(1).uniform(0, 255, (5, *small.shape)).astype(np.float32)
    np.testing.assert_array_equal(run(network, x), small.execute(x)[0])
    with pytest.raises(UserError, match=r"an input of \[6, 6, 3\] was given; it takes \[6, 6, 2\]"):
        run(network, np.zeros((1, 6, 6, 3)))


DAMAGE = {
    "version": (lambda g: g.update(version=2), "version 2 is unknown"),
    "format": (lambda g: g.update(format="other"), "no network of qflax"),
    "operation": (lambda g: g["nodes"][1].__setitem__(0, "convolve"), "node 1: .*'convolve'.*did you mean"),
    "no probe": (lambda g: g["metadata"].pop("probe"), "metadata: probe: no 'probe'"),
    "probe size": (lambda g: [o.pop() for o in g["metadata"]["probe"]["outputs"]], "2 outputs; .* has 3"),
    "probe count": (lambda g: g["metadata"]["probe"].update(count=3), "for every example"),
    "sum of no integers": (lambda g: g["metadata"]["probe"]["sums"].append([2, 1]), "node 2 has a sum"),
    "later value": (lambda g: g["nodes"][0][1].__setitem__(0, 30), "node 0: number 30"),
    "no constant": (lambda g: g["constants"].pop(), "constants: numbers.bin has"),
    "shape": (lambda g: g["constants"][0].update(shape=[3, 3, 2, 5]), "codes.bin ends|outside"),
    "kernel shape": (lambda g: g["constants"][0].update(shape=[3, 3, 4, 2]), "node 1: inputs .* do not fit"),
    "negative": (lambda g: g.update(shape=[6, 6, -2]), "graph.json: -2 is no whole number of 1 or more"),
    "attribute": (lambda g: g["nodes"][1][2].pop("groups"), "node 1: conv has attributes"),
    "attribute kind": (lambda g: g["nodes"][1][2].update(strides=1), "node 1: 1 is no list of 2"),
    "rounding": (lambda g: g["nodes"][0][2].update(rounding="up"), "node 0: rounding 'up' is unknown"),
    "kind": (lambda g: g["constants"][0]["format"].update(kind="posit"), "constant 0: .*'posit' is unknown"),
    "bits": (lambda g: g["constants"][0]["format"].update(bits=40), "constant 0: bits=40"),
    "inputs": (lambda g: g["nodes"][2][1].append(0), "node 2: multiply has 3 inputs"),
    "promise": (
        lambda g: g["constants"][2].update(accumulator_bits=8),
        "constants: number 3 has accumulator",
    ),
    "promise size": (lambda g: g["constants"][0].update(accumulator_bits=99), "constant 0: .* at most 64"),
    "examples": (
        lambda g: g["nodes"].__setitem__(10, ["sum", [20], {"axes": [0]}, ""]),
        r"output: output \[3\]",
    ),
    "output": (lambda g: g.update(output=99), "output: number 99"),
    "reshape": (lambda g: g["nodes"][7][2].update(shape=[-1, 37]), "node 7: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_in_the_graph_is_told(small, tmp_path, name):
    change, message = DAMAGE[name]
    path = small.save(tmp_path / "n")
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    graph = json.loads(entries["graph.json"])
    change(graph)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, json.dumps(graph) if entry == "graph.json" else data)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_archives_and_files(tmp_path):
    path = tmp_path / "n"
    with pytest.raises(UserError, match="No such file"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("graph.json", "{}")
    with pytest.raises(UserError, match="holds graph.json; a packed network has"):
        load(path)


def test_every_truncation_is_an_error(small, tmp_path):
    data = small.save(tmp_path / "n").read_bytes()
    for length in [*range(2, len(data), 23), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(UserError, match="the archive is damaged: .*; copy or export it again"):
            load(tmp_path / "cut")


def test_no_flipped_bit_changes_the_network(small, tmp_path):
    """Many places of an archive are redundant, so that not all flips are errors."""
    data = small.save(tmp_path / "n").read_bytes()
    original, errors = load(tmp_path / "n"), 0
    for bit in range(16, 8 * len(data), 41):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            network = load(tmp_path / "flipped")
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
            continue
        assert network.nodes == original.nodes and network.probe.sums == original.probe.sums
        for number, array in original.fixed.items():
            np.testing.assert_array_equal(network.fixed[number], array)
    assert errors > 100
