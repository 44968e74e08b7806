"""Packed files: what is written is read, in as many bits as the formats have; damage is one line."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from networks import POLICIES

from qflax.deploy import packed
from qflax.deploy.graph import Constant, Graph, Node
from qflax.errors import UserError
from qflax.numerics import IntegerFormat, MinifloatFormat

FORMATS = [
    *(
        IntegerFormat(bits=bits, signed=signed)
        for bits in (1, 2, 3, 5, 8, 11, 16)
        for signed in (True, False)
    ),
    IntegerFormat(bits=4, narrow=True),
    MinifloatFormat(exponent_bits=4, mantissa_bits=3, specials="nan"),
    MinifloatFormat(exponent_bits=3, mantissa_bits=1),
    MinifloatFormat(exponent_bits=2, mantissa_bits=1, signed=False),
]


def numbers_of(fmt):
    """All numbers of a format."""
    if isinstance(fmt, IntegerFormat):
        return np.array([-1, 1]) if fmt.bipolar else np.arange(fmt.lowest, fmt.highest + 1)
    return np.concatenate([fmt.values, -fmt.values[1:]] if fmt.signed else [fmt.values])


def graph_of(constant):
    node = Node(operation="dense", inputs=("input", "kernel"), output="out", layer="classifier")
    return Graph(
        input="input",
        shape=(len(constant.array),),
        output="out",
        nodes=(node,),
        constants={"kernel": constant},
        metadata={"probe": {"count": 0}},
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_numbers_come_back_and_take_the_format_s_bits(tmp_path, fmt):
    array = np.float32(np.random.default_rng(0).permutation(np.resize(numbers_of(fmt), (101, 3))))
    graph = graph_of(Constant(array=array, format=fmt, accumulator_bits=13))
    packed.save(graph, tmp_path / "file")
    read = packed.load(tmp_path / "file")
    (constant,) = read.constants.values()
    np.testing.assert_array_equal(constant.array, array)
    assert (constant.format, constant.accumulator_bits) == (fmt, 13)
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert len(archive.read("codes.bin")) == -(-303 * fmt.bits // 8)


@pytest.mark.parametrize("name", POLICIES)
def test_networks_come_back(tmp_path, lowered, name):
    graph = dataclasses.replace(lowered(name), metadata={"dataset": "none"})
    packed.save(graph, tmp_path / "file")
    read = packed.load(tmp_path / "file")
    assert (read.shape, read.metadata) == (graph.shape, graph.metadata)
    describe = [(node.operation, node.attributes, node.layer) for node in graph.nodes]
    assert [(node.operation, node.attributes, node.layer) for node in read.nodes] == describe
    for old, new in zip(graph.constants.values(), read.constants.values(), strict=True):
        np.testing.assert_array_equal(new.array, old.array)
        assert (new.format, new.accumulator_bits) == (old.format, old.accumulator_bits)
    packed.save(graph, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_damage_is_one_line(tmp_path):
    file, fmt = tmp_path / "file", IntegerFormat(bits=4)
    packed.save(graph_of(Constant(array=np.ones((9, 3), np.float32), format=fmt)), file)
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="no packed file of qflax, or a damaged one"):
            packed.load(file)
    with pytest.raises(UserError, match="No such file"):
        packed.load(tmp_path / "none")


def test_other_versions_and_lengths_are_refused(tmp_path):
    file = tmp_path / "file"
    packed.save(graph_of(Constant(array=np.ones((9, 3), np.float32))), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(entries["graph.json"])
    changes = {"version": 2}, {"nodes": [["sort", [0], {}, ""]]}
    for change in (*({"graph.json": json.dumps({**header, **new})} for new in changes), {"codes.bin": b"1"}):
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in {**entries, **change}.items():
                archive.writestr(name, data)
        with pytest.raises(UserError, match="version 2|unknown operation 'sort'|lengths do not match"):
            packed.load(file)
