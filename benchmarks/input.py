"""Images per second of every data set's way to the network.

python -m benchmarks.input [--data_dir=DIR] [--batch_size=128] [--output=FILE]

A set in memory is read once, and then gathered, cropped and mirrored by the training step itself: both are
timed. ImageNet is read and decoded ahead of the steps by other processes; with `--workers=0` by the one that
trains. A set that is not there is left out and said.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import time

import jax
import numpy as np

from configs import default
from qflax import runtime
from qflax.data import Dataset, load_training
from qflax.data.augment import normalize
from qflax.errors import UserError
from qflax.training import build
from qflax.training.parallel import Devices
from qflax.training.provenance import git_commit
from qflax.training.stream import stream_of


def resident(config, dataset: Dataset, rounds: int) -> float:
    """Images per second of the part of a step that makes its inputs."""
    devices = Devices(0, config.batch_size)
    step = build.train_step(config, devices)

    def inputs(state, index, data):
        images, _, _ = step.inputs(state, index, data)
        return jax.lax.pmean(normalize(images, step.mean, step.std).sum(), "batch")

    made = devices.pmap(inputs)
    state = devices.replicate(build.state(config, {"params": {}}))
    _, data = next(stream_of(dataset, 0, config.batch_size, devices).dispatches(0, 1, 1))
    jax.block_until_ready(made(state, data))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(made(state, data))
        seconds.append(time.perf_counter() - began)
    return config.batch_size / float(np.median(seconds))


def streamed(config, dataset, workers: int, rounds: int) -> float:
    """Images per second that arrive, after the first batches."""
    batches = dataset.training_batches(
        seed=0, first_step=0, batch_size=config.batch_size, shard=(0, 1), num_workers=workers
    )
    with contextlib.closing(batches):
        for _ in itertools.islice(batches, 2 + 2 * workers):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(batches, rounds):
            pass
        return rounds * config.batch_size / (time.perf_counter() - began)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="*", default=["digits", "cifar10", "imagenet2012"])
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    runtime.configure(options.batch_size)
    rows = []

    def add(name, way, value, unit):
        rows.append({"dataset": name, "way": way, "value": value, "unit": unit})
        print(f"{name:16}{way:32}{value:12.1f} {unit}", flush=True)

    for name in options.datasets:
        config = default.get_config()
        config.dataset, config.batch_size = name, options.batch_size
        began = time.perf_counter()
        try:
            dataset, _ = load_training(name, data_dir=options.data_dir, crop=build.crop(config))
        except UserError as error:
            print(f"{name}: left out ({error})")
            continue
        add(name, "opening" if name == "imagenet2012" else "reading", time.perf_counter() - began, "s")
        if isinstance(dataset, Dataset):
            add(name, "in the step", resident(config, dataset, options.rounds), "images/s")
            continue
        for workers in options.workers:
            speed = streamed(config, dataset, workers, options.rounds)
            add(name, f"{workers} processes that decode", speed, "images/s")
    if options.output:
        options.output.write_text(json.dumps({"commit": git_commit(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
