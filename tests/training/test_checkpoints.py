"""Checkpoints: what is kept, what comes back, what is damaged."""

import pathlib
import resource
import shutil

import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training.checkpoints import Checkpoints, CheckpointWriter, open_checkpoints


def state(value):
    return {"a": np.full((2, 3), value, np.float32), "n": np.int32(value)}


def saved(workdir, *steps, keep=5):
    """The checkpoints of some steps, each with its step's number for its values."""
    writer = CheckpointWriter(workdir, keep)
    for step in steps:
        writer.save(state(step), step, record={"logged_step": step})
    writer.close()
    return Checkpoints(workdir)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_latest_and_the_best_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step, accuracy in [(1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6), (5, None)]:
        writer.save(state(step), step, None if accuracy is None else {"accuracy": accuracy})
    writer.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"2", "4", "5"}
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.steps == [2, 4, 5] and checkpoints.best_step() == 2
    empty(checkpoints.folder / "5" / "digests.json")
    assert Checkpoints(tmp_path).best_step() == 2
    empty(checkpoints.folder / "2" / "digests.json")
    assert Checkpoints(tmp_path).best_step() == 4


def test_a_state_and_its_record_come_back_bit_for_bit(tmp_path):
    writer = CheckpointWriter(tmp_path)
    values = {"x": np.array([1e-45, -0.0, np.pi, np.inf], np.float32), "k": np.uint32(2**32 - 1)}
    record = {"rows": {"loss": np.float32([0.1, np.nan, 1e-45]).tolist()}}
    writer.save(values, 7, record=record)
    writer.close()
    restored = open_checkpoints(tmp_path).restore(jax.eval_shape(lambda: values), 7)
    for name, value in values.items():
        assert restored.state[name].dtype == value.dtype
        assert np.asarray(restored.state[name]).tobytes() == value.tobytes()
    assert restored.step == 7
    back = np.float32(restored.record["rows"]["loss"])
    assert back.tobytes() == np.float32([0.1, np.nan, 1e-45]).tobytes()


def test_the_saved_state_is_a_copy(tmp_path):
    writer, values = CheckpointWriter(tmp_path), state(1)
    writer.save(values, 1)
    values["a"][:] = 99
    writer.close()
    np.testing.assert_array_equal(Checkpoints(tmp_path).restore(values, 1).state["a"], 1)


def test_a_step_is_saved_again_in_place_of_the_first(tmp_path):
    saved(tmp_path, 1, 2)
    writer = CheckpointWriter(tmp_path, 5)
    writer.save(state(9), 2, {"accuracy": 0.5})
    writer.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1, 2] and checkpoints.best_step() == 2
    np.testing.assert_array_equal(checkpoints.restore(state(0), 2).state["a"], 9)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"1", "2"}


def test_the_first_one_of_a_step_stays_until_the_second_is_written(tmp_path, monkeypatch):
    def stop(folder):
        raise OSError(f"{folder}: stopped")

    saved(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr("qflax.training.checkpoints._digests", stop)
        writer = CheckpointWriter(tmp_path)
        writer.save(state(9), 2, {"accuracy": 0.5})
        with pytest.raises(UserError, match="checkpoints/2: could not be written"):
            writer.wait()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [2] and checkpoints.latest_sound() is not None
    restored = checkpoints.restore_latest(state(0), pytest.fail)
    np.testing.assert_array_equal(restored.state["a"], 2)
    assert restored.step == 2 and restored.record["logged_step"] == 2
    checkpoints = saved(tmp_path, 2)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"2"}


@pytest.mark.parametrize("other", [{"a": np.zeros((2, 4), np.float32)}, {"b": np.int32(0)}])
def test_another_networks_state_is_refused(tmp_path, other):
    with pytest.raises(UserError, match="no state of this configuration"):
        saved(tmp_path, 1).restore({**state(0), **other}, 1)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoints"):
        open_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "junk").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoints(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty, pathlib.Path.unlink])
def test_damage_of_any_file_is_recognised_and_set_aside(tmp_path, damage):
    checkpoints = saved(tmp_path, 1, 2)
    whole = tmp_path / "whole"
    shutil.copytree(checkpoints.folder / "2", whole)
    # Orbax itself notices no flipped bit of an array.
    named = [path for path in files(whole) if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]
    assert len(named) >= 6
    for path in named:
        name = path.relative_to(whole).as_posix()
        victim = checkpoints.folder / "2" / name
        damage(victim)
        # A digest that is changed no longer fits a file that is whole.
        reason = "" if damage is flip and path.name == "digests.json" else f".*{path.name}"
        with pytest.raises(UserError, match=rf"checkpoints/2: damaged \({reason}"):
            Checkpoints(tmp_path).restore(state(0), 2)
        assert Checkpoints(tmp_path).latest_sound() == checkpoints.folder / "1"
        told = []
        restored = Checkpoints(tmp_path).restore_latest(state(0), told.append)
        assert restored.step == 1 and restored.state["n"] == 1 and restored.record == {"logged_step": 1}
        assert len(told) == 1 and "damaged_checkpoints/2" in told[0]
        shutil.copytree(whole, checkpoints.folder / "2")
    aside = [path.name for path in (tmp_path / "damaged_checkpoints").iterdir()]
    assert sorted(aside) == sorted(["2", *(f"2.{i}" for i in range(1, len(named)))])


def test_where_none_is_sound_all_stay(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        cut(checkpoints.folder / str(step) / "digests.json")
    with pytest.raises(UserError, match="no checkpoint is sound.*1: digests.json.*2: digests.json"):
        Checkpoints(tmp_path).restore_latest(state(0), print)
    assert Checkpoints(tmp_path).steps == [1, 2] and not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize("text", ["[]", '"x"', "1", "{" * 5000])
def test_digests_of_another_kind_are_damage(tmp_path, text):
    checkpoints = saved(tmp_path, 1)
    (checkpoints.folder / "1" / "digests.json").write_text(text)
    assert "digests.json" in checkpoints.damage(1)


def test_what_a_writer_left_unfinished_is_no_checkpoint_and_goes(tmp_path):
    checkpoints = saved(tmp_path, 1)
    unfinished = checkpoints.folder / "2.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.folder / "1" / "state", unfinished / "state")
    assert Checkpoints(tmp_path).steps == [1]
    assert saved(tmp_path, 3).steps == [1, 3]
    assert not unfinished.exists()


def test_a_checkpoint_that_could_not_be_written_is_told_of(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.save(state(1), 1)
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # What a full disk is like.
    try:
        writer.save({"a": np.arange(10_000.0)}, 2)
        with pytest.raises(
            UserError, match=r"checkpoints/2: could not be written \(File too.*checkpoints/1;"
        ):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
    assert Checkpoints(tmp_path).steps == [1]
    assert Checkpoints(tmp_path).restore(state(0), 1).state["n"] == 1
