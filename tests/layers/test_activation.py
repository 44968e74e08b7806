"""Activation functions and other quantized places."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Activation, Quantize
from qflax.quantizers import Quantization, QuantizedArray, Rule, Uniform

X = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
CONSTANT = Uniform(bits=4, scale="constant", scale_value=0.125)


@pytest.mark.parametrize("function", [nn.relu, nn.silu, jnp.tanh])
def test_without_a_policy_it_is_the_function(function):
    layer = Activation(function)
    assert not layer.init(jax.random.key(0), X)
    np.testing.assert_array_equal(layer.apply({}, X), function(X))


@pytest.mark.parametrize(("function", "signed"), [(nn.relu, False), (nn.silu, True), (jnp.tanh, True)])
def test_only_a_relu_s_output_counts_as_unsigned(function, signed):
    y = Activation(function, Quantization(activations=CONSTANT)).apply({}, X)
    assert isinstance(y, QuantizedArray)
    assert y.format.signed == signed
    assert y.format.lowest == (-8 if signed else 0)


def test_spec_s_sign_comes_before_the_function_s():
    spec = Uniform(bits=4, scale="constant", scale_value=0.1, signed=True)
    assert Activation(quantization=Quantization(activations=spec)).apply({}, X).format.signed


def test_values_are_the_rounded_function():
    y = Activation(quantization=Quantization(activations=CONSTANT)).apply({}, X)
    expected = np.clip(np.round(np.maximum(X, 0) / 0.125), 0, 15) * 0.125
    np.testing.assert_array_equal(y.value, np.float32(expected))


def test_gradient_is_zero_where_the_function_s_is_and_beyond_the_range():
    layer = Activation(quantization=Quantization(activations=CONSTANT))
    x = jnp.asarray([[-1.0, 0.3, 5.0]])
    gradient = jax.grad(lambda x: jnp.sum(layer.apply({}, x).value))(x)
    np.testing.assert_array_equal(gradient, [[0, 1, 0]])


def test_quantize_is_float_unless_a_rule_says_otherwise():
    class Net(nn.Module):
        quantization: Quantization

        @nn.compact
        def __call__(self, x):
            return Quantize(quantization=self.quantization, name="input")(x)

    assert Net(Quantization(activations=CONSTANT)).apply({}, X) is X
    rule = Rule("input", {"activations": {"bits": 8}})
    y = Net(Quantization(activations=CONSTANT, rules=(rule,))).apply({}, X)
    assert (y.format.bits, y.format.signed) == (8, True)
