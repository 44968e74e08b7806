"""Whatever is in a file, it is verified or refused in one line, and never takes much memory."""

import contextlib
import io
import json
import pathlib
import random
import zipfile

import pytest
from hostile import archive, damaged, entries, mutated, outcome, refused

from qflax.cli import main
from qflax.untrusted import ELEMENTS

UINT1 = {"kind": "integer", "bits": 1, "signed": False, "narrow": False}


@pytest.mark.parametrize("seed", range(4))
def test_packed_files_with_a_changed_graph(small, tmp_path, seed):
    graph, codes, numbers = entries(small.save(tmp_path / "n"))
    graph, rng = json.loads(graph), random.Random(seed)
    codes_seen = {outcome(archive(tmp_path / "m", mutated(graph, rng), codes, numbers))[0] for _ in range(40)}
    assert codes_seen >= {0, 2}


@pytest.mark.parametrize("seed", range(3))
def test_packed_files_with_damaged_bytes(small, tmp_path, seed):
    data, rng = small.save(tmp_path / "n").read_bytes(), random.Random(seed)
    for _ in range(40):
        (tmp_path / "m").write_bytes(damaged(data, rng))
        outcome(tmp_path / "m")


def network(shape, constants, nodes, count=1, outputs=1):
    probe = {"count": count, "low": 0.0, "high": 1.0, "outputs": [[0.0] * outputs] * count, "sums": []}
    return {
        "format": "qflax",
        "version": 1,
        "shape": shape,
        "constants": constants,
        "nodes": nodes,
        "output": len(constants) + len(nodes),
        "metadata": {"probe": probe},
    }


def pool(window, padding, strides=1):
    attributes = {"window": [window] * 2, "strides": [strides] * 2, "padding": [[padding, 0]] * 2}
    return ["sum_pool", [0], attributes, ""]


def conv(stride=1, padding=0, dilation=1, groups=1):
    attributes = {"strides": [stride, 1], "padding": [[padding, 0], [0, 0]]}
    return ["conv", [0, 1], {**attributes, "dilation": [dilation, 1], "groups": groups}, ""]


KERNEL, SQUARE = [{"shape": [1, 1, 1, 1]}], [["transpose", [0], {"permutation": [1, 0]}, ""]]
LARGE = "more than 67,108,864 elements"
PACKED = {
    "input": (network([10**12], [], [["sign", [0], {}, ""]]), LARGE),
    "no whole size": (network([1.0], [], [["sign", [0], {}, ""]]), "1.0 is no whole number"),
    "axes": (network([1] * 99, [], [["sign", [0], {}, ""]]), "axes are more than 64"),
    "product of sizes": (network([1], [{"shape": [10**12] * 60}], []), LARGE),
    "size of 4000 digits": (network([1], [{"shape": [10**4000]}], []), LARGE),
    "array beyond the data": (network([1], [{"shape": [10**6]}], []), "numbers.bin ends after 4"),
    "codes beyond the data": (network([1], [{"shape": [10**6], "format": UINT1}], []), "codes.bin ends"),
    "window": (network([4000, 4000, 1], [], [pool(2000, 0)]), "products"),
    "window beyond": (network([4, 4, 1], [], [pool(5, 0)]), "larger than the padded input"),
    "border": (network([1, 1, 1], [], [pool(1, 10**9)]), LARGE),
    "stride 0": (network([4, 4, 1], KERNEL, [conv(stride=0)]), "0 is no whole number of 1"),
    "dilation": (network([4, 4, 1], KERNEL, [conv(dilation=-1)]), "-1 is no whole number of 1"),
    "groups": (network([4, 4, 1], KERNEL, [conv(groups=10**9)]), "do not fit a kernel"),
    "padding": (network([4, 4, 1], KERNEL, [conv(padding=10**9)]), LARGE),
    "negative padding": (network([4, 4, 1], KERNEL, [conv(padding=-1)]), "-1 is no whole number of 0"),
    "pad": (network([1], [], [["pad", [0], {"padding": [[0, 0], [0, 10**12]]}, ""]]), LARGE),
    "reshape": (network([1], [], [["reshape", [0], {"shape": [-1, 10**30]}, ""]]), "node 0: "),
    "power": (network([10**6], [], [["power", [0], {"exponent": 10**4000}, ""]]), "products"),
    "broadcast": (
        network(
            [10**4, 1],
            [],
            [["transpose", [0], {"permutation": [0, 2, 1]}, ""], ["multiply", [0, 1], {}, ""]],
        ),
        LARGE,
    ),
    "batch squared": (
        network(
            *([1], [], [*SQUARE, ["multiply", [0, 1], {}, ""], ["sum", [2], {"axes": [1]}, ""]]),
            *(20_000, 1),
        ),
        "",
    ),
    "examples of the probe": (network([10**5], [], [["sign", [0], {}, ""]], 10**4, 1), LARGE),
    "scale 0": (
        network(
            *([1], [{"shape": []}]),
            [["quantize", [0, 1], {"format": UINT1, "rounding": "floor"}, ""]],
        ),
        "a scale of 0.0",
    ),
    "scale from nowhere": (
        network([1], [], [["quantize", [0, 5], {"format": UINT1, "rounding": "floor"}, ""]]),
        "number 5",
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_networks_that_cannot_be(tmp_path, name):
    graph, part = PACKED[name]
    refused(archive(tmp_path / "m", graph, numbers=bytes(4 * bool(graph["constants"]))), part)


def test_work_is_limited(tmp_path, monkeypatch):
    nodes = [["sign", [0], {}, ""]] * 100
    path = archive(tmp_path / "m", network([1], [], nodes))
    assert outcome(path)[0] == 1  # The probe's outputs are not the network's.
    monkeypatch.setattr("qflax.verify.network.WORK", 2**26)
    refused(path, "node 63: executing it takes more than 67,108,864 products")
    refused(archive(path, network([1], [], nodes[:50], count=2)), "output: executing it takes more")


def test_a_constant_of_compressed_zeros(tmp_path):
    graph = network([1], [{"shape": [2 * ELEMENTS], "format": UINT1}], [["sign", [0], {}, ""]])
    refused(archive(tmp_path / "m", graph, bytes(ELEMENTS // 4)), LARGE)


TEXTS = {
    "nothing": b"",
    "other JSON": b"[1]",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "unfinished": b'{"format": "qflax"',
    "version": b'{"format": "qflax", "version": NaN}',
    "empty": b'{"format": "qflax", "version": 1}',
    "long": b" " * (2**24 + 1),
}
PARTS = {"version": "version nan is unknown", "empty": "no 'shape'"}


@pytest.mark.parametrize("name", TEXTS)
def test_graphs_that_are_none(tmp_path, name):
    refused(archive(tmp_path / "m", TEXTS[name]), PARTS.get(name, "graph.json"))


def bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("codes.bin", "w") as member,
    ):
        for _ in range(17):
            member.write(bytes(2**24))


def lying_bomb(path):
    """Its member says that it has 10 bytes."""
    archive(path, bytes(2**27))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)


def flagged(path):
    archive(path, "{}")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def doubled(path):
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for name in ("graph.json", "graph.json"):
            file.writestr(name, "{}")


def outside(path):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("../../graph.json", "/etc/passwd", *map(str, range(2000))):
            file.writestr(name, "")


ARCHIVES = {
    "bomb": (bomb, "its members have more than 268,435,456 bytes"),
    "lying bomb": (lying_bomb, "damaged"),
    "bzip2": (lambda path: archive(path, bytes(10**6), method=zipfile.ZIP_BZIP2), "compressed by a method"),
    "lzma": (lambda path: archive(path, bytes(10**6), method=zipfile.ZIP_LZMA), "compressed by a method"),
    "encrypted": (flagged, "graph.json is encrypted"),
    "doubled": (doubled, "two members have the same name"),
    "outside": (outside, "holds ../../graph.json"),
    "nothing": (lambda path: zipfile.ZipFile(path, "w").close(), "holds nothing"),
    "only a start": (lambda path: path.write_bytes(b"PK\3\4"), "damaged"),
    "text": (lambda path: path.write_text("PK is how it starts\n"), "damaged"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_no_networks(tmp_path, name):
    make, part = ARCHIVES[name]
    make(tmp_path / "m")
    refused(tmp_path / "m", part)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(tmp_path, seed):
    pytest.importorskip("onnx")
    (tmp_path / "m").write_bytes(random.Random(seed).randbytes(10**seed))
    refused(tmp_path / "m", "neither a packed network nor an ONNX")


def test_what_is_no_file(tmp_path):
    refused(tmp_path, "is a folder; export a workdir first")
    refused(tmp_path / "none", "No such file")
    refused(pathlib.Path("/dev/zero"), "is no regular file")


def test_names_cannot_forge_lines(packed, tmp_path):
    file = packed((1,))
    file.node("dense", [0, file.floats([[0.0]])], "layer\x1b[2J\nverified\ud800")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["verify", str(file.save(tmp_path / "n", [[0.0]]))]) == 0
    assert "layer?[2J verified?" in out.getvalue() and "\x1b" not in out.getvalue()
