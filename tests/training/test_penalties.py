"""Penalties on sizes, their ramp, and when widths freeze."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training import build

SIZES = {"weight_kib": 100.0, "activation_kib_sum": 50.0, "activation_kib_max": 9.0}


@pytest.fixture
def config(tiny_config):
    tiny_config.size_targets = dict(weight_kib=70.0, activation_kib_sum=0.0, activation_kib_max=8.0)
    tiny_config.size_strengths = dict(weight_kib=0.1, activation_kib_sum=5.0, activation_kib_max=0.2)
    return tiny_config


def test_the_penalty_is_the_squared_excess(config):
    penalties = build.penalties(config, 100)
    np.testing.assert_allclose(penalties.of_sizes(SIZES, 0), 0.1 * 30**2 + 0.2 * 1**2, rtol=1e-6)
    gradient = jax.grad(penalties.of_sizes)(SIZES, 0)
    np.testing.assert_allclose(gradient["weight_kib"], 0.1 * 2 * 30, rtol=1e-6)
    assert gradient["activation_kib_sum"] == 0  # No target.
    below = {**SIZES, "weight_kib": 69.0, "activation_kib_max": 8.0}
    assert penalties.of_sizes(below, 0) == 0 and not any(jax.grad(penalties.of_sizes)(below, 0).values())


def test_strengths_grow_over_the_ramp(config):
    config.size_ramp = (0.2, 0.7)
    penalties = build.penalties(config, 100)
    values = [float(penalties.of_sizes(SIZES, step)) for step in (0, 19, 20, 44, 69, 99)]
    np.testing.assert_allclose(values, np.array([0, 0, 1 / 50, 0.5, 1, 1]) * 90.2, rtol=1e-6)


def test_widths_freeze_once_targets_hold_but_not_early_and_at_the_end_anyhow(config):
    config.freeze_widths_after = 0.5
    penalties = build.penalties(config, 100)
    held = {**SIZES, "weight_kib": 70.0, "activation_kib_max": 8.0}
    assert [bool(penalties.freeze(held, step)) for step in (0, 48, 49, 99)] == [False, False, True, True]
    assert [bool(penalties.freeze(SIZES, step)) for step in (49, 98, 99)] == [False, False, True]


def test_other_targets_compile_nothing(config):
    traces = []

    @jax.jit
    def of(penalties, sizes):
        traces.append(1)
        return penalties.of_sizes(sizes, jnp.int32(3))

    for target in (70.0, 60.0, 0.0):
        config.size_targets.weight_kib = target
        of(build.penalties(config, 100), SIZES)
    assert len(traces) == 1


def test_damping_grows_by_a_cosine(config):
    config.oscillation_damping = 0.5
    penalties = build.penalties(config, 100)
    values = [float(penalties.of_deviations(2.0, step)) for step in (-1, 24, 49, 99)]
    np.testing.assert_allclose(values, [0, (1 - 2**-0.5) / 2, 0.5, 1], atol=1e-6)


def test_the_threshold_of_freezing_falls_by_a_cosine(config):
    config.oscillation_freezing = (0.1, 0.02)
    penalties = build.penalties(config, 100)
    values = [float(penalties.oscillation_threshold(step)) for step in (-1, 49, 99)]
    np.testing.assert_allclose(values, [0.1, 0.06, 0.02], rtol=1e-6)


@pytest.mark.parametrize("weights", [None, dict(kind="accumulator_aware", bits=4, accumulator_bits=16)])
def test_freezing_without_rounded_weights_is_an_error(tiny_config, weights):
    tiny_config.oscillation_freezing = (0.1, 0.01)
    tiny_config.rules = (dict(layers="input", activations={"bits": 8, "signed": True}),)
    build.check_quantization(tiny_config)
    tiny_config.weights = weights
    with pytest.raises(UserError, match=r"oscillation_freezing=\(0.1, 0.01\): no weights are rounded to a"):
        build.check_quantization(tiny_config)


def test_damping_without_rounded_weights_is_an_error(tiny_config):
    tiny_config.oscillation_damping = 1e-3
    build.check_quantization(tiny_config)
    tiny_config.weights = None
    with pytest.raises(UserError, match=r"oscillation_damping=0.001: no weights are rounded to a grid"):
        build.check_quantization(tiny_config)


def test_targets_without_learned_widths_are_an_error(config):
    with pytest.raises(
        UserError, match=r"size_targets.activation_kib_max=8.0: no width of activations is learned"
    ):
        build.check_quantization(config)


def test_a_target_needs_learned_widths_of_its_own_role(config):
    config.activations = dict(kind="mixed_precision", bits=6)
    with pytest.raises(UserError, match=r"size_targets.weight_kib=70.0: no width of weights is learned"):
        build.check_quantization(config)
    config.size_targets.weight_kib = 0.0
    build.check_quantization(config)
