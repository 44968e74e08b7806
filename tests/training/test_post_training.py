"""Post-training quantization of a run, from workdir to workdir."""

import json

import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training import allocation, build, evaluate_workdir, train
from qflax.training.lock import locked
from qflax.training.post_training import measure_sensitivities, quantize
from qflax.training.workdir import load_workdir


@pytest.fixture(scope="module")
def float_run(make_tiny_config, tmp_path_factory):
    """A float ResNet-8 that knows some digits."""
    config = make_tiny_config()
    config.weights = config.activations = None
    config.num_train_steps, config.eval_every_epochs, config.checkpoint_every_steps = 60, 10.0, 60
    workdir = tmp_path_factory.mktemp("float")
    train(config, workdir)
    return workdir


def quantizing(make_tiny_config, float_run, **ptq):
    config = make_tiny_config()
    config.init_from = str(float_run)
    config.ptq.update(iterations=20, report_examples=128, **ptq)
    return config


@pytest.fixture(scope="module")
def quantized(make_tiny_config, float_run, tmp_path_factory):
    config, workdir = quantizing(make_tiny_config, float_run), tmp_path_factory.mktemp("quantized") / "run"
    return config, workdir, quantize(config, workdir)


def test_the_result_is_an_ordinary_workdir(quantized, float_run):
    config, workdir, result = quantized
    accuracy = json.loads((float_run / "result.json").read_text())["test_accuracy"]
    assert result["test_accuracy"] > accuracy - 0.05 > 0.3
    metrics, costs = evaluate_workdir(workdir)
    assert metrics["accuracy"] == result["test_accuracy"]
    assert [cost.weight_bits for cost in costs if cost.macs] == [4] * 8
    methods = [row["method"] for row in result["recipe"]]
    assert methods == ["float", *config.ptq.recipe] and result["recipe"][0]["agreement"] == 1
    assert result["recipe"][-1]["divergence"] < result["recipe"][1]["divergence"]
    assert "brecq" in (workdir / "recipe.txt").read_text()
    assert (workdir / "layers.txt").exists() and list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "result.json").read_text())["test_accuracy"] == result["test_accuracy"]


def test_nothing_that_is_there_is_overwritten(quantized):
    config, workdir, _ = quantized
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(UserError, match="choose another --workdir"):
        quantize(config, workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(UserError, match=r"made without training .*; to train on from it, .*init_from="):
        train(config, workdir)


@pytest.mark.parametrize("workdir", ["README.md/x", "taken"])
def test_where_nothing_can_be_written_is_told_first(make_tiny_config, tmp_path, monkeypatch, workdir):
    monkeypatch.setattr("qflax.training.post_training.Run", lambda config: pytest.fail("it has begun"))
    (tmp_path / "README.md").write_text("mine")
    message = "is no folder" if workdir != "taken" else "another run is writing here"
    with locked(tmp_path / "taken"), pytest.raises(UserError, match=message):
        quantize(make_tiny_config(), tmp_path / workdir)


@pytest.mark.parametrize("name", ["recipe.txt", "sensitivity.txt", "layers.txt", "metrics.jsonl"])
def test_files_of_the_user_are_not_replaced(make_tiny_config, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"there is a {name} already; choose another --workdir"):
        quantize(make_tiny_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_fine_tuning_goes_on_from_the_learned_rounding_and_ranges(quantized, tmp_path):
    config, workdir, result = quantized
    tuning = config.copy_and_resolve_references()
    tuning.init_from, tuning.num_train_steps, tuning.warmup_epochs = str(workdir), 1, 0.0
    tuning.learning_rate = tuning.quantizer_learning_rate = 0.0
    tuning.weight_decay = 0.0
    tuned = train(tuning, tmp_path)
    _, before = load_workdir(workdir)
    _, after = load_workdir(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before.trained, after.trained)
    assert abs(tuned["test_accuracy"] - result["test_accuracy"]) < 0.05  # Norms have moved a little.


@pytest.mark.thorough
def test_size_targets_give_every_layer_a_width_of_its_own(make_tiny_config, float_run, tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "_WIDTHS", (8, 4, 2))
    config = quantizing(make_tiny_config, float_run, recipe=("ranges",))
    config.size_targets.weight_kib, config.size_targets.activation_kib_max = 30.0, 8.0
    result = quantize(config, tmp_path)
    assert result["weight_bytes"] <= 30 * 1024 and result["activation_bytes_max"] <= 8 * 1024
    stored, state = load_workdir(tmp_path)
    costs = build.measure_costs(stored, state.served)
    bits = {cost.path: cost.weight_bits for cost in costs if cost.macs}
    assert len(set(bits.values())) > 1 and set(bits.values()) <= {2, 4, 8}
    assert "divergence" in (tmp_path / "sensitivity.txt").read_text()
    monkeypatch.setattr(allocation, "_WIDTHS", (2,))
    config.size_targets.weight_kib = 1.0
    with pytest.raises(UserError, match="config.size_targets.weight_kib: .*narrowest measured widths"):
        quantize(config, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.thorough
def test_norms_are_folded_on_the_way_in(make_tiny_config, float_run, tmp_path):
    config = quantizing(make_tiny_config, float_run, recipe=("equalization", "ranges", "bias_correction"))
    config.norm, config.weights.bits, config.activations.bits = "folded", 8, 8
    result = quantize(config, tmp_path)
    _, state = load_workdir(tmp_path)
    assert not state.observed["batch_stats"] and "bias" in state.trained["params"]["conv_init"]
    accuracy = json.loads((float_run / "result.json").read_text())["test_accuracy"]
    assert abs(result["test_accuracy"] - accuracy) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "weights", None) or setattr(c, "activations", None), "quantizes nothing"),
        (lambda c: c.ptq.update(recipe=("ranges", "magic")), "config.ptq.recipe: no method 'magic'"),
        (lambda c: c.update(init_from=""), "config.init_from: missing"),
        (lambda c: c.update(calibration_examples=5000), "leaves none of the 1337 training images"),
        (lambda c: c.update(mean=(0.5, 0.5, 0.5)), "mean is"),
    ],
)
def test_bad_input_is_told_in_a_line_and_nothing_is_made(
    make_tiny_config, float_run, tmp_path, change, message
):
    config = quantizing(make_tiny_config, float_run)
    change(config)
    with pytest.raises(UserError, match=message) as error:
        quantize(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_quantized_run_is_not_quantized_again(quantized, tmp_path):
    config, workdir, _ = quantized
    again = config.copy_and_resolve_references()
    again.init_from = str(workdir)
    with pytest.raises(UserError, match="is quantized like this already; name the float run"):
        quantize(again, tmp_path / "run")


@pytest.mark.thorough
def test_sensitivities_of_a_run(make_tiny_config, float_run):
    config = quantizing(make_tiny_config, float_run)
    rows = measure_sensitivities(config, bits=(8, 2))
    assert {(row.role, row.bits) for row in rows} == {
        (role, bits) for role in ("weights", "activations") for bits in (8, 2)
    }
    total = {bits: sum(row.divergence for row in rows if row.bits == bits) for bits in (8, 2)}
    assert total[8] < 0.1 * total[2]
