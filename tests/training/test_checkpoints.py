"""Checkpoints."""

import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training.checkpoints import Checkpoints, open_checkpoints


def state(value):
    return {"a": np.full((2, 3), value, np.float32), "n": np.int32(value)}


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, accuracy in [(1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6), (5, None)]:
        checkpoints.save(state(step), step, None if accuracy is None else {"accuracy": accuracy})
    checkpoints.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "4", "5"}
    checkpoints, latest = open_checkpoints(tmp_path)
    assert latest == 5 and checkpoints.best_step() == 2


def test_a_state_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    values = {"x": np.array([1e-45, -0.0, np.pi, np.inf], np.float32), "k": np.uint32(2**32 - 1)}
    checkpoints.save(values, 7)
    checkpoints.close()
    checkpoints, _ = open_checkpoints(tmp_path)
    restored = checkpoints.restore(jax.eval_shape(lambda: values), 7)
    for name, value in values.items():
        assert restored[name].dtype == value.dtype
        assert np.asarray(restored[name]).tobytes() == value.tobytes()


def test_the_saved_state_is_a_copy(tmp_path):
    checkpoints, values = Checkpoints(tmp_path), state(1)
    checkpoints.save(values, 1)
    values["a"][:] = 99
    checkpoints.close()
    checkpoints, _ = open_checkpoints(tmp_path)
    np.testing.assert_array_equal(checkpoints.restore(values, 1)["a"], 1)


def test_another_networks_state_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), 1)
    checkpoints.close()
    checkpoints, _ = open_checkpoints(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore({"a": np.zeros((2, 4), np.float32), "n": np.int32(0)}, 1)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoints"):
        open_checkpoints(tmp_path)
