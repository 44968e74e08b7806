"""Logs."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from qflax.errors import UserError
from qflax.layers import LayerCost
from qflax.training.kernels import LayerKernel
from qflax.training.logs import Logs, Progress


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def values(workdir):
    """(step, value) of everything in the TensorBoard files."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            at += 12 + length + 4
    return found


def events(workdir):
    """(step, tag) of everything in the TensorBoard files."""
    return [(step, value.tag) for step, value in values(workdir)]


def by_tag(workdir):
    return {value.tag: value for _, value in values(workdir)}


def test_scalars_go_to_both_logs(tmp_path):
    logs = Logs(tmp_path, 0)
    logs.write(3, {"loss": 1.5}, "train")
    logs.close()
    assert lines(tmp_path) == [{"step": 3, "group": "train", "loss": 1.5}]
    assert (3, "1_learning/loss_train") in events(tmp_path)


def test_what_is_flushed_is_in_both_logs(tmp_path):
    logs = Logs(tmp_path, 0)
    for step in range(40):
        logs.write(step, {"loss": 1.5}, "train")
    logs.flush()
    assert len(lines(tmp_path)) == 40 and len(events(tmp_path)) >= 40 - 12  # Of a queue of ten.
    logs.close()
    assert len(events(tmp_path)) == 40


def test_a_resumed_log_drops_what_comes_again_and_half_lines(tmp_path):
    logs = Logs(tmp_path, 0)
    for step in (2, 4, 6):
        logs.write(step, {"loss": 1.0, "seconds": step / 2}, "train")
    logs.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "gro')
    logs = Logs(tmp_path, 4)
    assert logs.seconds == 2.0
    logs.write(6, {"loss": 0.5}, "train")
    logs.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.0), (4, 1.0), (6, 0.5)]


def test_progress_without_a_terminal_prints_plain_lines(capsys):
    progress = Progress(100, 10, 50.0)
    progress.advance(30)
    progress.show({"loss": 0.25})
    progress.close()
    text = capsys.readouterr().err
    assert (
        "left 0m0" in text
        and "step 30/100" in text
        and "epoch 0.60" in text
        and "loss 0.25" in text
        and "\r" not in text
    )


@pytest.mark.parametrize("line", ["{", "[]", '{"group": "train"}', '{"step": "1", "group": ""}', "[" * 10**5])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    text = '{"step": 1, "group": "train"}\n' + line + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="metrics.jsonl: line 2 is damaged"):
        Logs(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_groups_come_in_the_order_of_the_questions(tmp_path):
    logs = Logs(tmp_path, 0)
    logs.write(1, {"loss": 1.0, "gradient_norm": 2.0, "images_per_second": 3.0}, "train")
    logs.write(1, {"accuracy": 0.5, "top5_accuracy": 0.75}, "validation")
    logs.write(1, {"weight_kib": 7.0}, "size")
    logs.write(1, {"block/conv/weight_bits": 4.0, "block/conv/weights/scale": 0.1}, "layers")
    logs.close()
    tags = sorted(tag for _, tag in events(tmp_path))
    assert tags == [
        *("1_learning/accuracy_validation", "1_learning/loss_train", "2_speed/images_per_second"),
        *("3_size/weight_kib", "4_training/gradient_norm", "4_training/top5_accuracy_validation"),
        *("layers_scale/block/conv/weights", "layers_weight_bits/block/conv"),
    ]


def test_histograms_and_a_picture_of_the_layers(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 2, 200_000).astype(np.float32)
    kernel = LayerKernel(path="block/conv", weights=weights, codes=np.round(weights), bits=4.0)
    cost = LayerCost(path="block/conv", kind="conv", roles=("weights",), macs=9, weight_bits=4, input_bits=8)
    logs = Logs(tmp_path, 0)
    logs.draw_layers(5, [cost], [kernel])
    logs.close()
    found = by_tag(tmp_path)
    assert set(found) == {"weights/block/conv", "codes/block/conv", "bits_along_the_network"}
    histogram = found["weights/block/conv"].histo
    assert histogram.num == 1 << 16
    assert histogram.sum / histogram.num == pytest.approx(0, abs=0.05)
    image = PIL.Image.open(io.BytesIO(found["bits_along_the_network"].image.encoded_image_string))
    assert image.width > 500 and np.ptp(np.asarray(image)) > 100


def test_hyperparameters_are_beside_the_final_accuracy(tmp_path):
    logs = Logs(tmp_path, 0)
    logs.write(9, {"accuracy": 0.7, "loss": 1.0}, "train")
    logs.write(9, {"accuracy": 0.75}, "test")
    logs.conclude({"learning_rate": 0.1, "weights.kind": "uniform", "nesterov": True, "rules": (), "x": None})
    logs.close()
    found = by_tag(tmp_path)
    assert found["1_learning/accuracy_test"].simple_value == 0.75
    start = HParamsPluginData.FromString(
        found["_hparams_/session_start_info"].metadata.plugin_data.content
    ).session_start_info
    assert start.hparams["learning_rate"].number_value == 0.1
    assert start.hparams["weights.kind"].string_value == "uniform"
    assert set(start.hparams) == {"learning_rate", "weights.kind", "nesterov"}
    assert "_hparams_/session_end_info" in found and "_hparams_/experiment" not in found
    assert min(tag for tag in found if "/" in tag and tag[0] != "_") == "1_learning/accuracy_test"
