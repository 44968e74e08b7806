"""Damaged and hostile files of weights are refused in one line, quickly and within little memory."""

import json
import pathlib
import pickle
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hostile import damaged, mutated

from qflax.errors import UserError
from qflax.models import read_state_dict

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "state_dict.pth"
NESTED = b")" + b"2\x86" * 60  # A tuple of two of a tuple of two ...: hashing it takes 2^60 steps.


def read(path):
    """Whether a file is read; what it is refused with, and the memory, are checked."""
    tracemalloc.start()
    try:
        read_state_dict(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        return False
    finally:
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert memory < 2**26
    return True


def torch_file(path, body, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize("seed", range(3))
def test_damaged_torch_files(tmp_path, seed):
    rng, whole = random.Random(seed), GOLDEN.read_bytes()
    with zipfile.ZipFile(GOLDEN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in members if name.endswith("data.pkl"))
    for i in range(60):
        path = tmp_path / "m.pth"
        if i % 2:
            path.write_bytes(damaged(whole, rng))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in members.items():
                    archive.writestr(name, damaged(data, rng) if name == program else data)
        read(path)


def tensor(key, shape, strides):
    fields = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in (0, shape, strides, False, None))
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\0tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + fields + b"tR"


def state(value):
    return b"}X\x01\0\0\0w" + value + b"s."


PICKLES = {
    "memo of 32 GiB": b"}r" + struct.pack("<I", 2**32 - 1) + b".",
    "key that takes forever": b"}" + NESTED + b"Ns.",
    "keys that take forever": b"}(" + NESTED + b"Nu.",
    "dictionary that takes forever": b"(" + NESTED + b"Nd.",
    "set that takes forever": b"\x8f(" + NESTED + b"\x90.",
    "frozen set that takes forever": b"(" + NESTED + b"\x91.",
    "pairs that take forever": b"ccollections\nOrderedDict\n(](" + NESTED + b"N\x86etR.",
    "storage that takes forever": state(tensor(NESTED, (1,), (1,))),
    "dtype that takes forever": b"(" + NESTED + b"NN" + NESTED + b"tQ.",
    "array of bytes": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "text": b"\x8d" + struct.pack("<Q", 2**62) + b".",
    "whole number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "negative whole number": b"\x8b" + struct.pack("<i", -1) + b".",
    "frame": b"\x95" + struct.pack("<Q", 2**62) + b".",
    "depth": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "system": b"cos\nsystem\n(X\x04\0\0\0truetR.",
    "eval": b"cbuiltins\neval\n(X\x01\0\0\0" + b"1tR.",
    "instance": b"(ios\nsystem\n.",
    "object": b"(cos\nsystem\no.",
    "extension": b"\x82\x01.",
    "class of what is known": b"ccollections\nOrderedDict\n)\x81.",
    "repeated for ever": state(tensor(b"X\x01\0\0\0" + b"0", (10**6, 10**7), (0, 0))),
    "reach": state(tensor(b"X\x01\0\0\0" + b"0", (2**62, 2), (4, 1))),
    "outside": state(tensor(b"X\x0e\0\0\0../../../other", (1,), (1,))),
    "empty stack": b"s.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(tmp_path, name):
    assert not read(torch_file(tmp_path / "m.pth", b"\x80\x04" + PICKLES[name], **{"data/0": bytes(16)}))


def test_numbers_as_keys_are_known(tmp_path):
    path = torch_file(tmp_path / "m.pth", pickle.dumps({1: 2.0, "a": {2: None}}))
    with pytest.raises(UserError, match="its entries 1, 'a' are no tensors"):
        read_state_dict(path)


def test_bombs_of_torch(tmp_path):
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24 + 1))
    assert not read(path)


def safetensors_file(path, header, data=bytes(4), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype="F32", shape=(1,), start=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS = {
    "length": ({}, 2**63),
    "length beyond": ({"a": entry()}, 10**6),
    "negative": ({"a": entry(shape=[-1])}, None),
    "huge": ({"a": entry(shape=[2**62, 8])}, None),
    "nothing of a huge array": ({"a": entry(shape=[0, 2**62, 2**62], end=0)}, None),
    "offsets": ({"a": entry(start=10**12, end=10**12 + 4)}, None),
    "backwards": ({"a": entry(start=4, end=0)}, None),
    "overlap": ({"a": entry(), "b": entry()}, None),
    "hole": ({"a": entry(end=2, dtype="F16")}, None),
    "dtype": ({"a": entry(dtype="F31")}, None),
    "lines": ({"a": entry(dtype="F\n\x1b[2J")}, None),
    "axes": ({"a": entry(shape=[1] * 100)}, None),
    "text": ({"a": "b"}, None),
    "list": (b"[]", None),
    "deep": (b'{"a":' + b"[" * 10**5, None),
    "number": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path, name):
    header, length = HEADERS[name]
    assert not read(safetensors_file(tmp_path / "m.safetensors", header, length=length))


@pytest.mark.parametrize("seed", range(2))
def test_damaged_safetensors(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "m.safetensors"
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.int8)}
    whole = safetensors.numpy.save(state)
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    for i in range(60):
        if i % 2:
            path.write_bytes(damaged(whole, rng))
        else:
            safetensors_file(path, mutated(header, rng), whole[8 + size :])
        read(path)


def test_devices_are_refused(tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"m{suffix}"
        path.symlink_to("/dev/zero")
        with pytest.raises(UserError, match="is no regular file"):
            read_state_dict(path)
