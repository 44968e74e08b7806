"""Torch's files are read as torch means them, and no code in them is run."""

import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qflax.errors import UserError
from qflax.models.torch_file import read_torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "state_dict.pth"
FLOAT32 = ("float32", "transposed", "slice", "expanded", "parameter", "empty")
KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "i4": "Int", "i2": "Short", "u1": "Byte"}


def code(value):
    """Opcodes that push a value of builtin types."""
    return pickle.dumps(value, protocol=2)[2:-1]


def call(module, name, arguments):
    """Opcodes that push the result of a call."""
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def storage(kind, key="0"):
    return (
        b"("
        + code("storage")
        + f"ctorch\n{kind}Storage\n".encode()
        + code(key)
        + code("cpu")
        + code(0)
        + b"tQ"
    )


def tensor(kind, offset, shape, strides, key="0"):
    fields = code(offset) + code(shape) + code(strides) + code(False) + code(None)
    return call("torch._utils", "_rebuild_tensor_v2", b"(" + storage(kind, key) + fields + b"t")


def dictionary(**entries):
    return b"}(" + b"".join(code(name) + value for name, value in entries.items()) + b"u"


def write(path, body, records, order=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        if order is not None:
            archive.writestr("archive/byteorder", order)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("torch") / "weights.pth"


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert str(path) in message and "torch.save(model.state_dict(), 'new.pth')" in message
    assert "\n" not in message
    return message


def test_file_of_torch_in_a_checkpoint(golden):
    vectors, state = golden("torchvision").case("state_dict"), read_torch(GOLDEN)
    assert len(state) == 12
    for name, array in state.items():
        assert array.dtype.name == ("float32" if name in FLOAT32 else name)
        np.testing.assert_array_equal(array.astype(vectors[name].dtype), vectors[name])
    assert np.shares_memory(state["float32"], state["slice"])
    assert np.shares_memory(state["float32"], state["transposed"])


@st.composite
def views(draw):
    """An array and a view of it with transposed axes and slices with positive steps."""
    dtype = st.sampled_from([np.dtype(kind) for kind in KINDS])
    base = draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=5)))
    view = base.transpose(draw(st.permutations(range(base.ndim))))
    starts = [draw(st.integers(0, n)) for n in view.shape]
    return base, view[tuple(slice(start, None, draw(st.integers(1, 3))) for start in starts)]


@given(views(), st.sampled_from([None, "little", "big"]))
def test_views_of_storages_in_either_byte_order(path, arrays, order):
    base, view = arrays
    itemsize = base.dtype.itemsize
    offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // itemsize
    strides = tuple(stride // itemsize for stride in view.strides)
    body = dictionary(weight=tensor(KINDS[base.dtype.str[1:]], offset, view.shape, strides))
    stored = base.astype(base.dtype.newbyteorder(">" if order == "big" else "<"))
    array = read_torch(write(path, body, {"0": stored.tobytes()}, order))["weight"]
    assert array.dtype == base.dtype and array.dtype.isnative
    np.testing.assert_array_equal(array, view)


def test_entries_of_a_module_s_dictionary(path):
    # Torch keeps versions of the modules as an attribute of the ordered dictionary.
    ordered = call("collections", "OrderedDict", b")")
    entries = b"(" + code("a") + tensor("Float", 1, (2,), (1,)) + b"u"
    state = ordered + entries + dictionary(_metadata=code({"": {"version": 1}})) + b"b"
    data = {"0": np.arange(3, dtype=np.float32).tobytes()}
    for body in (state, dictionary(state_dict=state, epoch=code(3)), dictionary(model=state, name=code("x"))):
        state_dict = read_torch(write(path, body, data))
        assert list(state_dict) == ["a"]
        np.testing.assert_array_equal(state_dict["a"], [1, 2])


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.mkdir, eval, print, getattr, np.zeros, type, pickle.loads])
def test_code_is_refused_before_it_runs(tmp_path, function, protocol):
    marker = tmp_path / "marker"
    argument = f"open({str(marker)!r}, 'w')" if function is eval else str(marker)
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        evil = {"weight": Malicious(function, argument)}
        archive.writestr("archive/data.pkl", pickle.dumps(evil, protocol=protocol))
    assert function.__name__ in refusal(tmp_path / "evil.pth")
    assert not marker.exists()


def test_state_of_what_is_known_cannot_be_set(path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for target in (rebuild, b"ctorch\nFloatStorage\n", tensor("Float", 0, (1,), (1,))):
        slots = b"(" + code(None) + dictionary(__defaults__=code((1,))) + b"tb"
        refusal(write(path, dictionary(weight=target + slots), {"0": bytes(4)}))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        *((0, (5,), (1,)), (4, (1,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (3, (4,), (-1,))),
        *(
            (0, (-1,), (1,)),
            (0, (2,), (1, 1)),
            (0, (2**33 + 1,), (2**29,)),
            (0, ("2",), (1,)),
            ("0", (2,), (1,)),
        ),
    ],
)
def test_tensors_beyond_their_storage_are_refused(path, offset, shape, strides):
    refusal(write(path, dictionary(weight=tensor("Float", offset, shape, strides)), {"0": bytes(16)}))


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (code([1, 2]), "list"),
        (dictionary(net=dictionary(a=tensor("Float", 0, (1,), (1,))), epoch=code(3)), "'net', 'epoch'"),
        (dictionary(model=dictionary(a=code(1.5))), "'a'"),
        (b"}(" + code(1) + tensor("Float", 0, (1,), (1,)) + b"u", "1"),
        (dictionary(a=tensor("ComplexFloat", 0, (1,), (1,))), "torch.ComplexFloatStorage"),
        (dictionary(a=tensor("Float", 0, (1,), (1,), key="7")), "data/7"),
        (dictionary(a=call("__torch__", "Model", b")")), "__torch__.Model"),
        (b"", ""),
        (b"}(", ""),
    ],
)
def test_other_content_is_refused_with_its_name(path, body, part):
    assert part in refusal(write(path, body, {"0": bytes(4)}))


def test_broken_files_and_the_old_format_are_refused(path):
    whole = GOLDEN.read_bytes()
    for data in (
        b"",
        b"<html>not found</html>",
        whole[: len(whole) // 2],
        whole.replace(b"data.pkl", b"data.txt"),
    ):
        path.write_bytes(data)
        refusal(path)
    at = whole.index(np.float32([0, 0.125, 0.25]).tobytes())
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert "CRC" in refusal(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2))
    assert "before version 1.6" in refusal(path)


def test_what_torch_writes_is_read_alike(path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    expected = model.state_dict()
    torch.save(expected, path)
    state = read_torch(path)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value.numpy())
