"""Training metrics and speed, read from the devices as rarely as possible."""

import time
from collections.abc import Callable

import jax
import numpy as np

from qflax.errors import UserError


class Meter:
    """Training metrics and speed since the last reading; the only place that waits for the devices."""

    def __init__(self, seconds: float, batch_size: int):
        """Continues to count from `seconds`."""
        self._seconds, self._batch_size = seconds, batch_size
        self._pending = []
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last reading."""
        self._began = time.monotonic()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics [steps] of a dispatch, without waiting for them."""
        self._pending.append(metrics)

    def read(self, step: int, last_good: Callable[[], str]) -> dict[str, float]:
        """Means over the steps since the last reading, images/s and training seconds so far.

        Raises:
          UserError: a loss or a gradient is not finite; names the first such step, and `last_good()`.
        """
        rows = jax.device_get(self._pending)
        self._pending = []
        columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        for name, what in (("loss", "loss"), ("gradient_norm", "gradient's norm")):
            bad = np.flatnonzero(~np.isfinite(columns[name]))
            if bad.size:
                first = step - len(columns[name]) + int(bad[0]) + 1
                raise _divergence(f"the {what} of step {first} is {columns[name][bad[0]]}", last_good)
        elapsed = time.monotonic() - self._began
        self._seconds += elapsed
        self.restart()
        means = {name: float(np.mean(values)) for name, values in columns.items()}
        means["learning_rate"] = float(columns["learning_rate"][-1])
        means["images_per_second"] = len(columns["loss"]) * self._batch_size / elapsed
        means["seconds"] = self._seconds
        return means


def require_finite(trained, step: int, last_good: Callable[[], str]) -> None:
    """Raises `UserError` if a parameter is not finite, so that no such state is ever saved.

    Args:
      trained: tree of host arrays.
      step: number of updates made.
      last_good: tells where the last good checkpoint is.
    """
    for path, value in jax.tree_util.tree_leaves_with_path(trained):
        if not np.isfinite(value).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise _divergence(f"{name} is not finite after step {step}", last_good)


def _divergence(what: str, last_good: Callable[[], str]) -> UserError:
    return UserError(
        f"{what}; {last_good()}; start again in another --workdir with a lower config.learning_rate or "
        "config.quantizer_learning_rate, or with config.gradient_clip"
    )
