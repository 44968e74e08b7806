"""Two processes that train one network."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qflax.cli import BAD_INPUT, INTERRUPTED
from qflax.config import load
from qflax.training import build
from qflax.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
CONFIG = f"""
from configs import default, quickstart


def get_config():
    config = quickstart.get_config()
    config.weights = config.activations = None
    for name in ("size_targets", "size_ramp", "freeze_widths_after", "rules"):
        config[name] = default.get_config()[name]
    config.num_train_steps = {STEPS}
    config.batch_size = 32
    config.warmup_epochs = 0.01
    config.validation_examples = 100
    config.eval_every_epochs = 0.1
    config.checkpoint_every_steps = 2
    config.log_every_steps = 2
    return config
"""


def start(workdir, *options, devices=2):
    """A process with some devices, and its messages in a file of its own."""
    config = workdir.parent / "config.py"
    config.write_text(CONFIG)
    log = workdir.parent / f"{workdir.name}.{len(list(workdir.parent.glob('*.log')))}.log"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *options],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )
    process.messages = log.read_text
    return process


def start_two(workdir, *options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = (f"--coordinator_address={address}", "--num_processes=2")
    return [start(workdir, *several, f"--process_id={i}", *options) for i in range(2)]


def wait_for_step(workdir, step, process):
    path = workdir / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and f'"step": {step},' in path.read_text()):
        time.sleep(0.01)


def ends(processes):
    return [process.wait(timeout=300) for process in processes], [p.messages() for p in processes]


def weights(workdir):
    state = Checkpoints(workdir).restore(build.abstract_state(load(workdir)), STEPS).state
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.trained)])


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in lines if row["group"] == "train"}, len(lines)


@pytest.mark.thorough
def test_two_processes_train_what_one_does_and_neither_outlives_the_other(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(one, devices=4)
    assert alone.wait(timeout=300) == 0, alone.messages()

    processes = start_two(two)
    wait_for_step(two, 4, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (first, second), messages = ends(processes)
    assert time.monotonic() - began < 60
    assert (first, second) == (INTERRUPTED, -signal.SIGKILL), messages
    assert "process 1 of this run has died; the same command goes on" in messages[0]
    assert "Traceback" not in messages[0]
    assert not (two / "result.json").exists()

    processes = start_two(two)
    codes, messages = ends(processes)
    assert codes == [0, 0], messages
    assert "test accuracy" in messages[0] and "accuracy" not in messages[1]  # Only the first one tells.
    assert [line["from_step"] for line in json.loads((two / "environment.json").read_text())][1] >= 4

    # The processes add a batch up in another order.
    a, b = weights(one), weights(two)
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)
    (ours, count), (theirs, expected) = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and count == expected
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)

    processes = start_two(two, "--config.learning_rate=0.3")  # Only the first one reads the workdir.
    codes, messages = ends(processes)
    assert codes == [BAD_INPUT, BAD_INPUT], messages
    assert (
        "learning_rate was" in messages[0] and "process 0 of this run has ended with an error" in messages[1]
    )
