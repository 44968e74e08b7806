"""Checks of configurations."""

import importlib
import json
import pathlib

import ml_collections
import pytest

from qflax import config as config_lib
from qflax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))


def default():
    return importlib.import_module("configs.default").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_valid_and_comes_back_from_its_workdir(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    config_lib.validate(config)
    config_lib.save(config, tmp_path)
    loaded = config_lib.load(tmp_path)
    config_lib.validate(loaded)
    config_lib.check_unchanged(config, tmp_path)
    config_lib.check_unchanged(loaded, tmp_path)


def test_default_has_exactly_the_fields_that_are_checked():
    def names(group):
        return {k: names(v) if hasattr(v, "items") else None for k, v in group.items()}

    assert names(default()) == names(config_lib.FIELDS)


@pytest.mark.parametrize(
    "field,value,part",
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", 12.5, "whole number"),
        ("batch_size", True, "whole number"),
        ("learning_rate", -1.0, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("num_epochs", 0.0, "at least"),
        ("num_train_steps", 0, "-1 to train for num_epochs"),
        ("label_smoothing", 1.0, "from 0 to 1"),
        ("momentum", 1.5, "from 0 to 1"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("dataset", "cifar", "did you mean 'cifar10'"),
        ("dtype", "float16", "float32, bfloat16"),
        ("std", (0.1, 0.0, 0.1), "3 numbers"),
        ("mean", (0.1, 0.1), "3 numbers"),
        ("seed", -1, "from 0 to"),
        ("rules", "conv", "tuple of mappings"),
        ("nesterov", 1, "True or False"),
        ("oscillation_freezing", 0.1, "2 numbers"),
        ("oscillation_freezing", (0.1, 0.0), "two frequencies in (0, 1], or (0.0, 0.0)"),
        ("oscillation_freezing", (1.5, 0.1), "two frequencies in (0, 1]"),
        ("allocate_widths", True, "set one of config.size_targets"),
    ],
)
def test_impossible_values_name_the_field_the_value_and_the_choices(field, value, part):
    fields = {**default().to_dict(), field: value}
    with pytest.raises(UserError) as error:
        config_lib.validate(fields)
    message = str(error.value)
    assert f"config.{field}={value!r}" in message and part in message and "\n" not in message


def test_unknown_and_missing_fields_are_named():
    fields = default().to_dict()
    with pytest.raises(UserError, match=r"config.batchsize: no such field \(did you mean 'batch_size'\?\)"):
        config_lib.validate({**fields, "batchsize": 3})
    with pytest.raises(UserError, match=r"config.augmentation.flipp: .*'flip'"):
        config_lib.validate({**fields, "augmentation": {**fields["augmentation"], "flipp": True}})
    del fields["seed"]
    with pytest.raises(UserError, match=r"config.seed: missing"):
        config_lib.validate(fields)


def test_all_differing_fields_are_named(tmp_path):
    config = ml_collections.ConfigDict(default().to_dict())
    config_lib.save(config, tmp_path)
    config.seed = 3
    config.augmentation.flip = False
    with pytest.raises(UserError, match=r"augmentation.flip was True, is False; seed was 0, is 3"):
        config_lib.check_unchanged(config, tmp_path)


def test_workdirs_of_older_versions_are_read_and_resumed(tmp_path):
    fields = default().to_dict()
    del fields["allocate_widths"], fields["oscillation_freezing"]
    (tmp_path / config_lib.FILE).write_text(json.dumps(fields))
    config = default()
    config_lib.check_unchanged(config, tmp_path)
    assert config_lib.load(tmp_path).allocate_widths is False
    config.allocate_widths = True
    with pytest.raises(UserError, match=r"\(allocate_widths was False, is True\)"):
        config_lib.check_unchanged(config, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "[1]",
            json.dumps({"model": "resnet20"}),
            "",
            "null",
            "3",
            '"x"',
            "\0",
            b"\xff\xfe{",
            bytes(range(256)),
        ),
        *(
            "[" * 10**5,
            "[" * 10**5 + "]" * 10**5,
            '{"a":' * 5000 + "1" + "}" * 5000,
            '{"seed":' + "9" * 6000 + "}",
        ),
        *(json.dumps(default().to_dict() | {"learning_rate": float("inf")}), " " * (1 << 25)),
        *(
            json.dumps(default().to_dict() | change)
            for change in ({"newer": 1}, {"rules": None}, {"": 1}, {"a.b": 1})
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        config_lib.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_configuration_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match="not a workdir"):
        config_lib.load(tmp_path)


def test_the_largest_values():
    config_lib.validate({**default().to_dict(), "seed": 2**32 - 1, "num_train_steps": 2**24})
