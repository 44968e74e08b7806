"""Training metrics and speed, read from the devices as rarely as possible."""

import time
from collections.abc import Mapping

import jax
import numpy as np


class Meter:
    """Training metrics and speed since they were last logged; the only place that waits for the devices."""

    def __init__(self, batch_size: int, seconds: float = 0.0, unlogged: Mapping | None = None):
        """Counts on from `seconds`, or from what an interrupted run's meter had in `unlogged`."""
        self._batch_size = batch_size
        record = unlogged or {"seconds": seconds, "elapsed": 0.0, "rows": {}}
        self._seconds, self._elapsed = record["seconds"], record["elapsed"]
        rows = {name: np.float32(values) for name, values in record["rows"].items()}
        self._pending = [rows] if rows else []
        self._earlier = len(rows["bad_steps"]) if rows else 0  # Steps before this start, which made them.
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last reading."""
        self._began = time.monotonic()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics [steps] of a dispatch, without waiting for them."""
        self._pending.append(metrics)

    def rows(self) -> dict[str, np.ndarray]:
        """Metrics [steps] of all steps that are not logged yet; empty where there are none."""
        rows = jax.device_get(self._pending)
        self._elapsed += time.monotonic() - self._began
        self.restart()
        columns = {name: np.concatenate([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        self._pending = [columns] if rows else []
        return columns

    def first_bad(self, most: int) -> int | None:
        """The first new step with more than `most` bad ones in a row, counted from the last (0), or None."""
        steps = self.rows().get("bad_steps", np.zeros(0))[self._earlier :]
        bad = np.flatnonzero(steps > most)
        return len(steps) - 1 - int(bad[0]) if bad.size else None

    def read(self) -> dict[str, float]:
        """Means over the steps that are not logged yet, images/s and training seconds so far.

        Steps that were skipped are counted (`skipped_steps`, where there are any), but are in no mean.
        Without any step there is nothing: only the first process has those before an interruption.
        """
        columns = dict(self.rows())
        if not columns:
            return {}
        kept = columns.pop("bad_steps") == 0
        means = {name: float(np.mean(values[kept])) for name, values in columns.items() if kept.any()}
        means["learning_rate"] = float(columns["learning_rate"][-1])
        means["images_per_second"] = len(kept) * self._batch_size / self._elapsed
        means["seconds"] = self._seconds + self._elapsed
        if not kept.all():
            means["skipped_steps"] = float(np.sum(~kept))
        return means

    def logged(self) -> None:
        """Forgets what has been read and logged."""
        self._pending, self._earlier = [], 0
        self._seconds, self._elapsed = self._seconds + self._elapsed, 0.0
        self.restart()

    def unlogged(self) -> dict:
        """What a resumed run's meter goes on from, in the types of JSON."""
        rows = {name: values.tolist() for name, values in self.rows().items()}
        return {"seconds": self._seconds, "elapsed": self._elapsed, "rows": rows}
