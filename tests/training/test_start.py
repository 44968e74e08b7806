"""The variables of step 0."""

import importlib

import jax
import numpy as np
import pytest

from qflax import config as config_lib
from qflax.data import load
from qflax.errors import UserError
from qflax.training import build
from qflax.training.checkpoints import CheckpointWriter
from qflax.training.start import starting_variables
from qflax.training.state import initial_variables


def test_accumulator_aware_weights_start_from_projected_ones(tiny_config, tmp_path):
    """In the layout of the accumulator-aware configurations, from a float run."""
    layout = importlib.import_module("configs.resnet18_w4a4_a2q_plus_12b_cifar10").get_config()
    digits = load("digits", "train")
    tiny_config.shortcut, tiny_config.residual = "B", "unsigned"
    tiny_config.weights = tiny_config.activations = None
    variables = initial_variables(build.model(tiny_config), (32, 32, 3), 0)
    workdir = tmp_path / "float"
    config_lib.save(tiny_config, workdir)
    checkpoints = CheckpointWriter(workdir)
    checkpoints.save(jax.device_get(build.state(tiny_config, variables)), 0)
    checkpoints.close()

    for name in ("weights", "activations", "rules"):
        tiny_config[name] = layout[name]
    tiny_config.init_from = str(workdir)
    images = [digits.images[i : i + 32].astype(np.float32) / 255 for i in (0, 32)]
    start = starting_variables(tiny_config, images)

    kernels = [tree["params"]["stage1_block1"]["conv1"]["kernel"] for tree in (variables, start)]
    norms = [np.abs(kernel).sum((0, 1, 2)) for kernel in kernels]
    assert np.all(norms[1] <= norms[0] * (1 + 1e-6)) and np.any(norms[1] < 0.9 * norms[0])
    np.testing.assert_array_equal(
        variables["params"]["conv_init"]["kernel"], start["params"]["conv_init"]["kernel"]
    )
    statistics = start["batch_stats"]["stage1_block1"]["norm1"]
    assert np.all(statistics["mean"] != 0) and np.all(statistics["var"] != 1)
    ranges = jax.tree_util.tree_leaves_with_path(start["quantizer_params"])
    x_max = [leaf for path, leaf in ranges if path[-1].key == "x_max"]
    # Stem, two a block, and the projected shortcuts.
    assert len(x_max) == 1 + 2 * 3 + 2 and all(0 < x != 1 for x in x_max)
    costs = build.measure_costs(tiny_config, start)
    blocks = [cost for cost in costs if cost.path.startswith("stage") and cost.macs]
    assert len(blocks) == 8 and all(cost.accumulation.exact_bits <= 12 for cost in blocks)
    pool = next(cost for cost in costs if cost.path == "pool/output")
    assert pool.activation_bits == 8


def test_another_normalisation_or_network_is_no_start(tiny_config, tmp_path):
    variables = initial_variables(build.model(tiny_config), (32, 32, 3), 0)
    config_lib.save(tiny_config, tmp_path)
    checkpoints = CheckpointWriter(tmp_path)
    checkpoints.save(jax.device_get(build.state(tiny_config, variables)), 0)
    checkpoints.close()
    tiny_config.init_from = str(tmp_path)
    tiny_config.mean, tiny_config.residual = (0.5, 0.5, 0.5), "unsigned"
    with pytest.raises(UserError, match=r"mean is .* there, .*; residual is 'signed' there") as error:
        starting_variables(tiny_config, [])
    assert "\n" not in str(error.value)
