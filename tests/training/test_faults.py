"""Runs that are killed at any moment end as if they had not been."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qflax.cli import INTERRUPTED
from qflax.config import load
from qflax.training import build
from qflax.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
# Averaged weights, stochastic rounding; something is due at almost every step, and not at the same ones.
CONFIG = f"""
from configs import default, quickstart


def get_config():
    config = quickstart.get_config()
    config.weights = default.uniform(bits=4, scale="lsq", statistic="mse", rounding="stochastic")
    config.activations = default.uniform(bits=4, scale="lsq", statistic="mse")
    for name in ("size_targets", "size_ramp", "freeze_widths_after", "rules"):
        config[name] = default.get_config()[name]
    config.num_train_steps = {STEPS}
    config.batch_size = 32
    config.warmup_epochs = 0.1
    config.ema_decay = 0.9
    config.calibration_examples = 64
    config.validation_examples = 100
    config.eval_every_epochs = 0.2
    config.checkpoint_every_steps = 5
    config.log_every_steps = 4
    return config
"""
TIMES = ("seconds", "images_per_second")


def start(workdir):
    """A process that trains, with a group of its own, and its messages in a file."""
    config = workdir.parent / "config.py"
    config.write_text(CONFIG)
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def messages(workdir):
    return (workdir.parent / f"{workdir.name}.log").read_text()


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def final_state(workdir):
    checkpoints = Checkpoints(workdir)
    assert checkpoints.steps[-1] == STEPS
    return checkpoints.restore(build.abstract_state(load(workdir)), STEPS).state


def reached(workdir, step):
    """Whether something was logged at the step or after it."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))


def wait_until(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def inode(workdir):
    """Of the metrics, which every start replaces once it has cleaned up what the one before left."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def kill(workdir, number, moment):
    """Trains until a moment, a function that waits for it, and sends a signal; exit code."""
    before = inode(workdir)
    process = start(workdir)
    try:
        moment(process, lambda: inode(workdir) not in (None, before))
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()
        process.wait()


def assert_same_end(workdir, whole):
    for x, y in zip(*(jax.tree.leaves(final_state(w)) for w in (workdir, whole)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert rows(workdir) == rows(whole)
    results = [json.loads((w / "result.json").read_text()) for w in (workdir, whole)]
    for name in ("test_accuracy", "test_loss", "validation_accuracy", "train_loss", "weight_bytes"):
        assert results[0][name] == results[1][name]
    assert Checkpoints(workdir).best_step() == Checkpoints(whole).best_step()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    assert start(workdir).wait(timeout=600) == 0, messages(workdir)
    return workdir


def after(workdir, step, seconds=0.0):
    """The moment some time after a step was logged."""

    def moment(process, begun):
        wait_until(lambda: begun() and reached(workdir, step), process)
        time.sleep(seconds)

    return moment


def saving(workdir, step):
    """The moment at which a checkpoint is half written, the first one at the step or after it."""

    def moment(process, begun):
        def unfinished():
            names = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
            return any(int(name.partition(".")[0]) >= step for name in names)

        wait_until(lambda: begun() and unfinished(), process)

    return moment


@pytest.mark.thorough
def test_three_kills_leave_no_trace(whole, tmp_path):
    workdir = tmp_path / "run"
    assert kill(workdir, signal.SIGTERM, after(workdir, 4)) == INTERRUPTED, messages(workdir)
    first = Checkpoints(workdir).steps[-1]
    assert f"SIGTERM, after step {first} of {STEPS}; the same command goes on" in messages(workdir)
    assert kill(workdir, signal.SIGKILL, saving(workdir, first + 4)) == -signal.SIGKILL
    assert kill(workdir, signal.SIGKILL, after(workdir, first + 8)) == -signal.SIGKILL
    assert start(workdir).wait(timeout=600) == 0, messages(workdir)
    assert "Traceback" not in messages(workdir)
    assert_same_end(workdir, whole)


@pytest.mark.faults
def test_twenty_kills_at_random_moments_leave_no_trace(whole, tmp_path):
    draw, kills, runs = random.Random(0), [], 0
    while len(kills) < 20:
        workdir = tmp_path / f"run{runs}"
        while len(kills) < 20 and not (workdir / "result.json").exists():
            steps = Checkpoints(workdir).steps
            at = steps[-1] if steps else 0
            number, kind = (
                draw.choice((signal.SIGTERM, signal.SIGKILL)),
                draw.choice(("start", "step", "save")),
            )
            moment = {
                "start": lambda *_: time.sleep(draw.uniform(0, 10)),
                "step": after(workdir, at + 1, draw.uniform(0, 0.3)),
                "save": saving(workdir, at + 1),
            }[kind]
            kills.append((kind, number.name, at, kill(workdir, number, moment)))
            print(runs, *kills[-1])
        assert start(workdir).wait(timeout=600) == 0, messages(workdir)
        assert "Traceback" not in messages(workdir)
        assert_same_end(workdir, whole)
        runs += 1
