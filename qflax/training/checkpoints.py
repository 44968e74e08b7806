"""Checkpoints: asynchronous, the latest ones and the best one by validation."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from qflax.errors import UserError, require

FOLDER = "checkpoints"
_METRIC = "validation_accuracy"


class Checkpoints:
    """Checkpoints of a run, under `checkpoints/STEP` in its workdir.

    They hold host arrays, so that a run resumes on any number of devices.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 1, *, read_only: bool = False):
        """Opens the folder.

        Args:
          workdir: of the run.
          keep: number of latest checkpoints to keep besides the best.
          read_only: neither makes the folder nor cleans up in it.
        """
        self._folder = workdir.absolute() / FOLDER
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC], n=1, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policy,
            best_fn=lambda metrics: metrics[_METRIC],
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the best validation accuracy, or None where none was measured."""
        scored = [info for info in self._manager.all_steps() if self._accuracy(info) is not None]
        return max(scored, key=self._accuracy, default=None)

    def save(self, state, step: int, validation: Mapping[str, float] | None = None) -> None:
        """Starts to write the state; a checkpoint of that step that exists already is kept.

        Args:
          state: tree of arrays.
          step: number of updates made.
          validation: metrics of the validation split, by which the best one is kept.
        """
        if step in self._manager.all_steps():
            return
        # Own copies: on a CPU a host view would share memory that the next step reuses.
        copies = jax.tree.map(lambda x: np.array(x, copy=True), state)
        metrics = None if validation is None else {_METRIC: float(validation["accuracy"])}
        self._manager.save(step, args=ocp.args.StandardSave(copies), metrics=metrics)

    def restore(self, abstract_state, step: int):
        """Reads the checkpoint of a step into a tree of host arrays like `abstract_state`.

        Raises:
          UserError: the checkpoint is damaged, or holds another network's state.
        """
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state)
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            # Orbax takes an array of another shape without a word.
            jax.tree.map(_require_same_shape, target, state)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self._folder / str(step)}: cannot be read as this configuration's state ({reason}); "
                "delete it to go on from the checkpoint before it"
            ) from None
        return state

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def _accuracy(self, step: int) -> float | None:
        return (self._manager.metrics(step) or {}).get(_METRIC)


def _require_same_shape(expected: np.ndarray, found: np.ndarray) -> None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ValueError(
            f"an array is {found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)}"
        )


def open_checkpoints(workdir: pathlib.Path) -> tuple[Checkpoints, int]:
    """Opens a finished or running run's checkpoints for reading, with the latest step.

    Raises:
      UserError: there is none.
    """
    require(
        (workdir / FOLDER).is_dir(),
        f"{workdir}: has no {FOLDER}; train there first: python train.py --config=... --workdir={workdir}",
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    require(step is not None, f"{workdir / FOLDER}: holds no complete checkpoint; train there first")
    return checkpoints, step
