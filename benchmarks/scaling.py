"""Seconds per image and memory of training as devices, batches and networks grow.

python -m benchmarks.scaling --models resnet20 resnet18 --batches 32 128 512 --devices 1 2 --output=FILE

Every case runs in a process of its own, one after another; the time is the median of `--rounds` steps, and
memory the process's peak, the 50 batches of noise that it trains on included. The file is written after each.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np

from benchmarks.peers.problem import MODELS
from benchmarks.step_time import Contender
from qflax import cpu
from qflax.training.provenance import git_commit


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--contender", default="qflax int4 lsq")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=cpu.available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    print(f"{options.contender}, {options.dtype}, {git_commit()}")
    print(f"{'':12}{'devices':>10}{'batch':>10}{'ms per image':>15}{'peak MiB':>12}{'first step s':>15}")
    for model, devices, batch_size in itertools.product(options.models, options.devices, options.batches):
        case = argparse.Namespace(**vars(options), model=model, num_devices=devices, batch_size=batch_size)
        contender = Contender(options.contender, case)
        row = {"model": model, "devices": devices, "batch_size": batch_size}
        if contender.problem:
            row["problem"] = contender.problem
            print(f"{model:12}{devices:10}{batch_size:10}  {contender.problem}")
        else:
            for _ in range(options.rounds):
                contender.step(1)
            seconds = float(np.median(contender.seconds))
            row |= {"seconds_per_image": seconds / batch_size, "peak_mib": contender.peak_memory()}
            row |= contender.ready
            contender.close()
            print(
                f"{model:12}{devices:10}{batch_size:10}{1e3 * seconds / batch_size:15.2f}"
                f"{row['peak_mib']:12.0f}{row['seconds_to_first_step']:15.1f}",
                flush=True,
            )
        rows.append(row)
        if options.output:
            about = {"contender": options.contender, "dtype": options.dtype, "commit": git_commit()}
            options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
