"""Logs of a run: TensorBoard, JSON lines, and what the terminal shows."""

import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import tensorboardX
from tensorboardX.summary import hparams
from tqdm import tqdm

from qflax.errors import UserError
from qflax.files import naming, write_atomically
from qflax.layers import LayerCost
from qflax.training.kernels import LayerKernel

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# TensorBoard shows groups in the order of their names: whether it learns, how fast, how big, then the rest.
_LEARNING, _SPEED, _SIZE, _TRAINING = "1_learning", "2_speed", "3_size", "4_training"
_OUTCOMES = ("loss", "accuracy")
_SPEEDS = ("images_per_second", "seconds")
_MOST_IN_HISTOGRAM = 1 << 16


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
        self._drawn = (), None  # Widths, and their picture.

    def write(self, step: int, scalars: Mapping[str, float], group: str) -> None:
        """Writes scalars at a step: one line in `metrics.jsonl`, and in TensorBoard by what they are about.

        Args:
          step: number of updates made.
          scalars: name -> value.
          group: such as `train` or `validation`.
        """
        self.seconds = max(self.seconds, scalars.get("seconds", 0.0))
        for name, value in scalars.items():
            self._board.add_scalar(_tag(group, name), value, step)
        with naming(self._path):
            self._file.write(json.dumps({"step": step, "group": group, **scalars}) + "\n")
            self._file.flush()

    def draw_layers(self, step: int, costs: Sequence[LayerCost], kernels: Sequence[LayerKernel]) -> None:
        """Writes histograms of each layer's weights and codes, and a picture of the widths, for TensorBoard.

        Of a large kernel 65,536 weights count, the same ones each time. The picture needs matplotlib (extra
        `report`).
        """
        for kernel in kernels:
            size = kernel.codes.size
            chosen = slice(None)  # Every n-th would be of some channels only.
            if size > _MOST_IN_HISTOGRAM:
                chosen = np.random.default_rng(0).integers(0, size, _MOST_IN_HISTOGRAM)
            for name, values in (("weights", kernel.weights), ("codes", kernel.codes)):
                if values is not None:
                    self._board.add_histogram(f"{name}/{kernel.path}", values[chosen], step)
        widths = tuple((float(cost.weight_bits), float(cost.input_bits)) for cost in costs)
        if all(bits == 32 for pair in widths for bits in pair) or not importlib.util.find_spec("matplotlib"):
            return
        if widths != self._drawn[0]:  # To draw is the slowest of all that is logged.
            from qflax.training.plots import layer_widths, pixels

            figure = layer_widths(costs)
            self._drawn = widths, None if figure is None else pixels(figure)
        if self._drawn[1] is not None:
            self._board.add_image("bits_along_the_network", self._drawn[1], step, dataformats="HWC")

    def conclude(self, fields: Mapping[str, object]) -> None:
        """Writes the configuration's numbers and names for the tab HParams.

        Left out is the summary of the experiment, of which TensorBoard takes any run's for all: without it,
        it shows what differs between the runs first, and the final accuracy as the first of the outcomes.
        """
        plain = {name: value for name, value in fields.items() if isinstance(value, bool | int | float | str)}
        _, start, end = hparams(plain, {})
        for summary in (start, end):
            self._board.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Writes what is left, but for up to a dozen events in the queue of TensorBoard's writer."""
        with naming(self._path):
            self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Writes what is left, and ends."""
        self._file.close()
        self._board.close()


def _tag(group: str, name: str) -> str:
    """Where TensorBoard shows a number."""
    if group == "layers":
        path, _, what = name.rpartition("/")
        return f"layers_{what}/{path}"
    if group in ("train", "validation", "test"):
        if name in _OUTCOMES:
            return f"{_LEARNING}/{name}_{group}"
        if group != "train":
            return f"{_TRAINING}/{name}_{group}"
        return f"{_SPEED if name in _SPEEDS else _TRAINING}/{name}"
    return f"{_SIZE if group == 'size' else group}/{name}"


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
    sound = isinstance(row, dict) and isinstance(row.get("step"), int) and "group" in row
    if not sound or not all(isinstance(row[name], int | float) for name in row if name != "group"):
        raise _damaged(path, number)
    return row


def _damaged(path: pathlib.Path, number: int) -> UserError:
    return UserError(f"{path}: line {number} is damaged; take it out, or put the file back from a copy")
