"""The page about several runs."""

import dataclasses
import html.parser
import importlib
import json
import shutil
import sys

import matplotlib.image
import numpy as np
import pytest

from qflax import config as config_lib
from qflax.cli import main
from qflax.errors import UserError
from qflax.report import figures, predictions
from qflax.report.network import file_bytes, inspect
from qflax.report.page import write_report
from qflax.report.predictions import predict
from qflax.report.published import PUBLISHED
from qflax.report.runs import groups_of, read_runs
from qflax.training import train

RUNS = ("fp32-seed0", "mixed-seed0", "mixed-seed1", "going--on-")


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
    """A float run, learned widths that start from it, as if of two seeds, and one that has not ended."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(0, weights=None, activations=None, rules=())
    config.size_targets.weight_kib = config.size_targets.activation_kib_sum = 0.0
    train(config, folder / "fp32-seed0")
    config = tiny(0, init_from=str(folder / "fp32-seed0"))
    train(config, folder / "mixed-seed0")
    shutil.copytree(folder / "mixed-seed0", folder / "mixed-seed1")
    for name, field, change in (("config.json", "seed", 1), ("result.json", "test_accuracy", 0.05)):
        file = folder / "mixed-seed1" / name
        fields = json.loads(file.read_text())
        file.write_text(json.dumps({**fields, field: fields[field] + change}))
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
    assert page.addresses and all(address.startswith(("data:", "#run-")) for address in page.addresses)
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
    assert f"{mixed.mean() - accuracy['fp32-seed0']:+.2f} (fp32)" in page.texts
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
    run = next(run for run in read_runs(workdirs) if run.name == "mixed-seed0")
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


def made(folder, config, accuracy=None, starts=None, **result):
    """A workdir as a run leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    fields = json.dumps(config_lib.plain(config))
    (folder / "config.json").write_text(fields)
    if accuracy is not None:
        result = {"test_accuracy": accuracy, "weight_bytes": 2048.0, **result}
        (folder / "result.json").write_text(json.dumps(result))
    if starts is not None:
        (folder / "environment.json").write_text(json.dumps(starts))
    return folder


def grouped(*folders):
    """Label -> group."""
    groups = groups_of(read_runs(folders))
    assert len({group.label for group in groups}) == len(groups)
    return {group.label: group for group in groups}


def float_config(seed):
    config = tiny(seed, weights=None, activations=None, rules=())
    config.size_targets.weight_kib = config.size_targets.activation_kib_sum = 0.0
    return config


def test_only_seeds_are_put_together(workdirs, tmp_path):
    runs = [run for run in read_runs(workdirs) if run.result]
    groups = {group.label: group for group in groups_of(runs)}
    assert {name: len(group.runs) for name, group in groups.items()} == {"fp32": 1, "mixed": 2}
    assert groups["mixed"].baseline == "fp32" and groups["fp32"].baseline == ""
    other = dataclasses.replace(runs[-1], config=runs[-1].config.copy_and_resolve_references())
    other.config.learning_rate *= 2
    assert len(groups_of([*runs[:-1], other])) == 3


@pytest.mark.parametrize("present", [True, False])
def test_seeds_may_start_and_learn_from_float_runs_of_their_own(tmp_path, present):
    floats = [
        made(tmp_path / f"float-seed{seed}", float_config(seed), 0.9 + 0.02 * seed) for seed in range(3)
    ]
    ours = []
    for seed, accuracy in enumerate((0.89, 0.9)):
        config = tiny(seed, init_from=str(floats[seed] if present else f"/gone/float-seed{seed}"))
        config.distillation.teacher = config.init_from
        ours.append(made(tmp_path / f"int-seed{seed}", config, accuracy))
    groups = grouped(*ours, *floats)
    assert [run.name for run in groups["int"].runs] == ["int-seed0", "int-seed1"]
    # Each to its own float run, not to the mean over three of them.
    assert groups["int"].baseline == "float"
    assert groups["int"].difference == pytest.approx((-0.01 - 0.02) / 2)
    config = tiny(1, init_from=str(floats[1]))
    config.distillation.teacher = str(tmp_path / "wide-seed1")
    other = made(tmp_path / "wide-int-seed1", config, 0.91)
    assert set(grouped(*ours, other, *floats)) == {"int", "wide-int", "float"}


def test_a_copy_is_no_other_seed(tmp_path):
    for place in "xy":
        made(tmp_path / place / "a", float_config(0), 0.9)
    groups = grouped(tmp_path / "x/a", tmp_path / "y/a")
    assert {name: len(group.runs) for name, group in groups.items()} == {"x/a": 1, "y/a": 1}


def test_the_float_network_is_the_one_that_a_run_descends_from(tmp_path):
    short, long = float_config(0), float_config(0)
    long.num_epochs *= 2
    made(tmp_path / "fp32_long/seed0", long, 0.95)
    made(tmp_path / "fp32_short/seed0", short, 0.92)
    made(tmp_path / "int8/seed0", tiny(0, init_from="moved/fp32_short/seed0"), 0.915)
    made(tmp_path / "int4/seed0", tiny(0, init_from=str(tmp_path / "int8/seed0"), momentum=0.8), 0.91)
    groups = grouped(*tmp_path.glob("*/*"))
    for name, difference in (("int8", -0.005), ("int4", -0.01)):
        assert groups[f"{name}/seed0"].baseline == "fp32_short/seed0"
        assert groups[f"{name}/seed0"].difference == pytest.approx(difference)
    # Nobody knows what another started from: the best.
    made(tmp_path / "int2/seed0", tiny(0, init_from="gone", momentum=0.7), 0.9)
    group = grouped(*tmp_path.glob("*/*"))["int2/seed0"]
    assert (group.baseline, group.difference) == ("fp32_long/seed0", pytest.approx(-0.05))


def test_one_name_for_two_recipes_is_not_shortened(tmp_path):
    made(tmp_path / "a-seed0", float_config(0), 0.9)
    config = float_config(1)
    config.learning_rate *= 2
    made(tmp_path / "a-seed1", config, 0.9)
    assert set(grouped(*tmp_path.iterdir())) == {"a-seed0", "a-seed1"}


def test_accumulator_widths_are_found_wherever_they_are_set(tmp_path):
    bounded = {"kind": "accumulator_aware", "bits": 4, "accumulator_bits": 14}
    of_rule = tiny(0, rules=({"layers": "stage*", "weights": bounded},))
    two = tiny(0, weights=bounded, rules=({"layers": "a", "weights": {**bounded, "accumulator_bits": 12}},))
    cases = {
        "all": (tiny(0, weights=bounded), ("a2q+", 14)),
        "rule": (of_rule, ("a2q+", 14)),
        "a2q": (tiny(0, weights={**bounded, "variant": "a2q"}), ("a2q", 14)),
        "two": (two, None),
        "none": (tiny(0, weights={"bits": 4}), None),
    }
    for name, (config, _) in cases.items():
        made(tmp_path / name, config, 0.9)
    groups = grouped(*tmp_path.iterdir())
    assert {name: group.first.accumulator for name, group in groups.items()} == {
        name: expected for name, (_, expected) in cases.items()
    }
    figure = figures.accuracy_against_accumulator([groups[name] for name in ("all", "rule", "a2q")], [])
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles == {"a2q": "-", "a2q+": "None"}  # Two points at 14 bits are of two recipes.


def test_runs_of_one_name_in_two_folders_are_told_apart(workdirs, tmp_path):
    copy = tmp_path / "mixed-seed0"
    copy.mkdir()
    (copy / "config.json").write_bytes((workdirs[-1] / "config.json").read_bytes())
    names = [run.name for run in read_runs([*workdirs, copy, copy])]
    assert len(set(names)) == len(names) == 5 and all(name.count("/") == 1 for name in names)


def test_names_of_all_kinds_and_starts_of_all_kinds(tmp_path):
    places = ("a b", "a-b", "A-b", "lr$1^2^3$", "_old", "x" * 240)
    starts = [
        {"from_step": 0, "device": "1 x H100 (gpu)", "commit": "a" * 40, "command": "first"},
        {"from_step": 9000, "device": "1 x H100 (gpu)", "commit": "b" * 40 + "+changes", "versions": None},
    ]
    for i, name in enumerate(places):
        config = float_config(0)
        config.learning_rate += i
        config.shortcut = "AB"[i % 2]
        made(tmp_path / "runs" / name, config, 0.9, starts, steps=9, test_loss=1.0)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            '{"step": 1, "group": "train", "loss": NaN}\n'
        )
    (tmp_path / "runs/beginning").mkdir()
    said, output = [], tmp_path / "report"
    folders = sorted((tmp_path / "runs").iterdir())
    page = Page(write_report(folders, output, test_images=False, say=said.append).read_text())
    assert any("beginning: left out" in text for text in said)
    assert {"resnet8 on digits, A", "resnet8 on digits, B"} <= set(page.texts)
    assert {*places} <= set(page.texts) and page.texts.count("aaaaaaa, bbbbbbb, changed files") == len(places)
    assert f"{'a' * 40} from step 0; {'b' * 40}+changes from step 9,000" in page.texts
    pictures = {path.name.lower() for path in output.glob("*.png")}
    assert len(pictures) == page.tags.count("img") == len(places) + 2

    # Anew: what the page names goes, what it does not name stays.
    (output / "mine.png").write_text("1")
    write_report([tmp_path / "runs/a-b"], output, test_images=False)
    assert {path.name for path in output.iterdir()} == {
        *("index.html", "mine.png", "a-b-curves.png", "resnet8-on-digits-size.png")
    }
    with pytest.raises(UserError, match="beginning"):
        write_report([tmp_path / "runs/beginning"], output)


@pytest.mark.parametrize(
    ("name", "text"),
    [("environment.json", "[1]"), ("metrics.jsonl", '{"step": 1, "group": "train", "loss": "x"}\n')],
)
def test_damaged_files_are_named(tmp_path, name, text):
    made(tmp_path / "run", float_config(0), 0.9)
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        read_runs([tmp_path / "run"])


class Ours:
    """Stands in for a group."""

    def __init__(self, label="ours", accuracy=0.93, size=131072.0):
        self.label, self._values = label, {"test_accuracy": accuracy, "weight_bytes": size}

    def values(self, name):
        return np.array([self._values[name]])


def test_what_is_far_below_does_not_hide_differences():
    rows = [p for p in PUBLISHED if p.model == "resnet20"]
    assert {p.label for p in rows} == {
        "FP32",
        *(f"{n} {h}" for n in ("INT8", "INT4") for h in ("PTQ", "QAT")),
    } | {"MIXED QAT"}
    figure = figures.accuracy_against_size([Ours(), Ours(accuracy=0.25)], rows)
    bottom, top = figure.axes[0].get_ylim()
    assert 75 < bottom < 93 and 95.19 < top < 100
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"INT8 PTQ 14.62 %", "FP32", "25.0 %"} <= set(texts)


def test_many_runs_are_told_apart():
    many = [Ours(f"run {i}", 0.9 + i / 1000, 1e5 * (1 + i)) for i in range(49)]
    figure = figures.accuracy_against_size(many, [])
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None)]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(many)
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().height > 0.4
    near = figures.accuracy_against_size([Ours(size=1e5), Ours(size=1.02e5)], []).axes[0]
    low, high = near.get_xlim()
    assert sum(low <= tick <= high for tick in near.get_xticks()) >= 3


def test_histograms_of_any_grid():
    normal = np.random.default_rng(0).normal(size=10_000)
    grids = {
        "integers": np.clip(np.round(3 * normal), -8, 7),
        "one off the grid": np.append(np.round(normal), 6.03),
        "minifloat": np.round(normal * 2.0 ** np.random.default_rng(1).integers(-8, 8, 10_000), 2),
        "16 bits": np.round(normal * 5000),
        "zeros": np.zeros(9),
    }
    for name, codes in grids.items():
        edges, share = figures._code_histogram(codes)
        assert np.all(np.diff(edges) > 0) and len(edges) == len(share) + 1, name
        assert share.sum() == pytest.approx(100) and len(share) <= 512, name
        assert edges[0] < codes.min() and codes.max() < edges[-1] or len(share) == 512, name
    edges, share = figures._code_histogram(grids["integers"])
    np.testing.assert_allclose(edges[:2], [-8.5, -7.5])
    assert share[8] == pytest.approx(100 * np.mean(grids["integers"] == 0))


def test_streamed_test_images_are_told_as_resident_ones(workdirs, monkeypatch):
    run = next(run for run in read_runs(workdirs) if run.name == "fp32-seed0")
    resident = predict(run, most_mistakes=5)
    test = predictions.load("digits", "test")

    class Streamed:
        """As data sets that are not held in memory."""

        num_examples, num_classes = test.num_examples, test.num_classes

        def evaluation_batches(self, *, batch_size):
            return predictions._batches(test, batch_size)

    monkeypatch.setattr(predictions, "load", lambda *_, **__: Streamed())
    streamed = predict(run, most_mistakes=5)
    for field in dataclasses.fields(streamed):
        np.testing.assert_array_equal(getattr(streamed, field.name), getattr(resident, field.name))
    assert len(resident.images) == 5


def test_a_folder_that_is_no_report_stays(workdirs, tmp_path):
    (tmp_path / "mine").write_text("1")
    with pytest.raises(UserError, match="holds something that is no report; choose another --output"):
        write_report(workdirs[:1], tmp_path)
    with pytest.raises(UserError, match="not a workdir"):
        write_report([tmp_path], tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    page = tmp_path / "index.html"
    page.write_text("<title>Mine</title> Also in mine.png.")
    with pytest.raises(UserError, match="holds something that is no report"):
        write_report(workdirs[:1], tmp_path)
    assert "Mine" in page.read_text() and (tmp_path / "mine").read_text() == "1"


def test_command_names_the_extra(workdirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(workdirs[0]), f"--output={tmp_path / 'report'}"]) == 2
    assert "a report needs matplotlib; install it with pip install 'qflax[report]'" in capsys.readouterr().err


def test_command(workdirs, tmp_path, capsys):
    output = tmp_path / "report"
    assert main(["report", str(workdirs[1]), f"--output={output}", "--no_test_images"]) == 0
    assert f"{output}/index.html: " in capsys.readouterr().out
    assert not list(output.glob("*confusion*")) and list(output.glob("*curves.png"))
