"""Layers report what their accumulators must hold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Conv, Dense, layer_costs
from qflax.numerics import IntegerFormat, width_of_extremes
from qflax.quantizers import (
    IntegerBias,
    Minifloat,
    MixedPrecision,
    Quantization,
    Uniform,
    quantized_array,
    quantizer_of,
)

RNG = np.random.default_rng(0)


def inputs(bits=4, signed=False, zero_point=0.0, scale=0.25):
    fmt = IntegerFormat(bits=bits, signed=signed)
    codes = RNG.integers(fmt.lowest, fmt.highest + 1, (1, 5, 5, 6)) - zero_point
    value = jnp.float32(codes * scale)
    return quantized_array(value, jnp.round(value / scale), jnp.float32(scale), fmt, zero_point)


def reported(spec, x, layer=None):
    layer = layer or Conv(7, (3, 3), quantization=Quantization(weights=spec))
    variables = layer.init(jax.random.key(0), x)
    (cost,) = layer_costs(layer, variables, x)
    return variables, cost.accumulation


@pytest.mark.parametrize("signed,zero_point", [(False, 0), (True, 0), (False, 7)])
def test_bounds_are_those_of_the_integer_weights(signed, zero_point):
    x = inputs(signed=signed, zero_point=zero_point)
    spec = Uniform(bits=5, scale="statistic", granularity="per_channel")
    variables, bounds = reported(spec, x)
    q = quantizer_of(spec, weights=True).apply({}, variables["params"]["kernel"])
    codes = np.asarray(q.format.encode(q.value, q.scale), np.int64)
    np.testing.assert_array_equal(bounds.positive, np.maximum(codes, 0).sum((0, 1, 2)))
    np.testing.assert_array_equal(bounds.negative, np.maximum(-codes, 0).sum((0, 1, 2)))
    low, high = x.format.lowest - zero_point, x.format.highest - zero_point
    assert (bounds.x_min, bounds.x_max, bounds.depth) == (low, high, 54)
    most = max(np.sum(np.where(codes > 0, high, low) * codes, (0, 1, 2)))
    least = min(np.sum(np.where(codes > 0, low, high) * codes, (0, 1, 2)))
    bits = bounds.exact_bits
    assert -(2 ** (bits - 1)) <= least and most < 2 ** (bits - 1)
    assert least < -(2 ** (bits - 2)) or most >= 2 ** (bits - 2)
    assert bits <= bounds.norm_bits <= bounds.data_type_bits


def test_learned_widths_and_dense_layers_too():
    spec = MixedPrecision(bits=4)
    x = inputs()
    flat = x.moved(x.value.reshape(1, -1))
    _, bounds = reported(spec, flat, Dense(3, quantization=Quantization(weights=spec)))
    assert bounds.depth == 150 and bounds.weight_bits == 4
    assert 1 < bounds.exact_bits <= bounds.norm_bits <= bounds.data_type_bits == 16


def test_sums_that_are_not_of_integers_have_no_bound():
    uniform, x = Uniform(bits=4, scale="statistic"), inputs()
    per_channel = x.replace(scale=jnp.full(6, 0.25))
    minifloat = Minifloat(exponent_bits=4, mantissa_bits=3)
    for spec, of in ((uniform, x.value), (uniform, per_channel), (minifloat, x), (None, x)):
        assert reported(spec, of)[1] is None


@pytest.mark.parametrize("bias", [3.0, -3.0])
def test_an_integer_bias_is_part_of_what_the_accumulator_must_hold(bias):
    x, weights = inputs(scale=2.0**-8), Uniform(bits=4, scale="constant", scale_value=2.0**-8)
    flat = x.moved(x.value.reshape(1, -1))
    for biases, least in ((None, 0), (IntegerBias(), 3 * 2**16)):
        layer = Dense(
            3,
            quantization=Quantization(weights=weights, biases=biases),
            bias_init=nn.initializers.constant(bias),
        )
        _, bounds = reported(None, flat, layer)
        sums = int(np.max(bounds.positive + bounds.negative)) * 15
        needed = width_of_extremes(-sums - least, sums + least)
        assert bounds.exact_bits <= needed
        assert bounds.exact_bits >= (width_of_extremes(-least, least) if biases else 2)
