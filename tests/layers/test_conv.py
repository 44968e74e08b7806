"""Convolution: Flax's own when float, that of the quantized kernel otherwise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from qflax.layers import Conv
from qflax.quantizers import Quantization, QuantizedArray, Rule, Uniform, quantizer_of

X = np.random.default_rng(0).normal(size=(2, 7, 7, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strides": 2},
        {"padding": "VALID"},
        {"padding": ((1, 1), (1, 1)), "strides": 2},
        {"padding": ((0, 2), (1, 0))},
        {"feature_group_count": 2},
        {"feature_group_count": 4, "use_bias": False},
        {"dtype": jnp.bfloat16},
    ],
)
def test_float_layer_is_flax_s(fields):
    mine, theirs = Conv(8, (3, 3), bias_init=nn.initializers.normal(), **fields), nn.Conv(8, (3, 3), **fields)
    variables = mine.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), X))
    y, expected = mine.apply(variables, X), theirs.apply(variables, X)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(np.float32(y), np.float32(expected))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_quantized_layer_convolves_with_the_quantized_kernel(granularity):
    spec = Uniform(bits=3, scale="statistic", granularity=granularity)
    layer = Conv(8, (3, 3), strides=2, quantization=Quantization(weights=spec))
    variables = layer.init(jax.random.key(0), X)
    kernel = quantizer_of(spec, weights=True).apply({}, variables["params"]["kernel"])
    assert kernel.scale.shape == (() if granularity == "per_tensor" else (8,))
    assert (
        len(np.unique(np.asarray(kernel.value / kernel.scale).round())) == 7
    )  # Narrow: an odd number of codes.
    expected = jax.lax.conv_general_dilated(
        X, kernel.value, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_convolves_what_float32_quantization_gave():
    spec = Uniform(bits=3, scale="statistic")
    quantization = Quantization(weights=spec)
    variables = Conv(8, (3, 3), quantization=quantization).init(jax.random.key(0), X)
    y = Conv(8, (3, 3), dtype=jnp.bfloat16, quantization=quantization).apply(variables, X)
    kernel = quantizer_of(spec, weights=True).apply({}, variables["params"]["kernel"])
    sums = nn.Conv(8, (3, 3), dtype=jnp.bfloat16, use_bias=False).apply(
        {"params": {"kernel": kernel.unscaled}}, X
    )
    assert y.dtype == jnp.bfloat16
    expected = sums * kernel.scale.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(y), np.float32(expected))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_integers_are_exact(dtype):
    eight = Uniform(bits=8, scale="statistic")
    layer = Conv(8, (3, 3), use_bias=False, dtype=dtype, quantization=Quantization(weights=eight))
    quantized = quantizer_of(Uniform(bits=8, scale="constant", scale_value=0.1), weights=False).apply({}, X)
    variables = layer.init(jax.random.key(0), quantized)
    kernel = quantizer_of(eight, weights=True).apply({}, variables["params"]["kernel"])
    sums = scipy.signal.correlate(
        np.pad(np.int64(quantized.unscaled), ((0, 0), (1, 1), (1, 1), (0, 0)))[0],
        np.int64(kernel.unscaled)[..., 0],
        "valid",
    )
    y = layer.apply(variables, quantized)
    expected = jnp.asarray(sums, dtype) * (quantized.scale * kernel.scale).astype(dtype)
    np.testing.assert_array_equal(np.float32(y[0, ..., 0]), np.float32(expected[..., 0]))


def test_quantized_input_is_used_by_its_values():
    layer = Conv(8, (3, 3))
    variables = layer.init(jax.random.key(0), X)
    quantized = quantizer_of(Uniform(bits=8, scale="constant", scale_value=0.1), weights=False).apply({}, X)
    assert isinstance(quantized, QuantizedArray)
    y, of_values = layer.apply(variables, quantized), layer.apply(variables, quantized.value)
    np.testing.assert_allclose(y, of_values, rtol=1e-5, atol=1e-5)  # The order of factors differs.


def test_gradient_reaches_the_float_kernel():
    layer = Conv(8, (3, 3), quantization=Quantization(weights=Uniform(bits=2, scale="statistic")))
    variables = layer.init(jax.random.key(0), X)
    gradient = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, X) ** 2))(variables["params"])
    assert np.all(gradient["kernel"] != 0)


def test_a_rule_reaches_the_layer_by_its_path():
    class Net(nn.Module):
        quantization: Quantization

        @nn.compact
        def __call__(self, x):
            x = Conv(4, (1, 1), quantization=self.quantization, name="first")(x)
            return Conv(4, (1, 1), quantization=self.quantization, name="last")(x)

    rules = (Rule("first", {"weights": None}),)
    variables = Net(Quantization(weights=Uniform(bits=4), rules=rules)).init(jax.random.key(0), X)
    assert set(variables["quantizer_params"]) == {"last"}
