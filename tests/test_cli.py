"""The programs as a user calls them: one clear line and exit code 2 for bad input, results otherwise."""

import contextlib
import errno
import io
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from qflax.cli import main, report_errors, train_main
from qflax.errors import Interrupted

pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # Of ml_collections.
ROOT = pathlib.Path(__file__).parent.parent
QUICK = [
    "--config=configs/quickstart.py",
    "--config.num_train_steps=2",
    "--config.warmup_epochs=0.0",
    "--config.calibration_examples=32",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """The folder that has `configs`."""
    monkeypatch.chdir(ROOT)


def call(program, *arguments):
    """A program within this process, as it would end on its own."""
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = program(arguments)
        except SystemExit as exit:
            code = exit.code
    out, err = (stream.getvalue() for stream in streams)
    return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)


def call_alone(*command, **environment):
    """A program in a process of its own."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_training_and_evaluation_agree_and_take_changes_on_the_command_line(tmp_path):
    workdir = tmp_path / "run"
    trained = call_alone(
        "train.py",
        *QUICK,
        f"--workdir={workdir}",
        "--config.weights.bits=3",
        "--config.weights.min_bits=3",
        "--config.weights.max_bits=3",
        "--config.activations.percentile=99.9",
    )
    assert trained.returncode == 0, trained.stderr
    assert "stage1_block1/conv1" in trained.stdout and "test accuracy" in trained.stdout
    evaluated = call(main, "evaluate", str(workdir))
    assert evaluated.returncode == 0, evaluated.stderr
    accuracy = trained.stdout.split("test accuracy ")[1].split(" ")[0]
    assert f"test accuracy {accuracy} " in evaluated.stdout
    table = [line.split() for line in evaluated.stdout.splitlines()]
    assert next(row for row in table if row[:1] == ["conv_init"])[:3] == ["conv_init", "432", "3"]
    file = tmp_path / "packed"
    exported = call(main, "export", str(workdir), f"--output={file}")
    assert exported.returncode == 0, exported.stderr
    assert "logits equal to the trained network's" in exported.stdout
    verified = call_alone("-m", "qflax", "verify", str(file), "--data=digits")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert accuracy in verified.stdout
    again = call(main, "export", str(workdir), f"--output={file}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "is there already" in again.stderr
    file.write_bytes(file.read_bytes()[:-100])
    assert call(main, "verify", str(file)).returncode == 2


@pytest.mark.parametrize(
    "arguments,parts",
    [
        ([], ["--config: missing"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py"]),
        (["--config=configs/quickstart.py", "--confg.seed=1"], ["confg"]),
        (["--config=configs/quickstart.py", "--config.batchsize=1"], ["batchsize"]),
        (["--config=configs/quickstart.py", "--config.batch_size=many"], ["batch_size", "many"]),
        (["--config=configs/quickstart.py", "--config.weights.bits=0"], ["weights.bits=0", "max_bits=8"]),
        (
            ["--config=configs/quickstart.py", "--config.model=resnet21"],
            ["resnet21", "choices: resnet8, resnet20"],
        ),
        (["--config=configs/quickstart.py", "--config.num_devices=99"], ["num_devices=99"]),
        (["--config=configs/quickstart.py", "--config.batch_size=5000"], ["batch_size=5000"]),
        (
            ["--config=configs/quickstart.py", "--config.init_from=/nowhere"],
            ["config.init_from='/nowhere': not a workdir"],
        ),
        (
            ["--config=configs/resnet20_fp32_cifar10.py", "--config.weights.bits=3"],
            ["config.weights is None in configs/resnet20_fp32_cifar10.py"],
        ),
        (["--config=configs/quickstart.py", "--config.weights.roundng=floor"], ["roundng", "quantizers"]),
        (["extra", "--config=configs/quickstart.py"], ["'extra'"]),
        (
            ["--config=configs/resnet20_fp32_cifar10.py", "--config.data_dir=/nowhere"],
            ["cifar10", "/nowhere"],
        ),
    ],
)
def test_bad_input_ends_in_one_line(arguments, parts, tmp_path):
    result = call(train_main, f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1], lines[-1]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nope",
        "evaluate",
        "evaluate a b",
        "evaluate /nowhere",
        "evaluate README.md",
        "evaluate configs",
        "evaluate configs --split=x",
        "evaluate configs --sppeed=3",
        "export configs",
        "export configs --output=",
        "export configs --output=x --checkpoint=3",
        "sensitivity configs --config=configs/quickstart.py --bits",
        "sensitivity configs --config=configs/quickstart.py --bits 1e9",
        "sensitivity configs --config=configs/quickstart.py",
        "calibrate configs",
        "calibrate configs --workdir=x --config=configs/quickstart.py",
        "import x.pth",
        "import README.md --workdir=x --config=configs/resnet18_fp32.py",
        "import /nowhere.pth --workdir=x --config=configs/resnet18_fp32.py",
        "verify",
        "verify README.md",
        "verify /nowhere",
        "verify configs",
        "verify README.md --data=x",
        "verify README.md --accumulator_bits=many",
    ],
)
def test_bad_input_of_every_command_is_one_line(arguments):
    result = call(main, *arguments.split())
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("workdir", ["", " ", "a\0b", "README.md", "README.md/x", "x" * 300, "x" * 5000])
def test_what_can_be_no_workdir_is_told_at_once(workdir):
    result = call(train_main, "--config=configs/quickstart.py", f"--workdir={workdir}")
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1500


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            2,
            "error: runs/a: No space left on device; free",
        ),
        (OSError(errno.EACCES, "Permission denied", "runs/a"), 2, "error: runs/a: Permission denied; check"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), 2, "error: runs: Is a directory"),
        (MemoryError(), 2, "error: out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), 2, "error: out of memory (RESOURCE"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_lacks_is_one_line(raised, code, line, monkeypatch):
    def fail(*_):
        raise raised

    monkeypatch.setattr("qflax.config.validate", fail)
    result = call(train_main, "--config=configs/quickstart.py")
    assert result.returncode == code
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def test_who_reads_the_messages_may_leave(monkeypatch):
    """As `tee` does, which Ctrl-C ends as well."""
    reading, writing = os.pipe()
    os.close(reading)

    def run():
        for _ in range(3):
            print("step", file=sys.stderr)
        sys.stderr.flush()
        raise Interrupted("SIGINT")

    with open(writing, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert report_errors(run) == 75
        assert sys.stderr is nobody


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), OSError("of a library"), KeyError("x")])
def test_bugs_keep_their_traceback(raised, monkeypatch):
    def fail(*_):
        raise raised

    monkeypatch.setattr("qflax.config.validate", fail)
    with pytest.raises(type(raised)):
        call(train_main, "--config=configs/quickstart.py")


def test_a_misspelt_field_in_a_file_is_named(tmp_path):
    config = tmp_path / "config_misspelt.py"
    config.write_text(
        "from configs import quickstart\n"
        "def get_config():\n"
        "    config = quickstart.get_config()\n"
        "    config.batchsize = 3\n"
        "    return config\n"
    )
    result = call(train_main, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2 and 'mean "batch_size"' in result.stderr
    assert len(result.stderr) < 600 and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.thorough
def test_many_devices_and_large_seeds_are_fine(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    arguments = [*QUICK, "--config.seed=4294967295", f"--workdir={tmp_path / 'run'}"]
    result = call_alone("train.py", *arguments, XLA_FLAGS=flags)
    assert result.returncode == 0, result.stderr


def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
    config = tmp_path / "config_with_rule.py"
    config.write_text(
        "from configs import quickstart\n"
        "def get_config():\n"
        "    config = quickstart.get_config()\n"
        "    config.rules = (dict(layers='conv_int', weights=dict(bits=8)),)\n"
        "    return config\n"
    )
    result = call(train_main, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert "'conv_int'" in result.stderr and "did you mean 'conv_init'" in result.stderr


@pytest.mark.thorough
def test_imported_weights_are_a_workdir_that_can_be_quantized(tmp_path):
    """The network of `resnet8`, under the names that torchvision would give it."""
    sizes = {"conv1": (16, 3, 3, 3), "fc": (10, 64), "layer2.0.downsample.0": (32, 16, 1, 1)}
    sizes["layer3.0.downsample.0"] = (64, 32, 1, 1)
    for i, features in enumerate((16, 32, 64), start=1):
        sizes[f"layer{i}.0.conv1"] = (features, max(features // 2, 16), 3, 3)
        sizes[f"layer{i}.0.conv2"] = (features, features, 3, 3)
    state = {f"{name}.weight": np.full(size, 0.1, np.float32) for name, size in sizes.items()}
    norms = {name.replace("conv", "bn").replace("sample.0", "sample.1"): s[0] for name, s in sizes.items()}
    del norms["fc"]
    for name, features in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = np.ones(features, np.float32)
    state["fc.bias"] = np.zeros(10, np.float32)
    save_file(state, tmp_path / "weights.safetensors")
    command = ("import", str(tmp_path / "weights.safetensors"), f"--workdir={tmp_path / 'run'}")
    bad = call(main, *command)
    assert bad.returncode == 2 and "--config: missing; for instance" in bad.stderr
    fields = ("--config.model=resnet8", "--config.dataset=digits", "--config.shortcut=B")
    imported = call(main, *command, "--config=configs/resnet20_fp32_cifar10.py", *fields)
    assert imported.returncode == 0, imported.stderr
    assert "78,042 parameters" in imported.stdout
    evaluated = call(main, "evaluate", str(tmp_path / "run"))
    assert evaluated.returncode == 0 and "test accuracy 10" in evaluated.stdout, evaluated.stderr
    unknown = call(main, "evaluate", str(tmp_path / "run"), "--sppeed=3")
    assert unknown.returncode == 2 and "--sppeed=3" in unknown.stderr
    given = ["--config=configs/resnet20_int8_cifar10.py", "--config.calibration_examples=32"]
    recipe = "--config.ptq.recipe=('ranges',)"
    command = ("calibrate", str(tmp_path / "run"), f"--workdir={tmp_path / 'int8'}", *given)
    bad = call(main, *command)
    assert bad.returncode == 2 and "another network or other inputs (dataset is 'digits' there" in bad.stderr
    assert not (tmp_path / "int8").exists()
    quantized = call(main, *command, *fields, recipe, "--config.ptq.report_examples=64")
    assert quantized.returncode == 0, quantized.stderr
    assert "ranges" in quantized.stdout and "weights 75.59 KiB" in quantized.stdout
    assert (tmp_path / "int8" / "recipe.txt").exists()
