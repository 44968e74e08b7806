"""Whole runs: results, logs, resuming, divergence."""

import json

import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training import evaluate_workdir, loop, train
from qflax.training.checkpoints import Checkpoints
from qflax.training.workdir import load_workdir

RESULT_KEYS = {
    "test_accuracy",
    "test_top5_accuracy",
    "validation_accuracy",
    "train_loss",
    "epochs",
    "steps",
    "train_seconds",
    "images_per_second",
    "parameters",
    "weight_bytes",
    "activation_bytes_sum",
    "activation_bytes_max",
    "bit_operations",
    "device",
    "versions",
    "commit",
    "command",
}


def log_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_state(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def whole(make_tiny_config, tmp_path_factory):
    """Workdir and result of a run from start to end without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(varied(make_tiny_config()), workdir)


@pytest.fixture
def finished(whole, tiny_config):
    """The configuration of that run, to be changed at will, its workdir and its result."""
    return varied(tiny_config), *whole


def varied(config):
    config.ema_decay = 0.9
    config.weights.rounding = "stochastic"
    # Widths that change, and freeze before the run is interrupted.
    config.activations = dict(kind="mixed_precision", bits=6)
    config.size_targets.activation_kib_sum = 48.0
    config.quantizer_learning_rate = 0.1
    return config


def test_a_run_leaves_a_complete_workdir(finished):
    config, workdir, result = finished
    assert result.keys() >= RESULT_KEYS
    assert result == json.loads((workdir / "result.json").read_text())
    assert result["steps"] == 12 and 0 <= result["test_accuracy"] <= 1
    assert result["parameters"] == 75_290 and result["weight_bytes"] == 74_800 * 4 / 8 + 10 * 4
    assert result["widths_frozen"] and not result["missed_size_targets"]
    assert result["activation_bytes_sum"] <= 48 * 1024 < 6 / 8 * result["activation_elements"]
    assert Checkpoints(workdir).best_step() >= 6  # Of those with frozen widths.
    assert list((workdir / "tensorboard").glob("events.*"))
    assert "conv_init" in (workdir / "layers.txt").read_text()
    lines = log_lines(workdir)
    assert {line["group"] for line in lines} == {"train", "validation", "size", "layers", "test"}
    steps = [line["step"] for line in lines if line["group"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    metrics, costs = evaluate_workdir(workdir)
    assert metrics["accuracy"] == result["test_accuracy"]
    assert sum(cost.weight_bytes for cost in costs) == result["weight_bytes"]


def test_an_interrupted_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    config, whole, _ = finished
    advance, part = loop.Progress.advance, tmp_path / "part"

    def interrupted(self, step):
        advance(self, step)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, part)
    monkeypatch.setattr(loop.Progress, "advance", advance)
    assert log_lines(part)[-1]["step"] < 12
    train(config, part)
    assert_same_state(load_workdir(whole)[1], load_workdir(part)[1])
    assert without_time(log_lines(part)) == without_time(log_lines(whole))


def test_a_finished_run_is_not_trained_again(finished):
    config, workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(config, workdir) == result
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert len(json.loads((workdir / "environment.json").read_text())) == 1


def test_another_configuration_is_refused_and_named(finished):
    config, workdir, _ = finished
    config.learning_rate = 0.3
    with pytest.raises(UserError, match=r"learning_rate was 0.1, is 0.3"):
        train(config, workdir)


@pytest.mark.parametrize("name", ["layers.txt", "metrics.jsonl", "result.json"])
def test_files_of_the_user_are_not_replaced(tiny_config, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"there is a {name} already; choose another --workdir"):
        train(tiny_config, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.thorough
def test_starting_from_another_run_takes_its_averaged_weights(finished, tmp_path):
    config, whole, _ = finished
    config.init_from = str(whole)
    config.num_train_steps = 1
    config.learning_rate = 0.0
    config.warmup_epochs = 0.0
    config.activations = None
    config.size_targets.activation_kib_sum = 0.0
    train(config, tmp_path / "second")
    first, second = load_workdir(whole)[1], load_workdir(tmp_path / "second")[1]
    assert_same_state(first.served["params"], second.trained["params"])
    config.model = "resnet20"
    with pytest.raises(UserError, match="model is 'resnet8' there, 'resnet20' here"):
        train(config, tmp_path / "third")
