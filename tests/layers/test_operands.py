"""Biases on the accumulator's grid, and quantized outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Conv, Dense
from qflax.numerics import IntegerFormat
from qflax.quantizers import (
    IntegerBias,
    Minifloat,
    Quantization,
    Uniform,
    calibrate,
    quantizer_of,
)

X = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
INPUTS = quantizer_of(Uniform(bits=8, scale="constant", scale_value=0.05), weights=False).apply({}, X)
WEIGHTS = Uniform(bits=4, scale="statistic", granularity="per_channel")


def layer_of(kind, **roles):
    fields = {"bias_init": nn.initializers.normal(0.5), "quantization": Quantization(**roles)}
    return Conv(4, (3, 3), **fields) if kind == "conv" else Dense(4, **fields)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_integer_bias_is_on_the_grid_of_the_sums(kind):
    layer = layer_of(kind, weights=WEIGHTS, biases=IntegerBias(bits=32))
    variables = layer.init(jax.random.key(0), INPUTS)
    kernel = quantizer_of(WEIGHTS, weights=True).apply({}, variables["params"]["kernel"])
    scale = np.float64(kernel.scale) * np.float64(INPUTS.scale)
    y = np.float64(layer.apply(variables, INPUTS))
    # All that comes out is an integer, up to rounding, and the bias is the nearest one.
    np.testing.assert_allclose(y / scale, np.round(y / scale), atol=2e-3)
    zero = INPUTS.moved(jnp.zeros_like(INPUTS.value))
    bias = np.float64(variables["params"]["bias"])
    alone = np.float64(layer.apply(variables, zero)).reshape(-1, 4)
    np.testing.assert_allclose(alone / scale, np.broadcast_to(np.round(bias / scale), alone.shape), rtol=1e-6)
    assert np.any(alone != bias)


def test_a_narrow_bias_saturates_and_the_gradient_is_the_bias_s():
    layer = layer_of(
        "dense", weights=Uniform(bits=4, scale="constant", scale_value=1.0), biases=IntegerBias(bits=4)
    )
    zero = INPUTS.moved(jnp.zeros((1, 3)))

    def output(bias):
        return layer.apply({"params": {"kernel": jnp.zeros((3, 4)), "bias": bias}}, zero)[0]

    bias = INPUTS.scale * np.array([100.0, -100.0, 2.3, 0.0], np.float32)
    np.testing.assert_allclose(output(bias), INPUTS.scale * np.array([7, -8, 2, 0]), rtol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(output(bias)))(bias)
    np.testing.assert_array_equal(gradient, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (None, INPUTS),
        (WEIGHTS, X),
        (Minifloat(exponent_bits=4, mantissa_bits=3), INPUTS),
        (WEIGHTS, INPUTS.replace(scale=jnp.full(3, 0.05))),
    ],
)
def test_integer_bias_needs_integer_sums(weights, inputs):
    layer = layer_of("dense", weights=weights, biases=IntegerBias())
    with pytest.raises(UserError, match="an integer bias has the scale of input times weights.*biases=None"):
        layer.init(jax.random.key(0), inputs)


def test_bits_of_a_bias():
    assert IntegerBias().format == IntegerFormat(bits=32, signed=True)
    for bits in (1, 33, 8.0):
        with pytest.raises(UserError, match="2 to 32 bits"):
            IntegerBias(bits=bits)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_outputs_are_quantized_as_signed_with_a_range_of_their_own(kind):
    layer, plain = layer_of(kind, outputs=Uniform(bits=6, scale="static")), layer_of(kind)
    variables = calibrate(layer, layer.init(jax.random.key(0), X), [X])
    assert set(variables["quantizer_stats"]["outputs"]) == {"x_max", "count"}
    y = layer.apply(variables, X)
    expected = np.asarray(plain.apply({"params": variables["params"]}, X))
    assert y.format.signed and y.format.bits == 6
    np.testing.assert_array_equal(y.value, y.format.fake_quant(expected, y.scale))
    # Calibrating twice forgets the first time; the weights' calibration leaves outputs alone.
    again = calibrate(layer, variables, [2 * X])
    assert (
        again["quantizer_stats"]["outputs"]["x_max"] > 1.5 * variables["quantizer_stats"]["outputs"]["x_max"]
    )
    assert again["quantizer_stats"]["outputs"]["count"] == 1
    untouched = calibrate(layer, variables, [2 * X], roles=("weights",))
    assert untouched["quantizer_stats"] == variables["quantizer_stats"]
