"""Logs of a run: TensorBoard, JSON lines, and what the terminal shows."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import tensorboardX
from tqdm import tqdm

from qflax.errors import UserError
from qflax.files import naming, write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Logs:
    """Writes numbers to `metrics.jsonl` and `tensorboard/` in the workdir.

    A resumed run continues them: lines and events after the last step that it need not log again are
    dropped, so that nothing is there twice.

    Attributes:
      seconds: spent in training steps so far, over all starts of the run; compilation included.
      last_train: the last training metrics before this start, or an empty dict.
    """

    def __init__(self, workdir: pathlib.Path, logged_step: int):
        """Opens the logs of a run that starts or continues; up to `logged_step` all is logged.

        Raises:
          UserError: `metrics.jsonl` is damaged.
        """
        self._path = path = workdir / METRICS_FILE
        parsed = _parsed(path)
        # The final evaluation of a run that ended within it comes again.
        parsed = [
            (line, row) for line, row in parsed if row["step"] <= logged_step and row["group"] != "test"
        ]
        train = [row for _, row in parsed if row["group"] == "train"]
        self.last_train = train[-1] if train else {}
        self.seconds = self.last_train.get("seconds", 0.0)
        write_atomically(path, "".join(line for line, _ in parsed))
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / TENSORBOARD_FOLDER), purge_step=logged_step + 1, flush_secs=30
        )

    def write(self, step: int, scalars: Mapping[str, float], group: str) -> None:
        """Writes scalars at a step: `group/name` in TensorBoard, one line in `metrics.jsonl`.

        Args:
          step: number of updates made.
          scalars: name -> value.
          group: such as `train` or `validation`.
        """
        self.seconds = max(self.seconds, scalars.get("seconds", 0.0))
        for name, value in scalars.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        with naming(self._path):
            self._file.write(json.dumps({"step": step, "group": group, **scalars}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
        self._board.close()


class Progress:
    """A progress bar with the time left on a terminal, plain lines elsewhere (both on stderr)."""

    def __init__(self, total: int, start: int, steps_per_epoch: float):
        """Starts at step `start` of `total`."""
        self._total, self._step, self._start = total, start, start
        self._steps_per_epoch = steps_per_epoch
        self._began = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        """Moves to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def show(self, scalars: Mapping[str, float]) -> None:
        """Shows the latest numbers."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        elapsed = time.monotonic() - self._began
        left = elapsed / max(self._step - self._start, 1) * (self._total - self._step)
        epoch = self._step / self._steps_per_epoch
        left_text = f"{int(left) // 60}m{int(left) % 60:02}s" if left < 3600 else f"{left / 3600:.1f}h"
        self.say(f"step {self._step}/{self._total}  epoch {epoch:.2f}  {text}  left {left_text}")

    @staticmethod
    def say(text: str) -> None:
        """Prints a line without disturbing the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`, each with its `step` and `group`; none before the first.

    Raises:
      UserError: it is damaged.
    """
    return [row for _, row in _parsed(workdir / METRICS_FILE)]


def _parsed(path: pathlib.Path) -> list[tuple[str, dict]]:
    return [(line, _row(path, number, line)) for number, line in enumerate(_lines(path), 1)]


def _lines(path: pathlib.Path) -> list[str]:
    """The complete lines of a file, or none where there is no file."""
    if not path.exists():
        return []
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise _damaged(path, 1) from None
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _row(path: pathlib.Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "group" not in row:
        raise _damaged(path, number)
    return row


def _damaged(path: pathlib.Path, number: int) -> UserError:
    return UserError(f"{path}: line {number} is damaged; take it out, or put the file back from a copy")
