"""Configurations from Python files: whatever is wrong with them is one line."""

import pathlib
import sys

import pytest

from qflax import config as config_lib
from qflax import config_file
from qflax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
START = "from configs import quickstart\ndef get_config():\n    config = quickstart.get_config()\n"


def message_of(file, *changes):
    with pytest.raises(UserError) as caught:
        config_lib.validate(config_file.read(str(file), changes))
    message = str(caught.value)
    assert len(" ".join(message.split())) < 1400
    return message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("\nraise RuntimeError('one\\ntwo')", "line 2: RuntimeError: one two"),
        ("raise SystemExit(0)", "line 1: SystemExit"),
        ("def get_config(): raise SystemExit", "SystemExit"),
        ("class Own(BaseException): pass\nraise Own('a')", "line 2: Own: a"),
        ("def get_config(): return get_config()", "RecursionError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("open('/nowhere/x')", "No such file"),
        ("", "no get_config"),
        ("get_config = 3", "not callable"),
        ("def get_config(): pass", "returns NoneType"),
        ("def get_config(): return {'batch_size': 3}", "returns dict"),
        ("def get_config(): return [1]", "returns list"),
        ("def get_config(name): pass", "missing 1 required"),
        (bytes(range(256)), "SyntaxError"),
        (b"x = '\xe9'", "utf-8"),
        (START + "    config.batch_size = 'many'\n    return config", "batch_size"),
        (
            START + "    config.seed = config.get_ref('batch_size') // 0\n    return config",
            "ZeroDivisionError",
        ),
        (START + "    del config.unlock().seed\n    return config", "config.seed: missing"),
        (
            START + "    config.rules = ({'layers': 'x'},) * 10**5\n    return config",
            "more than 10000 values",
        ),
        (
            START + "    a = []\n    a.append(a)\n    config.rules = (a,)\n    return config",
            "nested deeper than 16 levels",
        ),
    ],
)
def test_a_file_that_makes_no_configuration(content, part, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "own.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert part in message_of(file)


@pytest.mark.parametrize(
    "file", ["", ".", "/dev/zero", "nothing.py", "a\0b", "x" * 300, "x" * 5000, "\udcff"]
)
def test_what_is_no_file(file):
    assert "no such file" in message_of(file) or "name too long" in message_of(file)


@pytest.mark.parametrize(
    "changes",
    [
        "--config.batch_size=many",
        "--config.batch_size=",
        "--config.batch_size=4.0",
        "--config.batch_size=True",
        "--config.batch_size=None",
        "--config.batch_size=" + "9" * 5000,
        "--config.batch_size=" + "9" * 30,
        "--config.batch_size=64 --config.batch_size=0",
        "--config.learning_rate=1,0",
        "--config.learning_rate=1e400",
        "--config.learning_rate=nan",
        "--config.=1",
        "--config..seed=1",
        "--config.seed.=1",
        "--config.seed.x=1",
        "--config.sed=1",
        "--config.é=1",
        "--config.items=1",
        "--config.__class__=1",
        "--config['seed']=1",
        "--config.weights=None",
        "--config.weights=uniform",
        "--config.outputs.bits=4",
        "--config.rules=abc",
        "--config.rules=(1,)",
        "--config.rules[5].layers=x",
        "--config.rules[x]=1",
        "--config.mean[7]=1",
        "--config.mean=(1,2)",
        "--config.crop=3",
        "--config.augmentation.flip=maybe",
        "--config.init_from=" + "x" * 5000,
        "--config.init_from=a\0b",
        "--flagfile=/dev/zero",
        "--flagfile=nothing",
        "--undefok=x",
        "--unknown=1",
        "-x",
        "junk",
        "é",
        "\udcff",
        "--config.batch_size",
    ],
)
def test_changes_that_do_not_fit(changes, monkeypatch):
    monkeypatch.chdir(ROOT)
    from qflax.quantizers import quantization_from_config

    with pytest.raises(UserError) as caught:
        config = config_file.read("configs/quickstart.py", changes.split(" "))
        config_lib.validate(config)
        quantization_from_config(config.to_dict())
    assert len(str(caught.value)) < 1000


def test_later_changes_win_and_text_after_a_colon_is_handed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "own.py"
    file.write_text(START.replace("()", "(text)", 1) + "    config.init_from = text\n    return config\n")
    config = config_file.read(f"{file}:a:b", ["--config.seed=1", "--config.seed", "2"])
    assert (config.init_from, config.seed) == ("a:b", 2)
    assert config.is_locked


@pytest.mark.parametrize(
    ("package", "own", "current"),
    [
        ("recipes_a", "recipes_a/own.py", "."),
        ("recipes_b", "recipes_b/own.py", "elsewhere"),
        ("recipes_c", "own.py", "elsewhere"),
        ("recipes_d", "elsewhere/own.py", "."),
    ],
)
def test_a_file_builds_upon_others_though_python_does_not_look_there(
    package, own, current, tmp_path, monkeypatch
):
    """An installed program finds modules neither in the current folder nor beside the file by itself."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in (package, "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "base.py").write_text(f"{START}    return config\n")
    (tmp_path / own).write_text(f"from {package}.base import get_config\n")
    monkeypatch.chdir(tmp_path / current)
    assert config_file.read(str(tmp_path / own), ["--config.seed=5"]).seed == 5
