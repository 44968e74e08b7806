"""The variables of step 0."""

import importlib

import jax
import numpy as np
import pytest

from qflax import config as config_lib
from qflax.data import load
from qflax.errors import UserError
from qflax.layers import sizes
from qflax.training import allocation, build
from qflax.training.calibration import CalibrationBatches
from qflax.training.start import start_from, starting_variables
from qflax.training.workdir import trained_on_held_out


@pytest.mark.thorough
def test_accumulator_aware_weights_start_from_projected_ones(tiny_config, tmp_path, random_run):
    """In the layout of the accumulator-aware configurations, from a float run."""
    layout = importlib.import_module("configs.resnet18_w4a4_a2q_plus_12b_cifar10").get_config()
    digits = load("digits", "train")
    tiny_config.shortcut, tiny_config.residual = "B", "unsigned"
    tiny_config.weights = tiny_config.activations = None
    variables = random_run(tiny_config, tmp_path)

    for name in ("weights", "activations", "rules"):
        tiny_config[name] = layout[name]
    tiny_config.init_from = str(tmp_path)
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


@pytest.mark.thorough
def test_learned_widths_start_where_the_size_targets_hold(tiny_config, tmp_path, monkeypatch, random_run):
    """Those of layers whose width is not learned stay as they are."""
    monkeypatch.setattr(allocation, "_WIDTHS", (4, 2))
    tiny_config.weights = tiny_config.activations = None
    random_run(tiny_config, tmp_path)
    default = importlib.import_module("configs.default")
    tiny_config.weights = default.mixed_precision(bits=4)
    tiny_config.activations = default.mixed_precision(bits=6)
    tiny_config.rules = (default.integer_input(),)
    tiny_config.size_targets.weight_kib, tiny_config.size_targets.activation_kib_sum = 24.0, 26.0
    tiny_config.init_from, tiny_config.allocate_widths = str(tmp_path), True
    start = starting_variables(tiny_config, CalibrationBatches(tiny_config, load("digits", "train")))

    costs = build.measure_costs(tiny_config, start)
    reached = sizes(costs)
    assert reached["weight_kib"] <= 24.0 and reached["activation_kib_sum"] <= 26.0
    weights = [float(cost.weight_bits) for cost in costs if cost.macs]
    assert {*weights} == {2, 4}
    activations = {cost.path: float(cost.activation_bits) for cost in costs if cost.activations}
    assert activations.pop("input") == 8 and {*activations.values()} == {2, 4}
    # It is the state of a run that starts from its specs' bits, but for numbers.
    shapes = jax.tree.map(np.shape, build.abstract_state(tiny_config).variables)
    assert jax.tree.map(np.shape, build.state(tiny_config, start).variables) == shapes


def test_the_quantizers_of_the_same_kind_of_run_are_kept(tiny_config, tmp_path, random_run):
    """Not where only one of the two has records of weights that oscillate."""
    for i, (its, own, kept) in enumerate(
        (((0.0, 0.0), (0.0, 0.0), True), ((0.0, 0.0), (0.1, 0.01), False), ((0.2, 0.1), (0.1, 0.01), True))
    ):
        tiny_config.init_from, tiny_config.oscillation_freezing = "", its
        random_run(tiny_config, tmp_path / str(i))
        tiny_config.init_from, tiny_config.oscillation_freezing = str(tmp_path / str(i)), own
        abstract = build.abstract_state(tiny_config).variables
        variables, same = start_from(tiny_config, abstract)
        assert same is kept
        assert jax.tree.structure(variables) == jax.tree.structure(abstract)


def test_another_normalisation_or_network_is_no_start(tiny_config, tmp_path, random_run):
    random_run(tiny_config, tmp_path)
    tiny_config.init_from = str(tmp_path)
    tiny_config.mean, tiny_config.residual = (0.5, 0.5, 0.5), "unsigned"
    with pytest.raises(UserError, match=r"mean is .* there, .*; residual is 'signed' there") as error:
        starting_variables(tiny_config, [])
    assert "\n" not in str(error.value)


def test_another_epsilon_is_no_start_where_norms_use_it(tiny_config, tmp_path, random_run):
    random_run(tiny_config, tmp_path)
    tiny_config.init_from, tiny_config.batch_norm_epsilon = str(tmp_path), 1e-3
    with pytest.raises(UserError, match="batch_norm_epsilon is 1e-05 there, 0.001 here"):
        starting_variables(tiny_config, [])
    tiny_config.norm = "folded"  # With the other run's.
    start_from(tiny_config, build.abstract_state(tiny_config).variables)


def test_networks_that_have_seen_held_out_images_are_named(make_tiny_config, tmp_path):
    """Also behind the one that a run starts from; files of weights and runs on other images are none."""
    paths = {name: str(tmp_path / name) for name in ("seen", "between", "other", "run")}

    def made(name, **fields):
        config = make_tiny_config()
        config.update_from_flattened_dict(fields)
        config_lib.save(config, tmp_path / name)
        return config

    for name in paths:
        (tmp_path / name).mkdir()
    made("seen", validation_examples=99)
    made("other", validation_examples=0, dataset="cifar10")
    made("between", init_from=paths["seen"])
    run = {"init_from": paths["between"], "distillation.teacher": paths["other"]}
    assert trained_on_held_out(made("run", **run)) == [paths["seen"]]
    assert trained_on_held_out(made("run", **run, validation_examples=99)) == []
    assert trained_on_held_out(made("run", init_from="weights.pth")) == []
