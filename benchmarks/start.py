"""Seconds from `python train.py` to the end of the first step, and where they go.

python -m benchmarks.start --config=configs/resnet20_int4_cifar10.py --rounds=3 [--output=FILE]

The first start has an empty cache of compiled programs, the others find what it left there. Each is stopped
after its first step.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

from qflax.training.provenance import git_commit

_LINE = re.compile(r"first step ([\d.]+) s after the start of the program \((.*)\)")


def start(config: str, folder: pathlib.Path, number: int) -> dict[str, float]:
    """Seconds of the phases of one start, and of all from outside."""
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={folder / str(number)}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := _LINE.match(line):
            total = time.monotonic() - began
            process.terminate()
            process.communicate()
            phases = (phase.rsplit(" ", 1) for phase in found[2].split(", "))
            return {name: float(seconds) for name, seconds in phases} | {"total": round(total, 1)}
    raise SystemExit("".join(lines[-5:]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/resnet20_int4_cifar10.py")
    parser.add_argument("--rounds", type=int, default=3, help="starts with a warm cache")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = [start(options.config, pathlib.Path(folder), i) for i in range(1 + options.rounds)]
    names = list(cold)
    print(f"{options.config}, {git_commit()}, seconds")
    print(f"{'':22}" + "".join(f"{name:>15}" for name in names))
    print(f"{'cold':22}" + "".join(f"{cold[name]:15.1f}" for name in names))
    medians = {name: float(np.median([row[name] for row in warm])) for name in names}
    print(f"{'warm, median':22}" + "".join(f"{medians[name]:15.1f}" for name in names))
    if options.output:
        about = {"config": options.config, "commit": git_commit(), "cold": cold, "warm": warm}
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
