"""What a configuration asks for together with its data set."""

import importlib

import pytest

from qflax.errors import UserError
from qflax.training import build


def config_with(**fields):
    config = importlib.import_module("configs.quickstart").get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    ("fields", "examples", "field"),
    [
        ({"num_epochs": 1e6}, 50_000, "num_epochs=1000000.0: 781,250,000 steps"),
        ({"num_train_steps": 2**24, "batch_size": 128}, 50_000, "num_train_steps=16777216"),
        ({"num_epochs": 50_000.0, "batch_size": 50_000}, 50_000, "at most 42,949 are possible"),
    ],
)
def test_runs_whose_steps_cannot_be_counted(fields, examples, field):
    with pytest.raises(UserError, match=field):
        build.num_steps(config_with(**fields), examples)


def test_the_longest_runs():
    assert build.num_steps(config_with(num_train_steps=2**24, batch_size=127), 1000) == 2**24
    assert build.num_steps(config_with(num_epochs=1e-9), 1000) == 1


@pytest.mark.parametrize("name", ["crop_padding", "cutout"])
def test_augmentation_that_leaves_nothing_of_an_image(name):
    assert getattr(build.augmentation(config_with(**{f"augmentation.{name}": 31})), name) == 31
    for value in (32, 10**9):
        with pytest.raises(UserError, match=f"{name}={value}: images are 32 x 32"):
            build.augmentation(config_with(**{f"augmentation.{name}": value}))
