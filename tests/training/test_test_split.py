"""The test images select nothing: they are read once, after everything that is chosen or trained."""

import json

import pytest

from qflax.data import dataset
from qflax.errors import UserError
from qflax.training import evaluate_workdir, train
from qflax.training.post_training import quantize
from qflax.training.workdir import load_workdir


@pytest.fixture
def unreadable(monkeypatch):
    """The test split cannot be read, until the function is called."""
    read = dataset._READERS["digits"]

    def refuse(split, *rest):
        if split == "test":
            raise UserError("the test images were read")
        return read(split, *rest)

    monkeypatch.setitem(dataset._READERS, "digits", refuse)
    return monkeypatch.undo


def test_training_does_without_it(tiny_config, tmp_path, unreadable):
    """Calibration, steps, validation, checkpoints: all are done when the test images are asked for."""
    tiny_config.ema_decay = 0.9
    with pytest.raises(UserError, match="the test images were read"):
        train(tiny_config, tmp_path)
    _, state = load_workdir(tmp_path)
    assert int(state.step) == tiny_config.num_train_steps
    assert load_workdir(tmp_path, "best")
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == tiny_config.num_train_steps
    unreadable()
    assert 0 <= train(tiny_config, tmp_path)["test_accuracy"] <= 1


def test_what_was_quantized_is_kept_without_it(tiny_config, tmp_path, unreadable):
    float_config = tiny_config.copy_and_resolve_references()
    float_config.weights = float_config.activations = None
    with pytest.raises(UserError, match="the test images were read"):
        train(float_config, tmp_path / "float")
    tiny_config.init_from, tiny_config.ptq.recipe = str(tmp_path / "float"), ("ranges",)
    tiny_config.ptq.report_examples = 64
    with pytest.raises(UserError, match="the test images were read"):
        quantize(tiny_config, tmp_path / "ptq")
    assert load_workdir(tmp_path / "ptq")[1].step == 0 and (tmp_path / "ptq" / "recipe.txt").exists()
    unreadable()
    assert 0 <= evaluate_workdir(tmp_path / "ptq")[0]["accuracy"] <= 1


@pytest.mark.thorough
def test_post_training_quantization_does_without_it(tiny_config, tmp_path, monkeypatch):
    float_config = tiny_config.copy_and_resolve_references()
    float_config.weights = float_config.activations = None
    train(float_config, tmp_path / "float")
    read, order = dataset._READERS["digits"], []

    def note(split, *rest):
        order.append(split)
        return read(split, *rest)

    monkeypatch.setitem(dataset._READERS, "digits", note)
    monkeypatch.setattr(
        "qflax.training.post_training._Recipe.done", lambda self, method, _: order.append(method)
    )
    tiny_config.init_from = str(tmp_path / "float")
    tiny_config.size_targets.weight_kib = 40.0
    monkeypatch.setattr("qflax.training.allocation._WIDTHS", (4, 2))
    tiny_config.ptq.recipe = ("equalization", "ranges")
    tiny_config.ptq.report_examples = 64
    quantize(tiny_config, tmp_path / "ptq")
    assert order == ["train", *tiny_config.ptq.recipe, "test"]
