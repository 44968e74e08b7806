"""A small configuration that trains in seconds."""

import importlib

import jax
import pytest

from qflax import config as config_lib
from qflax.training import allocation, build
from qflax.training.checkpoints import CheckpointWriter
from qflax.training.state import initial_variables


@pytest.fixture(scope="module", autouse=True)
def _few_images():
    """Sensitivities are those of a few images."""
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


@pytest.fixture(scope="session")
def random_run():
    """Function that saves a run at step 0, whose logits are not all 0, and returns its variables."""

    def save(config, workdir):
        variables = initial_variables(build.model(config), (32, 32, 3), 0)
        classifier = variables["params"]["classifier"]
        classifier["kernel"] = jax.random.normal(jax.random.key(1), classifier["kernel"].shape)
        config_lib.save(config, workdir)
        checkpoints = CheckpointWriter(workdir)
        checkpoints.save(jax.device_get(build.state(config, variables)), 0)
        checkpoints.close()
        return variables

    return save
