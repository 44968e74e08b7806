"""State dicts of either kind of file; errors name the file and a remedy."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qflax.errors import UserError
from qflax.models.state_dict import read_state_dict

TORCH_FILE = pathlib.Path(__file__).parents[1] / "golden" / "state_dict.pth"
DTYPES = (
    "float16",
    "float32",
    "float64",
    "bool",
    *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)),
)


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
def test_safetensors_of_every_dtype(tmp_path, dtype):
    state = {
        "weight": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.zeros((0, 2), dtype),
    }
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(state, path)
    read = read_state_dict(str(path))
    assert read.keys() == state.keys()
    for name, array in state.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_files(tmp_path, suffix):
    path = shutil.copy(TORCH_FILE, tmp_path / f"weights{suffix}")
    np.testing.assert_array_equal(read_state_dict(path)["parameter"], np.float32([-1.5, 2.5]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["module.fc.weight", "module.fc.bias"], ["fc.weight", "fc.bias"]),
        (["module.fc.weight", "fc.bias"], ["module.fc.weight", "fc.bias"]),
        (["module.module.a"], ["module.a"]),
    ],
)
def test_prefix_of_parallel_modules_is_dropped_where_all_have_it(tmp_path, names, expected):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({name: np.full(1, len(name)) for name in names}, path)
    state = read_state_dict(path)
    assert sorted(state) == sorted(expected)
    assert all(state[new] == len(old) for old, new in zip(names, expected, strict=True))


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff" * 100])
def test_broken_safetensors_are_refused_with_a_remedy(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    assert "download it again" in refusal(path) and "save_file" in refusal(path)


def test_truncated_and_empty_safetensors_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in refusal(path)
    safetensors.numpy.save_file({}, path)
    assert "empty" in refusal(path)


def test_dtypes_that_numpy_lacks_are_refused_with_the_choices(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    assert "'F8_E4M3'" in refusal(path) and "BF16" in refusal(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_missing_files_and_folders_are_refused(tmp_path, suffix):
    assert "no such file" in refusal(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "cannot be read" in refusal(tmp_path / f"folder{suffix}")


def test_unknown_suffixes_are_refused_with_the_choices():
    assert "'.onnx'" in refusal("weights.onnx") and ".safetensors, .pth, .pt" in refusal("weights.onnx")
