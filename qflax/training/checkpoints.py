"""Checkpoints: asynchronous, the latest ones and the best one by validation, each with its files' digests."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from qflax.errors import UserError, require
from qflax.files import write_atomically

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"
_METRIC = "validation_accuracy"
# Of several processes the first one reads and writes, without a word to the others.
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
_DIGESTS_FILE = "digests.json"
# Of a checkpoint that is written again: the first one of its step, until the second one is complete.
_REPLACED = ".replaced"
# Orbax writes these after the digests; what a state is does not depend on them.
_NOT_DIGESTED = ("_CHECKPOINT_METADATA", "commit_success.txt", _DIGESTS_FILE)


class Restored(NamedTuple):
    """A checkpoint.

    Attributes:
      state: tree of host arrays.
      step: number of updates made.
      record: what was saved with the state, in the types of JSON.
    """

    state: object
    step: int
    record: dict


class Checkpoints:
    """Checkpoints of a run, under `checkpoints/STEP` in its workdir, to read.

    They hold host arrays, so that a run resumes on any number of devices.
    """

    def __init__(self, workdir: pathlib.Path):
        """Takes those that are complete; writes nothing."""
        self._workdir = workdir.absolute()
        self.folder = self._workdir / FOLDER
        found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        self._folders = {int(path.stem): path for path in found if _is_replaced(path)}
        self._folders |= {int(path.name): path for path in found if path.name.isdigit()}
        self.steps = sorted(self._folders)

    def best_step(self) -> int | None:
        """Step of the sound checkpoint with the best validation accuracy, or None where none was measured."""
        sound = [step for step in self.steps if self.damage(step) is None]
        records = {step: self._read(step, record=ocp.args.JsonRestore()).record for step in sound}
        scored = {step: record[_METRIC] for step, record in records.items() if _METRIC in record}
        return max(scored, key=scored.get, default=None)

    def latest_sound(self) -> pathlib.Path | None:
        """Folder of the latest checkpoint that is not damaged, or None."""
        sound = (step for step in reversed(self.steps) if self.damage(step) is None)
        step = next(sound, None)
        return None if step is None else self._folders[step]

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, or None."""
        folder = self._folders[step]
        try:
            digests = json.loads((folder / _DIGESTS_FILE).read_text())
            found = _digests(folder)
        except (OSError, ValueError) as error:
            return f"{_DIGESTS_FILE}: {error}"
        if not isinstance(digests, dict) or digests.keys() - found.keys():
            missing = sorted(digests.keys() - found.keys()) if isinstance(digests, dict) else [_DIGESTS_FILE]
            return f"{missing[0]} is missing"
        changed = [name for name in digests if digests[name] != found[name]]
        return f"{changed[0]} is not what was written" if changed else None

    def restore(self, abstract_state, step: int) -> Restored:
        """Reads the checkpoint of a step.

        Args:
          abstract_state: a tree like the one to read.
          step: one of `steps`.

        Raises:
          UserError: the checkpoint is damaged, or holds another network's state.
        """
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state)
        items = self._read(step, state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore())
        # Orbax takes an array of another shape without a word.
        expected, found = (jax.tree.map(np.shape, tree) for tree in (target, items.state))
        require(expected == found, _another_state(self._folders[step], "arrays of other shapes"))
        return Restored(items.state, step, items.record)

    def restore_latest(self, abstract_state, say: Callable[[str], None]) -> Restored | None:
        """Reads the latest checkpoint that is sound, or returns None where there is none at all.

        Damaged ones are moved to `damaged_checkpoints/` in the workdir, once a sound one has been read.

        Args:
          abstract_state: a tree like the one to read.
          say: is told what was moved.

        Raises:
          UserError: all are damaged, or the latest sound one holds another network's state.
        """
        damaged = {step: self.damage(step) for step in self.steps}
        damaged = {step: what for step, what in damaged.items() if what is not None}
        sound = [step for step in self.steps if step not in damaged]
        if not sound:
            what = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            require(
                not damaged,
                f"{self.folder}: no checkpoint is sound ({what}); put one back from a copy, or train anew in "
                "another --workdir",
            )
            return None
        restored = self.restore(abstract_state, sound[-1])
        for step, what in damaged.items():
            aside = self._set_aside(step)
            say(f"{self._folders[step]} is damaged ({what}); it is now {aside}")
        self.steps = sound
        return restored

    def _read(self, step: int, **items):
        folder, damage = self._folders[step], self.damage(step)
        require(
            damage is None,
            f"{folder}: damaged ({damage}); put it back from a copy, use another one (--checkpoint=best), or "
            "of a trained run delete result.json and run train.py again: it goes on from the one before",
        )
        try:
            options = ocp.CompositeOptions(multiprocessing_options=_ALONE)
            handler = ocp.CompositeCheckpointHandler(composite_options=options)
            with ocp.Checkpointer(handler, multiprocessing_options=_ALONE) as reader:
                found = reader.restore(folder, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(_another_state(folder, reason)) from None
        return found

    def _set_aside(self, step: int) -> pathlib.Path:
        folder = self._workdir / DAMAGED_FOLDER
        folder.mkdir(exist_ok=True)
        names = (str(step), *(f"{step}.{i}" for i in range(1, 1000)))
        aside = next(folder / name for name in names if not (folder / name).exists())
        return self._folders[step].rename(aside)


class _Manager(ocp.CheckpointManager):
    """A manager in one of several processes."""

    def reached_preemption(self, step: int) -> bool:
        """Left to the loop: asked for by one process alone, JAX has no agreement."""
        del step
        return False


class CheckpointWriter:
    """Writes checkpoints of a run; what an interrupted writer left unfinished is cleaned up."""

    def __init__(self, workdir: pathlib.Path, keep: int = 1):
        """Opens the folder, whose checkpoints must be sound (`Checkpoints.restore_latest`).

        Args:
          workdir: of the run.
          keep: number of latest checkpoints to keep besides the best.
        """
        self._folder = workdir.absolute() / FOLDER
        self._writing = None
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=lambda metrics: metrics[_METRIC],
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._digest),
            create=False,
            multiprocessing_options=_ALONE,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._drop_replaced()
        self._manager = _Manager(self._folder, options=options, item_names=("state", "record", "metrics"))

    def save(
        self, state, step: int, validation: Mapping[str, float] | None = None, record: Mapping | None = None
    ) -> None:
        """Starts to write the state, in place of a checkpoint of that step, which stays until it is written.

        Args:
          state: tree of arrays.
          step: number of updates made.
          validation: metrics of the validation split, by which the best one is kept.
          record: what else to save, in the types of JSON.

        Raises:
          UserError: this one or the one before could not be written.
        """
        # Own copies: on a CPU a host view would share memory that the next step reuses.
        copies = jax.tree.map(lambda x: np.array(x, copy=True), state)
        metrics = None if validation is None else {_METRIC: float(validation["accuracy"])}
        record = {**(record or {}), **(metrics or {})}
        items = ocp.args.Composite(state=ocp.args.StandardSave(copies), record=ocp.args.JsonSave(record))
        self.wait()
        with self._telling():
            self._writing = step
            if step in self._manager.all_steps():
                first = self._folder / str(step)
                first.rename(first.with_name(f"{step}{_REPLACED}"))
                self._manager.reload()
            self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: the last one could not be written.
        """
        with self._telling():
            self._manager.wait_until_finished()
        self._drop_replaced()

    def close(self) -> None:
        """Waits likewise, and ends."""
        with self._telling():
            self._manager.close()
        self._drop_replaced()

    def _drop_replaced(self) -> None:
        """Removes the first checkpoints of steps that have a second one."""
        for path in self._folder.iterdir():
            if _is_replaced(path) and (self._folder / path.stem).exists():
                shutil.rmtree(path)

    def _digest(self) -> None:
        """Writes the digests of the files of the checkpoint that is about to become complete."""
        (unfinished,) = self._folder.glob(f"{self._writing}.*tmp*")
        write_atomically(unfinished / _DIGESTS_FILE, json.dumps(_digests(unfinished), indent=2) + "\n")

    @contextlib.contextmanager
    def _telling(self):
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            sound = Checkpoints(self._folder.parent).latest_sound()
            before = "there is none before it" if sound is None else f"the one before it is {sound}"
            raise UserError(
                f"{self._folder / str(self._writing)}: could not be written ({_reason(error)}); {before}; "
                "make room or put right what is wrong there, then run the same command again to go on"
            ) from None


def open_checkpoints(workdir: pathlib.Path) -> Checkpoints:
    """Opens a finished or running run's checkpoints for reading.

    Raises:
      UserError: there is none.
    """
    require(
        (workdir / FOLDER).is_dir(),
        f"{workdir}: has no {FOLDER}; train there first: python train.py --config=... --workdir={workdir}",
    )
    checkpoints = Checkpoints(workdir)
    require(bool(checkpoints.steps), f"{workdir / FOLDER}: holds no complete checkpoint; train there first")
    return checkpoints


def _is_replaced(path: pathlib.Path) -> bool:
    return path.suffix == _REPLACED and path.stem.isdigit()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint that tells of its state, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _NOT_DIGESTED)
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _reason(error: Exception) -> str:
    """Why a file could not be written: the system's own words, where they are in the error's."""
    text = str(error).strip()
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text.splitlines()[0] if text else type(error).__name__


def _another_state(folder: pathlib.Path, reason: str) -> str:
    return (
        f"{folder}: its files are whole, but hold no state of this configuration ({reason}); was it written "
        "by another version of qflax?"
    )
