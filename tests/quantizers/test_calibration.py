"""Calibration sets every range in one pass and changes nothing else."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, Conv
from qflax.quantizers import (
    PARAMETERS,
    STATISTICS,
    AccumulatorAware,
    Quantization,
    Rule,
    Uniform,
    calibrate,
    quantizer_of,
    value_of,
)

RNG = np.random.default_rng(0)
BATCHES = [
    (factor * RNG.normal(size=(4, 6)) + shift).astype(np.float32)
    for factor, shift in [(1, 0), (3, 1), (2, -1)]
]


def quantizer(**fields):
    return quantizer_of(Uniform(**{"bits": 8, **fields}), weights=False)


def ranges(model, batches=BATCHES):
    variables = calibrate(model, model.init(jax.random.key(0), batches[0]), batches)
    assert variables[STATISTICS]["count"] == len(batches)
    return {**variables.get(PARAMETERS, {}), **variables[STATISTICS]}


@pytest.mark.parametrize("scale", ["static", "ema", "range", "pact"])
def test_of_absolute_maxima_the_maximum(scale):
    x_max = ranges(quantizer(scale=scale, statistic="absmax"))["x_max"]
    assert x_max == max(np.max(np.abs(batch)) for batch in BATCHES)


@pytest.mark.parametrize("scale", ["static", "range"])
def test_of_other_statistics_the_mean(scale):
    x_max = ranges(quantizer(scale=scale, statistic="mean"))["x_max"]
    each = [2 * np.mean(np.abs(batch)) / np.sqrt(127) * 128 for batch in BATCHES]
    assert x_max == pytest.approx(np.mean(each), rel=1e-5)


def test_learned_scales_follow_the_same_range():
    x_max = ranges(quantizer(scale="range", statistic="absmax"))["x_max"]
    assert ranges(quantizer(scale="lsq", statistic="absmax"))["scale"] == pytest.approx(float(x_max) / 128)
    log2_scale = ranges(quantizer(scale="log2", statistic="absmax"))["log2_scale"]
    assert log2_scale == pytest.approx(np.log2(float(x_max) / 128), rel=1e-5)


@pytest.mark.parametrize("scale", ["static", "range", "lsq"])
def test_asymmetric_extremes_hold_all_batches(scale):
    # Two batches of the same width, at different places.
    batches = [np.float32([[-3, 1]]), np.float32([[-1, 3]]), np.float32([[0, 1]])]
    got = ranges(quantizer(scale=scale, symmetric=False, statistic="absmax"), batches)
    width = {"lsq": lambda: got["scale"] * 255, "range": lambda: got["width"]}.get(
        scale, lambda: got["x_max"] - got["x_min"]
    )()
    assert got["x_min"] == -3
    assert width == pytest.approx(6, rel=1e-6)


def test_asymmetric_ends_of_other_statistics_are_averaged():
    got = ranges(quantizer(scale="range", symmetric=False, statistic="percentile", percentile=100))
    low, high = ([f(b) for b in BATCHES] for f in (np.min, np.max))
    assert got["x_min"] == pytest.approx(np.mean(low), rel=1e-6)
    assert got["x_min"] + got["width"] == pytest.approx(np.mean(high), rel=1e-5)


def test_an_earlier_calibration_is_forgotten():
    model = quantizer(scale="range", statistic="absmax")
    variables = model.init(jax.random.key(0), BATCHES[0])
    first = calibrate(model, variables, [100 * BATCHES[1]])
    again = calibrate(model, first, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, again, calibrate(model, variables, BATCHES))


def test_data_of_zeros_has_the_range_one():
    model, zeros = quantizer(scale="range", statistic="absmax"), np.zeros((2, 6), np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), zeros), [zeros])
    assert variables[PARAMETERS]["x_max"] == 1


@pytest.mark.parametrize("over", ["batches", "set"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("statistic", ["absmax", "mean", "mse", "percentile"])
def test_a_range_of_data_with_a_nan_is_named(statistic, symmetric, over):
    model = quantizer(
        scale="range", symmetric=symmetric, statistic=statistic if symmetric or statistic != "mean" else None
    )
    variables = model.init(jax.random.key(0), BATCHES[0])
    large = np.ones((400, 400), np.float32)  # So that the percentile is not the maximum.
    large[1, 2] = np.nan
    with pytest.raises(UserError, match="x_max.*: not finite after calibration") as error:
        calibrate(model, variables, [np.ones_like(large), large], over=over)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_nan_is_found():
    model = Net(Quantization(weights=Uniform(bits=4)))
    variables = model.init(jax.random.key(0), IMAGES[0], train=True)
    params = variables["params"]
    params["conv1"]["kernel"] = params["conv1"]["kernel"].at[0, 0, 0, 0].set(np.nan)
    with pytest.raises(UserError, match="^conv1/weights/scale, conv1/weights/x_max: not finite"):
        calibrate(model, variables, IMAGES, train=True)


class Net(nn.Module):
    """Convolution, norm and ReLU, twice."""

    quantization: Quantization

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = Conv(4, (3, 3), use_bias=False, quantization=self.quantization, name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = Activation(quantization=self.quantization, name=f"act{i}")(x)
        return x.value if i and self.quantization.activations else x


IMAGES = [RNG.normal(size=(4, 6, 6, 3)).astype(np.float32) for _ in range(2)]


def test_activations_are_seen_float_behind_quantized_weights():
    spec = {
        "weights": Uniform(bits=2, scale="statistic"),
        "activations": Uniform(bits=2, scale="static", statistic="absmax"),
    }
    model, reference = Net(Quantization(**spec)), Net(Quantization(weights=spec["weights"]))
    variables = model.init(jax.random.key(0), IMAGES[0], train=True)
    got = calibrate(model, variables, IMAGES, train=True)
    weights = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    outputs = [reference.apply(weights, x, train=True, mutable=["batch_stats"])[0] for x in IMAGES]
    expected = max(float(jnp.max(y)) for y in outputs)
    assert got[STATISTICS]["act1"]["activations"]["x_max"] == pytest.approx(expected, rel=1e-6)


def test_weights_and_norm_statistics_are_left_as_they_are():
    model = Net(Quantization(weights=Uniform(bits=4), activations=Uniform(bits=4)))
    variables = model.init(jax.random.key(0), IMAGES[0], train=True)
    got = calibrate(model, variables, IMAGES, train=True)
    assert set(got) == set(variables)
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, got[name], variables[name])
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    counts = [leaf for path, leaf in jax.tree.leaves_with_path(got[STATISTICS]) if path[-1].key == "count"]
    assert counts == [2] * 4


@pytest.mark.parametrize("mutable", [True, ["batch_stats", STATISTICS]], ids=["all", "named"])
@pytest.mark.parametrize("weights", [Uniform(bits=4), AccumulatorAware(bits=4, accumulator_bits=12)])
def test_what_is_not_asked_for_by_name_is_not_done(mutable, weights):
    """A pass that may change all variables is no calibration, and projects no weights."""
    act = Uniform(bits=4, scale="ema", statistic="absmax")
    first = Rule("conv0", {"weights": {"kind": "uniform", "bits": 4}})
    model = Net(Quantization(weights=weights, activations=act, rules=(first,)))
    variables = model.init(jax.random.key(0), IMAGES[0], train=True)
    variables = calibrate(model, variables, IMAGES, train=True)
    y, state = model.apply(variables, 2 * IMAGES[0], train=True, mutable=mutable)
    y = np.asarray(value_of(y))
    assert len(np.unique(y)) <= 16
    for name in ("params", PARAMETERS):
        jax.tree.map(np.testing.assert_array_equal, state.get(name, variables[name]), variables[name])
    before, after = (tree[STATISTICS]["act0"]["activations"] for tree in (variables, state))
    assert after["count"] == before["count"] + 1 and after["x_max"] != before["x_max"]


def test_float_network_passes_through():
    model = Net(Quantization())
    variables = model.init(jax.random.key(0), IMAGES[0], train=True)
    assert calibrate(model, variables, IMAGES, train=True).keys() == variables.keys()


DEAD = [np.float32([[0.01, 2.0]] * 4), np.float32([[0.0, 2.0]] * 4)]


@pytest.mark.parametrize("statistic", ["absmax", "percentile", "mean"])
@pytest.mark.parametrize("over", ["batches", "ema", "set"])
@pytest.mark.parametrize("batches", [DEAD, DEAD[::-1]])
def test_a_batch_in_which_a_channel_is_dead_has_no_say_about_it(statistic, over, batches):
    model = quantizer(scale="static", statistic=statistic, granularity="per_channel")
    variables = calibrate(model, model.init(jax.random.key(0), batches[0]), batches, over=over)
    alone = calibrate(model, variables, DEAD[:1])
    found, expected = (v[STATISTICS]["x_max"] for v in (variables, alone))
    half = over == "set" and statistic == "mean"  # Of a set as a whole it has half of the elements.
    np.testing.assert_allclose(found, expected * np.float32([0.5 if half else 1, 1]), rtol=1e-5)


@pytest.mark.parametrize("statistic", ["absmax", "mean"])
def test_a_device_on_which_a_channel_is_dead_has_no_say_about_it(statistic):
    model = quantizer(scale="ema", statistic=statistic, granularity="per_channel").clone(axis_name="devices")
    variables = model.init(jax.random.key(0), DEAD[0])
    train = functools.partial(model.apply, variables, mutable=[STATISTICS])
    found = jax.vmap(lambda x: train(x)[1], axis_name="devices")(np.stack(DEAD))
    alone = jax.vmap(lambda x: train(x)[1], axis_name="devices")(np.stack(DEAD[:1]))
    expected = np.broadcast_to(alone[STATISTICS]["x_max"], (2, 2))
    np.testing.assert_allclose(found[STATISTICS]["x_max"], expected, rtol=1e-6)


def test_a_channel_that_is_always_dead_has_a_usual_range():
    model = quantizer(scale="static", statistic="absmax", granularity="per_channel")
    variables = calibrate(model, model.init(jax.random.key(0), DEAD[1]), DEAD[1:] * 2)
    np.testing.assert_array_equal(model.apply(variables, DEAD[1]).scale, np.float32([1, 2]) / 128)
