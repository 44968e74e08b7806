"""What a run writes while it goes on: logs, progress, checkpoints; of several processes the first one."""

import contextlib
import pathlib
from collections.abc import Mapping

import ml_collections

from qflax import config as config_lib
from qflax.training import workdir as workdir_lib
from qflax.training.checkpoints import Checkpoints, CheckpointWriter
from qflax.training.logs import Logs, Progress


class Silence:
    """Records nothing: what the other processes do.

    Attributes:
      seconds: see `Logs`.
      last_train: see `Logs`.
    """

    seconds = 0.0

    def __init__(self):
        """Nothing was logged before."""
        self.last_train = {}

    def say(self, text: str) -> None:
        """Tells the user something."""

    def advance(self, step: int) -> None:
        """See `Progress`."""

    def show(self, scalars: Mapping[str, float]) -> None:
        """See `Progress`."""

    def write(self, step: int, scalars: Mapping[str, float], group: str) -> None:
        """See `Logs`."""

    def draw_layers(self, step: int, costs, kernels) -> None:
        """See `Logs`."""

    def conclude(self, fields: Mapping[str, object]) -> None:
        """See `Logs`."""

    def save(self, state, step: int, validation=None, record=None) -> None:
        """See `CheckpointWriter`."""

    def wait(self) -> pathlib.Path | None:
        """Waits until all checkpoints are written; returns the latest sound one."""

    def close(self) -> None:
        """Writes what is left."""


class Recorder(Silence):
    """Records all in a workdir."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        origin: Mapping,
        *,
        start: int,
        logged_step: int,
        total: int,
        steps_per_epoch: float,
    ):
        """Begins to write.

        Args:
          config: of the run.
          workdir: to write.
          origin: of this start, see `provenance`.
          start: step that the run starts from.
          logged_step: up to which all is logged.
          total: number of steps of the run.
          steps_per_epoch: of the run.

        Raises:
          UserError: what an earlier start left is damaged.
        """
        self._workdir = workdir
        config_lib.save(config, workdir)
        workdir_lib.record_start(workdir, start, origin)
        self._checkpoints = CheckpointWriter(workdir, config.keep_checkpoints)
        self._logs = Logs(workdir, logged_step)
        self._progress = Progress(total, start, steps_per_epoch)
        self.last_train = self._logs.last_train
        self.say, self.advance, self.show = self._progress.say, self._progress.advance, self._progress.show
        self.write = self._logs.write
        self.draw_layers, self.conclude = self._logs.draw_layers, self._logs.conclude

    @property
    def seconds(self) -> float:
        """See `Logs`."""
        return self._logs.seconds

    def save(self, state, step: int, validation=None, record=None) -> None:
        """See `CheckpointWriter`; what is logged is in the files first: who goes on does not log it again."""
        try:
            self._logs.flush()
        finally:
            self._checkpoints.save(state, step, validation, record)

    def wait(self) -> pathlib.Path | None:
        """See `Silence`."""
        self._checkpoints.wait()
        return Checkpoints(self._workdir).latest_sound()

    def close(self) -> None:
        """See `Silence`."""
        with contextlib.ExitStack() as stack:  # Each one, whatever becomes of the others; checkpoints last.
            for part in (self._checkpoints, self._logs, self._progress):
                stack.callback(part.close)
