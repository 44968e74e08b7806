"""Minifloat quantizers: scales, calibration, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.quantizers import (
    CONSTRAINTS,
    PARAMETERS,
    STATISTICS,
    Minifloat,
    bits_of,
    calibrate,
    constrain,
    quantizer_of,
)
from qflax.quantizers.minifloat import MINIFLOAT_SCALES

X = np.random.default_rng(0).normal(size=(32, 4, 6)).astype(np.float32)


def calibrated(weights, **fields):
    spec = Minifloat(**{"exponent_bits": 3, "mantissa_bits": 1, **fields})
    model = quantizer_of(spec, weights=weights)
    return model, calibrate(model, model.init(jax.random.key(0), X), [X, 2 * X])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scale", [scale for scale in MINIFLOAT_SCALES if scale != "constant"])
def test_the_largest_value_becomes_the_largest_of_the_format(scale, granularity):
    model, variables = calibrated(True, scale=scale, granularity=granularity)
    q = model.apply(variables, X)
    factor = 1 if scale == "statistic" else 2  # Of two batches, kernels here, the larger one.
    axes = (0, 1) if granularity == "per_channel" else None
    np.testing.assert_allclose(q.scale, factor * np.max(np.abs(X), axes) / 24, rtol=1e-6)
    fmt = model.format
    np.testing.assert_array_equal(fmt.decode(fmt.encode(X, q.scale), q.scale), q.value)
    assert bits_of(q) == 5
    names = {"log2": {"log2_scale"}, "range": {"x_max"}}.get(scale, set())
    assert set(variables.get(PARAMETERS, {})) == names


def test_learned_scales_get_the_gradient_of_the_format():
    x, gy = X.ravel(), np.sin(np.arange(X.size), dtype=np.float32)
    model, variables = calibrated(False, scale="log2", clip_gradient="before_rounding")
    log2_scale = jnp.float32(-3.3)  # Some values saturate.

    def loss(log2_scale):
        return jnp.sum(gy * model.apply({**variables, PARAMETERS: {"log2_scale": log2_scale}}, x).value)

    scale = np.exp2(np.float64(log2_scale))
    u = x / scale
    r = np.asarray(model.format.fake_quant(np.float32(u)))
    expected = np.sum(gy * np.where(np.abs(u) <= 24, r - u, r)) * scale * np.log(2)
    np.testing.assert_allclose(jax.grad(loss)(log2_scale), expected, rtol=1e-4)


def test_unscaled_is_the_plain_format_down_to_the_subnormals_of_float32():
    spec = Minifloat(exponent_bits=8, mantissa_bits=7, specials="ieee")
    x = np.float32([1e-40, -3e-39, 1e-45, 1.0])
    y = quantizer_of(spec, weights=False).apply({}, x).value
    expected = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    assert np.asarray(y)[:2].any()
    np.testing.assert_allclose(np.asarray(y).view(np.uint32), expected.view(np.uint32), atol=2**15)


def test_a_running_average_follows_the_batches():
    model, variables = calibrated(False, scale="ema")
    before = variables[STATISTICS]["x_max"]
    q, state = model.apply(variables, 4 * X, mutable=[STATISTICS])
    largest = 4 * np.max(np.abs(X))
    np.testing.assert_allclose(state[STATISTICS]["x_max"], before + 0.1 * (largest - before), rtol=1e-6)
    np.testing.assert_allclose(q.scale, largest / 24, rtol=1e-6)


def test_unscaled_e3m1_loses_small_weights_and_a_scale_keeps_them():
    w = (0.02 * X).astype(np.float32)
    plain = quantizer_of(Minifloat(exponent_bits=3, mantissa_bits=1), weights=True).apply({}, w).value
    scaled = Minifloat(exponent_bits=3, mantissa_bits=1, scale="statistic", granularity="per_channel")
    scaled = quantizer_of(scaled, weights=True).apply({}, w).value
    assert np.mean(plain == 0) > 0.95 > 0.1 > np.mean(scaled == 0)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(exponent_bits=9, mantissa_bits=3), "exponent_bits=9: a minifloat has 1 to 8"),
        (dict(exponent_bits=4, mantissa_bits=3, scale="lsq"), "scale='lsq': unknown"),
        (dict(exponent_bits=4, mantissa_bits=3, statistic="kl"), "statistic='kl': unknown"),
        (dict(exponent_bits=4, mantissa_bits=3, surrogate="ewgs"), "surrogate='ewgs': unknown"),
        (dict(exponent_bits=4, mantissa_bits=3, scale="range", scale_value=2.0), "only scale='constant'"),
        (dict(exponent_bits=4, mantissa_bits=3, scale_value=-1.0), "needs a positive number"),
        (dict(exponent_bits=4, mantissa_bits=3, granularity="per_channel"), "one for all channels"),
    ],
)
def test_impossible_specs(fields, message):
    with pytest.raises(UserError, match=message):
        Minifloat(**fields)


def test_statistics_of_activations_are_an_error():
    with pytest.raises(UserError, match="scale='statistic' is for weights"):
        calibrated(False, scale="statistic")


@pytest.mark.parametrize("scale", ["static", "statistic", "log2", "range"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(exponent_bits=8, mantissa_bits=7, specials="ieee"),
        dict(exponent_bits=8, mantissa_bits=3),
        dict(exponent_bits=7, mantissa_bits=3, bias=0),
        dict(exponent_bits=4, mantissa_bits=3, bias=60),
    ],
)
def test_extreme_formats_can_be_scaled(fields, scale):
    model, variables = calibrated(True, scale=scale, **fields)
    variables = {**variables, **model.apply(variables, X, mutable=[CONSTRAINTS])[1]}
    if PARAMETERS in variables:
        variables[PARAMETERS] = constrain(variables[PARAMETERS], variables)
    q = model.apply({k: v for k, v in variables.items() if k != CONSTRAINTS}, X)
    large = np.abs(X) > 0.1
    error = np.abs(q.value - X)[large] / np.abs(X)[large]
    assert np.max(error) <= 2.0 ** -(model.format.mantissa_bits + 1) and np.isfinite(q.value).all()


def test_the_format_of_scales_has_a_spec_too():
    spec = Minifloat(exponent_bits=8, mantissa_bits=0, specials="nan", signed=False, subnormals=False)
    y = quantizer_of(spec, weights=False).apply({}, np.float32([0.3, 1.0, 5.0])).value
    np.testing.assert_array_equal(y, [0.25, 1.0, 4.0])
