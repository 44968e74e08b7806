"""Pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import AveragePool, MaxPool
from qflax.quantizers import (
    Minifloat,
    Quantization,
    QuantizedArray,
    Rule,
    Truncation,
    Uniform,
    quantizer_of,
    value_of,
)

X = np.abs(np.random.default_rng(0).normal(size=(2, 4, 6, 3))).astype(np.float32)
SPEC = Uniform(bits=8, scale="constant", scale_value=1 / 64)


def test_pool_is_the_mean_over_height_and_width_and_float_by_default():
    y = AveragePool(quantization=Quantization(activations=SPEC)).apply({}, X)
    np.testing.assert_allclose(y, X.mean(axis=(1, 2)), rtol=1e-6)


def test_quantized_input_is_used_by_its_values():
    q = quantizer_of(SPEC, weights=False).apply({}, X)
    np.testing.assert_allclose(AveragePool().apply({}, q).value, AveragePool().apply({}, q.value), rtol=1e-6)


def test_the_mean_of_sums_beyond_32_bits_is_that_of_the_values():
    spec = Uniform(bits=16, scale="constant", scale_value=1 / 64)
    for size, held in ((128, True), (256, False)):
        x = quantizer_of(spec, weights=False, signed=False).apply({}, jnp.ones((1, size, size, 1)))
        y = AveragePool().apply({}, x)
        assert isinstance(y, QuantizedArray) == held
        np.testing.assert_array_equal(value_of(y), [[1.0]])


def test_a_rule_on_its_output_quantizes_the_mean_as_unsigned():
    quantization = Quantization(activations=SPEC, rules=(Rule("*output", {"activations": {}}),))
    y = AveragePool(quantization=quantization).apply({}, X)
    assert isinstance(y, QuantizedArray) and y.format.lowest == 0
    np.testing.assert_array_equal(y.value, np.round(np.asarray(AveragePool().apply({}, X)) * 64) / 64)


def test_pool_has_no_variables():
    assert not AveragePool().init(jax.random.key(0), X)


def truncating(**fields):
    rules = (Rule("*output", {"activations": {"kind": "truncation", **fields}}),)
    return AveragePool(quantization=Quantization(activations=SPEC, rules=rules))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 6, 9, 12])
def test_truncation_drops_the_last_bits_of_the_sum(signed, bits):
    spec = Uniform(bits=4, scale="constant", scale_value=0.3, signed=signed)
    x = quantizer_of(spec, weights=False).apply({}, X - signed)
    codes = np.round(np.float64(x.value) / np.float64(x.scale)).astype(np.int64).sum(axis=(1, 2))
    # 24 pixels of 0..15 need 9 bits, of -8..7 as many.
    shift = max(9 - bits, 0)
    y = truncating(bits=bits).apply({}, x)
    np.testing.assert_array_equal(np.round(np.float64(y.value) / np.float64(y.scale)), codes >> shift)
    np.testing.assert_allclose(y.scale, 0.3 / 24 * 2**shift, rtol=1e-6)
    assert y.format.bits == min(bits, 9) and y.format.signed == signed


def test_truncation_rounds_as_it_is_told_and_stays_in_the_format():
    spec = Uniform(bits=4, scale="constant", scale_value=1.0)
    x = quantizer_of(spec, weights=False, signed=False).apply({}, jnp.full((1, 1, 1, 1), 15.0))
    values = {mode: truncating(bits=2, rounding=mode).apply({}, x).value for mode in ("floor", "ceil")}
    assert values == {"floor": 12.0, "ceil": 12.0}  # 16 would be a code too many.
    x = quantizer_of(spec, weights=False, signed=False).apply({}, jnp.full((1, 1, 1, 1), 9.0))
    assert truncating(bits=2, rounding="ceil").apply({}, x).value == 12.0


def test_truncation_passes_the_gradient_of_the_mean():
    def total(x, pool):
        y = pool.apply({}, quantizer_of(SPEC, weights=False).apply({}, x))
        return jnp.sum(jnp.asarray(getattr(y, "value", y)) ** 1)

    gradient = jax.grad(total)(jnp.asarray(X), truncating(bits=4))
    np.testing.assert_allclose(gradient, jax.grad(total)(jnp.asarray(X), AveragePool()), rtol=1e-6)
    assert np.any(gradient != 0)


@pytest.mark.parametrize(
    "x",
    [
        X,
        quantizer_of(Minifloat(exponent_bits=4, mantissa_bits=3), weights=False).apply({}, X),
        quantizer_of(Uniform(bits=4, scale="static", symmetric=False), weights=False).init_with_output(
            jax.random.key(0), X
        )[0],
    ],
    ids=["float", "minifloat", "zero point"],
)
def test_truncation_refuses_what_is_no_integer_with_one_scale(x):
    with pytest.raises(UserError, match=r"output: kind='truncation' .*symmetric=True"):
        truncating(bits=8).apply({}, x)


def test_truncation_refuses_sums_that_a_float_does_not_hold():
    spec = Uniform(bits=16, scale="constant", scale_value=1.0)
    with pytest.raises(UserError, match="of 26 bits"):
        truncating(bits=8).apply({}, quantizer_of(spec, weights=False).apply({}, jnp.ones((1, 32, 32, 1))))
    with pytest.raises(UserError, match="bits=17"):
        Truncation(bits=17)
    with pytest.raises(UserError, match="rounding='up'"):
        Truncation(bits=8, rounding="up")


def test_truncation_leaves_no_single_bit_of_signed_integers():
    """It would be -1 or +1 where a shift leaves -1 or 0."""
    spec = Uniform(bits=4, scale="constant", scale_value=1.0)
    x = quantizer_of(spec, weights=False, signed=False).apply({}, X)
    assert truncating(bits=1).apply({}, x).format.bits == 1
    x = quantizer_of(spec, weights=False, signed=True).apply({}, X)
    with pytest.raises(UserError, match="output: kind='truncation' with bits=1 of signed.*at least 2"):
        truncating(bits=1).apply({}, x)


def test_max_pool_keeps_the_grid():
    pool = MaxPool((3, 3), strides=2, padding=((1, 1), (1, 1)))
    padded = np.pad(X, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    np.testing.assert_array_equal(pool.apply({}, X), windows.max(axis=(-2, -1)))
    q = quantizer_of(SPEC, weights=False).apply({}, X)
    y = pool.apply({}, q)
    assert y.format == q.format and y.scale == q.scale
    np.testing.assert_array_equal(y.value, pool.apply({}, q.value))
