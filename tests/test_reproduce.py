"""The tables of results: their making, and that those of the documents are what was measured."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from benchmarks import reproduce, results, tune
from benchmarks.tables import CONFIGS, TABLES
from qflax import config as config_lib
from qflax.errors import Interrupted, UserError
from qflax.training.interruption import Interruption

ROOT = pathlib.Path(__file__).parent.parent
SMALL = (
    "--config.model=resnet8",
    "--config.dataset=digits",
    "--config.batch_size=32",
    "--config.num_train_steps=6",
    "--config.warmup_epochs=0",
    "--config.calibration_examples=64",
    "--config.calibration_batch_size=64",
    "--config.eval_batch_size=180",
    "--config.ptq.report_examples=64",
)


@pytest.fixture(autouse=True)
def _started(monkeypatch):
    """Nothing of this process's JAX, which has started, is set."""
    monkeypatch.setattr("qflax.runtime.configure", lambda *_: None)


def options(*arguments):
    """Options of `reproduce`."""
    return reproduce.parse(["--table=resnet20", *arguments])


@pytest.mark.thorough
def test_rows_are_made_and_proven_once(tmp_path, capsys, monkeypatch):
    folders = (f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}")
    command = ("--rows", "fp32", "int8_ptq", *folders, *SMALL)
    reproduce.reproduce(options(*command))
    made = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    assert set(made) == {"resnet20-fp32-seed0", "resnet20-int8_ptq-seed0"}
    for result in made.values():
        proof = result["verification"]
        assert proof["ok"] and proof["same_class"] == proof["images"] == 360
        integers = 8 if result["row"] == "int8_ptq" else 0
        assert proof["accumulators_held"] == proof["integer_layers"] == integers
        assert proof["accuracy"] == pytest.approx(result["top1"])
        workdir = tmp_path / "runs/resnet20-1" / f"{result['row']}-seed0"
        assert (workdir / "network.packed").stat().st_size == result["file_bytes"]
        teacher = json.loads((tmp_path / "runs/resnet20-1/fp32-seed0/result.json").read_text())
        assert result["float_top1"] == teacher["test_accuracy"]

    # The same again makes nothing, also where the workdirs are gone.
    monkeypatch.setattr("qflax.training.train", lambda *_: pytest.fail("trained again"))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    reproduce.reproduce(options(*command))
    (tmp_path / "elsewhere").rename(tmp_path / "runs")

    # What was not proven, since it was stopped, is proven from its workdir.
    monkeypatch.undo()
    file = tmp_path / "results/resnet20-int8_ptq-seed0.json"
    file.write_text(json.dumps({**made[file.stem], "verification": None}))
    monkeypatch.setattr("qflax.training.post_training.quantize", lambda *_: pytest.fail("made again"))
    reproduce.reproduce(options(*command))
    assert json.loads(file.read_text())["verification"] == made[file.stem]["verification"]

    # A changed recipe makes another row; a shorter schedule's does not replace it.
    capsys.readouterr()
    assert not reproduce._Result(options(*command, "--config.ptq.strength=0.5"), *row("int8_ptq")).is_there()
    assert "ptq.strength was 0.01, is 0.5" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"int8_ptq-seed0: holds a run of another configuration"):
        reproduce.reproduce(options("--rows", "int8_ptq", *folders, *SMALL, "--config.ptq.strength=0.5"))
    with pytest.raises(UserError, match=r"longer than --scale=0\.5; choose another --results"):
        reproduce.reproduce(options(*command, "--scale=0.5"))


def row(name):
    """Row and seed."""
    return next(row for row in TABLES["resnet20"].rows if row.name == name), 0


def test_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "LEFT", 61)
    folders = (f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}")
    with pytest.raises(Interrupted):
        reproduce.reproduce(options("--rows", "fp32", "--minutes=1", *folders, *SMALL))
    assert not (tmp_path / "runs").exists()


def test_deadline_asks_to_stop():
    with Interruption() as interruption, reproduce.deadline(time.monotonic() + 0.1):
        for _ in range(100):
            time.sleep(0.05)
            if interruption.requested:
                break
    assert interruption.requested == "SIGTERM"


@pytest.mark.thorough
def test_changes_are_compared_on_held_out_images(tmp_path, monkeypatch):
    folders = (f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}")
    common = (*folders, *SMALL, "--config.validation_examples=200")
    change = "--try=learning_rate=0.5 weights.bits=8"
    chosen = tune.parse(["--table=resnet20", "--row=int4_qat", change, *common])
    tune.tune(chosen)
    made = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    names = ("recipe", "learning_rate=0.5-weights.bits=8")
    assert set(made) == {f"resnet20-int4_qat-{name}-seed0" for name in names}
    sizes = {trial["config"]["learning_rate"]: trial["weight_bytes"] for trial in made.values()}
    biases = 4 * 10
    assert set(sizes) == {0.01, 0.5} and sizes[0.5] - biases == 2 * (sizes[0.01] - biases)
    for trial in made.values():
        assert round(trial["validation_top1"] * 200, 3) in range(201)
        assert trial["config"]["validation_examples"] == 200 and not [key for key in trial if "test" in key]
    floats = json.loads((tmp_path / "runs/resnet20-1/fp32-seed0/config.json").read_text())
    assert (floats["validation_examples"], floats["learning_rate"]) == (200, 0.1)

    # The same again trains nothing, and nothing is taken for another recipe's.
    monkeypatch.setattr("qflax.training.train", lambda *_: pytest.fail("trained again"))
    tune.tune(chosen)
    chosen.changes.append("--config.momentum=0.8")
    with pytest.raises(UserError, match=r"recipe-seed0.json: was made of another recipe \(momentum was 0.9"):
        tune.tune(chosen)


def test_table_of_changes():
    trial = dict(scale=0.1, epochs=16.0, weight_bytes=2048, device="1 x gpu", processor="x", python="3")
    trial |= dict(
        versions={"jax": "1", "flax": "2"}, command="python -m benchmarks.tune", commit="abc1234567"
    )
    recipe = [trial | dict(change="", seed=seed, validation_top1=0.90 + 0.02 * seed) for seed in (0, 1)]
    other = [trial | dict(change="a=1 b=2", seed=1, validation_top1=0.93)]
    text = results.tuning(TABLES["resnet20"], [[], [], [], [], recipe + other, []])
    assert text.splitlines()[2:] == [
        "| INT4 QAT | nothing | 91.00 % ± 1.41 (2 seeds) |  | 16 of 160, shortened | 2.0 KiB |",
        "| INT4 QAT | `a=1`, `b=2` | 93.00 % | +1.00 | 16 of 160, shortened | 2.0 KiB |",
        "",
        "INT4 QAT at abc1234: 1 x gpu of x, Python 3, jax 1, flax 2; `python -m benchmarks.tune`",
    ]
    assert results.tuning(TABLES["resnet20"], [[]] * 6) == "Nothing yet."


def test_rows_without_training_are_not_tuned(capsys):
    with pytest.raises(SystemExit):
        tune.parse(["--table=resnet20", "--row=int8_ptq"])
    assert "error: --row: no 'int8_ptq' is trained in resnet20; choices: fp32, " in capsys.readouterr().err


def test_schedules_are_shortened():
    config = reproduce.row_config(options("--scale=0.1"), *row("fp32"))
    assert (config.num_epochs, config.warmup_epochs) == (16.0, 0.5)
    assert reproduce.row_config(options("--scale=0.001"), *row("fp32")).num_epochs == 1.0
    steps = ("--scale=0.5", "--config.schedule=step", "--config.milestone_epochs=(50.0,100.0)")
    assert reproduce.row_config(options(*steps), *row("fp32")).milestone_epochs == (25.0, 50.0)


def test_rows_start_from_the_float_network_of_their_seed():
    config = reproduce.row_config(options("--workdir=x"), row("int4_qat")[0], 2)
    assert config.init_from == "x/resnet20-1/fp32-seed2" and config.seed == 2
    first, a2q = TABLES["a2q"].rows[:2]
    config = reproduce.row_config(reproduce.parse(["--table=a2q"]), a2q, 0)
    assert config.distillation.teacher == config.init_from


@pytest.mark.parametrize("arguments", [["--rows", "int5"], ["--seeds=0"], ["--scale=nan"], ["--minutes=0"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        options(*arguments)
    assert re.search(r"error: --\w+: .*(choices|must be)", capsys.readouterr().err)


def test_tables_have_configurations():
    for table in TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert all((CONFIGS / f"{row.config}.py").is_file() for row in table.rows)


def test_every_published_figure_stands_beside_a_row():
    for table in TABLES.values():
        assert set(table.published) <= {row.label for row in table.rows}
        assert table.published


def test_results_are_of_known_rows():
    for file in (ROOT / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert file.stem == f"{result['table']}-{result['row']}-seed{result['seed']}"
        assert result["row"] in [row.name for row in TABLES[result["table"]].rows]
        assert "+" not in result["commit"], "made of files that are in no commit"


@pytest.mark.parametrize("name", results.DOCUMENTS)
def test_documents_agree_with_the_results(name):
    text, found = (ROOT / name).read_text(), (ROOT / "results", ROOT / "results/tuning")
    assert results.filled(text, *map(results.load, found)) == text, "run python -m benchmarks.results"
    named = re.findall(r"<!-- \w+: (\w+) -->", text)
    assert named == (["resnet20"] if name == "docs/recipes.md" else list(TABLES))


def test_summary_over_seeds():
    proof = dict(ok=True, same_class=360, images=360, accumulators_held=8, integer_layers=8)
    found = [
        dict(top1=x, float_top1=0.9, scale=1, epochs=160.0, file_bytes=2048, verification=proof)
        | dict(missed_size_targets=[], config={"num_epochs": 160.0})
        for x in (0.88, 0.89, 0.90)
    ]
    table = TABLES["resnet20"]
    line = results.summary(table, [[], [], [], [], found, []]).splitlines()[-2]
    assert line == (
        "| [INT4 QAT](configs/resnet20_int4_cifar10.py) | 93.43 % | 89.00 % ± 1.00 (3 seeds) | -1.00 | 160 "
        "| 2.0 KiB | 1,080 of 1,080 | 24 of 24 |"
    )
    found[1]["verification"] = dict(proof, ok=False, accumulators_held=7)
    assert "23 of 24, NOT verified" in results.summary(table, [[], [], [], [], found, []])
    found[1]["verification"], found[1]["missed_size_targets"] = None, ["weight_kib 71 of 70"]
    line = results.summary(table, [[], [], [], [], found, []]).splitlines()[-2]
    assert "| 2.0 KiB, target missed | not verified yet | |" in line
    # Shorter schedules are no seeds of longer ones.
    found[1]["scale"] = 0.1
    line = results.summary(table, [[], [], [], [], found, []]).splitlines()[-2]
    assert "| 89.00 % ± 1.41 (2 seeds) | -1.00 | 160 | 2.0 KiB | 720 of 720 |" in line


def test_shortened_schedules_are_marked_however_they_were_shortened():
    found = dict(top1=0.9, float_top1=0.9, scale=1, epochs=8.0, file_bytes=None, verification=None)
    found |= dict(missed_size_targets=[], config={"num_epochs": 8.0})
    table = TABLES["resnet20"]
    line, *others = results.summary(table, [[found]] * 6).splitlines()[4:]
    assert "| 90.00 % | | 8 of 160, shortened |" in line
    assert [" 90.00 % | +0.00 | 8 of 160, shortened" in other for other in others].count(True) == 3
    assert [" 90.00 % | +0.00 | none; float shortened" in other for other in others].count(True) == 2


def test_float_networks_that_are_gone_are_rows_again(tmp_path, capsys):
    chosen = options("--seeds=2", f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path}")
    fp32, int8, int4 = (row(name)[0] for name in ("fp32", "int8_ptq", "int4_qat"))
    (tmp_path / "resnet20-fp32-seed1.json").touch()
    workdir = reproduce.row_workdir(chosen, fp32, 0)
    workdir.mkdir(parents=True)
    (workdir / "result.json").touch()
    config_lib.save(reproduce.row_config(chosen, fp32, 0), workdir)
    missing = [reproduce._Result(chosen, *which) for which in ((int8, 0), (int8, 1), (int4, 1))]
    names = [result.name for result in reproduce._with_teachers(missing)]
    assert names == [
        f"resnet20-{name}" for name in ("int8_ptq-seed0", "fp32-seed1", "int8_ptq-seed1", "int4_qat-seed1")
    ]
    assert capsys.readouterr().out.count("fp32-seed1.json: will be replaced") == 1


@pytest.mark.parametrize("change", ["init_from=x", "seed=3"])
def test_rows_have_their_own_start_and_seed(change, capsys):
    for parse in (
        lambda: options(f"--config.{change}"),
        lambda: tune.parse(["--table=resnet20", "--row=int4_qat", f"--try=momentum=0.8 {change}"]),
    ):
        with pytest.raises(SystemExit):
            parse()
        assert f"error: --config.{change}: rows start from" in capsys.readouterr().err


def test_changes_need_held_out_images(capsys):
    with pytest.raises(SystemExit):
        tune.parse(["--table=resnet20", "--row=int4_qat", "--config.validation_examples=0"])
    assert "error: validation_examples=0: there would be nothing" in capsys.readouterr().err


def test_tables_are_made_without_the_packages_of_reports():
    """Nor does JAX start in the process that a proof has to keep on the CPU."""
    code = "import sys, benchmarks.reproduce, benchmarks.tune, benchmarks.results; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not {"jax", "matplotlib", "jinja2"} & set(modules.split())
