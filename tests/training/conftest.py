"""A small configuration that trains in seconds."""

import importlib

import pytest

from qflax.training import allocation


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """Most programs here train for a few steps; sensitivities are those of a few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_EXAMPLES", 64)
        yield


@pytest.fixture(scope="session")
def make_tiny_config():
    """Function that makes `tiny_config`."""
    return _tiny_config


@pytest.fixture
def tiny_config():
    """Twelve steps of a quantized ResNet-8 on digits, with everything that can happen on the way."""
    return _tiny_config()


def _tiny_config():
    config = importlib.import_module("configs.quickstart").get_config()
    default = importlib.import_module("configs.default")
    config.weights = default.uniform(bits=4, scale="lsq", granularity="per_channel", statistic="mse")
    config.activations = default.uniform(bits=4, scale="lsq", statistic="mse")
    for name in ("size_targets", "size_ramp", "freeze_widths_after", "rules"):
        config[name] = default.get_config()[name]
    config.batch_size = 32
    config.num_train_steps = 12
    config.warmup_epochs = 0.05
    config.calibration_examples = 64
    config.validation_examples = 100
    config.eval_batch_size = 180
    config.eval_every_epochs = 0.1
    config.checkpoint_every_steps = 5
    config.log_every_steps = 3
    return config
