"""The page about several runs."""

import dataclasses
import html.parser
import importlib
import json
import sys

import matplotlib.image
import numpy as np
import pytest

from qflax.cli import main
from qflax.errors import UserError
from qflax.report import figures, write_report
from qflax.report.network import file_bytes, inspect
from qflax.report.predictions import predict
from qflax.report.published import PUBLISHED
from qflax.report.runs import groups_of, read_runs
from qflax.training import train

RUNS = ("fp32-seed0", "mixed-seed0", "mixed-seed1", "going--on-")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(seed, **fields):
    """A ResNet-8 that has seen a few digits."""
    config = importlib.import_module("configs.quickstart").get_config()
    for name, value in fields.items():
        config[name] = value
    config.seed, config.batch_size, config.num_train_steps = seed, 32, 6
    config.warmup_epochs, config.calibration_examples, config.validation_examples = 0.0, 32, 64
    config.log_every_steps, config.eval_every_epochs, config.checkpoint_every_steps = 2, 0.05, 6
    return config


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A float run, two seeds of learned widths that start from it, and one that has not ended."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(0, weights=None, activations=None, rules=())
    config.size_targets.weight_kib = config.size_targets.activation_kib_sum = 0.0
    train(config, folder / "fp32-seed0")
    for seed in (0, 1):
        config = tiny(seed, init_from=str(folder / "fp32-seed0"))
        train(config, folder / f"mixed-seed{seed}")
    unfinished = folder / "going <on>"
    unfinished.mkdir()
    for name in ("metrics.jsonl", "environment.json"):
        unfinished.joinpath(name).write_bytes((folder / "mixed-seed0" / name).read_bytes())
    fields = json.loads((folder / "mixed-seed0" / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps({**fields, "learning_rate": 0.5}))
    return sorted(folder.iterdir())


class Page(html.parser.HTMLParser):
    """What a page links to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.texts, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def report(workdirs, tmp_path_factory):
    said, output = [], tmp_path_factory.mktemp("report") / "new"
    file = write_report(workdirs, output, say=said.append)
    return Page(file.read_text()), output, said


def test_page_needs_no_other_file(report):
    page, output, _ = report
    assert page.addresses and all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags and "link" in page.tags
    pictures = sorted(path.name for path in output.iterdir() if path.suffix == ".png")
    assert page.tags.count("img") == len(pictures)
    plots = {name: {p.stem.removeprefix(f"{name}-") for p in output.glob(f"{name}-*.png")} for name in RUNS}
    both, mixed = {"curves", "confusion", "mistakes"}, {"sizes", "widths", "widths-over-time"}
    assert plots["fp32-seed0"] == both and plots["going--on-"] == {"curves", "sizes", "widths-over-time"}
    assert plots["mixed-seed0"] == plots["mixed-seed1"] == {*both, *mixed, "accumulators", "weights"}
    assert len(pictures) == 1 + sum(map(len, plots.values()))
    for name in pictures:
        image = matplotlib.image.imread(output / name)
        assert min(image.shape[:2]) > 150 and np.ptp(image[..., :3]) > 0.5, name


def test_table_has_means_over_seeds_and_differences_to_float(report, workdirs):
    page, _, _ = report
    results = {path.name: path / "result.json" for path in workdirs}
    accuracy = {
        name: 100 * json.loads(file.read_text())["test_accuracy"]
        for name, file in results.items()
        if file.exists()
    }
    mixed = np.array([accuracy["mixed-seed0"], accuracy["mixed-seed1"]])
    assert f"{mixed.mean():.2f} ± {mixed.std(ddof=1):.2f}" in page.texts
    assert f"{mixed.mean() - accuracy['fp32-seed0']:+.2f}" in page.texts
    assert f"{accuracy['fp32-seed0']:.2f}" in page.texts
    rows = [text for text in page.texts if text in ("fp32", "mixed", "going <on>")]
    first = "mixed" if mixed.mean() > accuracy["fp32-seed0"] else "fp32"
    assert rows[0] == first and rows[2] == "going <on>" and "at step 6" in page.texts


def test_size_of_the_file_is_that_of_the_export(report, workdirs, tmp_path):
    page, _, _ = report
    sizes = []
    for run in read_runs([path for path in workdirs if path.name.startswith("mixed")]):
        file = tmp_path / f"{run.name}.packed"
        assert main(["export", str(run.folder), "--format=packed", f"--output={file}"]) == 0
        sizes.append(file.stat().st_size / 1024)
        assert file_bytes(run) == file.stat().st_size
    assert f"{np.mean(sizes):.2f} ± {np.std(sizes, ddof=1):.2f}" in page.texts


def test_what_is_left_out_is_told(report):
    page, _, said = report
    assert any("It has not ended yet" in text for text in said) and "It has not ended yet." in page.texts
    (reason,) = [text for text in said if "Nothing of its layers" in text]
    assert "going <on>" in reason and "checkpoint" in reason


def test_weights_are_those_of_the_network(workdirs):
    run = next(run for run in read_runs(workdirs) if run.name == "mixed-seed1")
    network = inspect(run)
    costs = {cost.path: cost for cost in network.costs if cost.macs}
    assert [layer.path for layer in network.kernels] == list(costs)
    for layer in network.kernels:
        assert layer.codes.size == costs[layer.path].weights
        assert layer.bits == pytest.approx(float(costs[layer.path].weight_bits))
        np.testing.assert_array_equal(layer.codes, np.round(layer.codes))
        assert layer.weights is not None and np.median(np.abs(layer.weights - layer.codes)) < 0.5


def test_predictions_are_those_of_the_evaluation(workdirs):
    run = next(run for run in read_runs(workdirs) if run.name == "fp32-seed0")
    said = predict(run)
    assert said.accuracy == pytest.approx(run.result["test_accuracy"], abs=1e-6)
    assert np.all(said.told != said.labels) and np.all(np.diff(said.confidence) <= 0)
    assert said.confusion.sum() == 360 and len(said.images) == 18


def test_only_seeds_are_put_together(workdirs):
    runs = [run for run in read_runs(workdirs) if run.result]
    groups = {group.label: group for group in groups_of(runs)}
    assert {name: len(group.runs) for name, group in groups.items()} == {"fp32": 1, "mixed": 2}
    assert groups["mixed"].baseline.first.name == "fp32-seed0" and groups["fp32"].baseline is None
    other = dataclasses.replace(runs[-1], config=runs[-1].config.copy_and_resolve_references())
    other.config.learning_rate *= 2
    assert len(groups_of([*runs[:-1], other])) == 3


def test_runs_of_one_name_in_two_folders_are_told_apart(workdirs, tmp_path):
    copy = tmp_path / "mixed-seed0"
    copy.mkdir()
    (copy / "config.json").write_bytes((workdirs[-1] / "config.json").read_bytes())
    names = [run.name for run in read_runs([*workdirs, copy, copy])]
    assert len(set(names)) == len(names) == 5 and all(name.count("/") == 1 for name in names)


def test_published_rows_far_below_do_not_hide_differences():
    rows = [p for p in PUBLISHED if p.model == "resnet20"]
    assert {p.label for p in rows} == {
        "FP32",
        *(f"{n} {h}" for n in ("INT8", "INT4") for h in ("PTQ", "QAT")),
    } | {"MIXED QAT"}

    class Ours:
        label, runs = "ours", ()

        def values(self, name):
            return np.array([0.93 if name == "test_accuracy" else 131072.0])

    figure = figures.accuracy_against_size([Ours()], rows)
    bottom, top = figure.axes[0].get_ylim()
    assert 80 < bottom < 93 and 95.19 < top < 100
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "INT8 PTQ 14.62 %" in texts and "FP32" in texts


def test_a_folder_that_is_no_report_stays(workdirs, tmp_path):
    (tmp_path / "mine").write_text("1")
    with pytest.raises(UserError, match="holds something that is no report; choose another --output"):
        write_report(workdirs[:1], tmp_path)
    with pytest.raises(UserError, match="not a workdir"):
        write_report([tmp_path], tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_command_names_the_extra(workdirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(workdirs[0]), f"--output={tmp_path / 'report'}"]) == 2
    assert "a report needs matplotlib; install it with pip install 'qflax[report]'" in capsys.readouterr().err


def test_command(workdirs, tmp_path, capsys):
    output = tmp_path / "report"
    assert main(["report", str(workdirs[1]), f"--output={output}", "--no_test_images"]) == 0
    assert f"{output}/index.html: " in capsys.readouterr().out
    assert not list(output.glob("*confusion*")) and list(output.glob("*curves.png"))
