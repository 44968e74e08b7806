"""Logs."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from qflax.errors import UserError
from qflax.training.logs import Logs, Progress


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag) of every scalar in the TensorBoard files."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag) for value in event.summary.value]
            at += 12 + length + 4
    return found


def test_scalars_go_to_both_logs(tmp_path):
    logs = Logs(tmp_path, 0)
    logs.write(3, {"loss": 1.5}, "train")
    logs.close()
    assert lines(tmp_path) == [{"step": 3, "group": "train", "loss": 1.5}]
    assert (3, "train/loss") in events(tmp_path)


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
