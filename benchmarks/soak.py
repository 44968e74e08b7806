"""Whether memory and file handles grow with the steps of a run that evaluates and saves often.

python -m benchmarks.soak [--steps=2000] [--output=FILE]

Prints resident memory, what of it the heap has handed out, file handles and threads over the steps of a run
of the quickstart, and what they grew by between the end of its first quarter and the end.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import pathlib
import tempfile
import threading

from qflax import runtime
from qflax.training import logs, train
from qflax.training.provenance import git_commit

_SAMPLES = 40


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")
        + ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def usage() -> dict[str, float]:
    """What this process uses."""
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Heap
    heap = libc.mallinfo2()
    return {
        "resident_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "heap_mib": round((heap.uordblks + heap.hblkhd) / 2**20, 1),
        "file_handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


class SampledProgress(logs.Progress):
    """Progress that measures on its way."""

    rows, every = [], 1

    def advance(self, step: int) -> None:
        """See `Progress`."""
        super().advance(step)
        if step % self.every == 0:
            gc.collect()
            self.rows.append({"step": step, **usage()})
            print(self.rows[-1], flush=True)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    config = importlib.import_module("configs.quickstart").get_config()
    config.batch_size, config.num_train_steps = 32, options.steps
    config.validation_examples, config.eval_every_epochs = 100, 1.0
    config.checkpoint_every_steps, config.log_every_steps = 20, 10
    runtime.configure(config.batch_size)
    SampledProgress.every = max(options.steps // _SAMPLES, 1)
    importlib.import_module("qflax.training.recorder").Progress = SampledProgress
    with tempfile.TemporaryDirectory() as folder:
        train(config, pathlib.Path(folder) / "run")
    rows = SampledProgress.rows
    first = next(row for row in rows if row["step"] >= options.steps // 4)
    grown = {name: round(rows[-1][name] - first[name], 2) for name in rows[-1] if name != "step"}
    result = {"from_step": first["step"], "to_step": rows[-1]["step"], "grown": grown, "commit": git_commit()}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
