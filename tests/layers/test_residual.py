"""Addition of two branches, float or through one shared quantizer."""

import jax
import jax.numpy as jnp
import numpy as np

from qflax.layers import Add
from qflax.quantizers import (
    PARAMETERS,
    STATISTICS,
    Quantization,
    QuantizedArray,
    Rule,
    Uniform,
    quantizer_of,
)
from qflax.quantizers.collections import CALIBRATION

RNG = np.random.default_rng(0)
A, B = (RNG.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in range(2))
EVERYWHERE = (Rule("*", {"activations": {}}),)


def test_float_addition_even_with_a_default_for_activations():
    layer = Add(quantization=Quantization(activations=Uniform(bits=2)))
    np.testing.assert_array_equal(layer.apply({}, A, B), A + B)


def test_quantized_operands_are_added_by_their_values():
    q = quantizer_of(Uniform(bits=4, scale="constant", scale_value=0.3), weights=False).apply({}, A)
    y = Add().apply({}, q, B)
    assert not isinstance(y, QuantizedArray)
    np.testing.assert_array_equal(y, q.value + B)


def test_both_branches_go_through_one_quantizer():
    layer = Add(quantization=Quantization(activations=Uniform(bits=4), rules=EVERYWHERE))
    variables = layer.init(jax.random.key(0), A, B)
    assert jax.tree.map(jnp.shape, variables[PARAMETERS]) == {"activations": {"scale": ()}}
    variables = {**variables, PARAMETERS: {"activations": {"scale": jnp.float32(0.25)}}}
    expected = sum(np.clip(np.round(x / 0.25), -8, 7) for x in (A, B)) * 0.25
    np.testing.assert_array_equal(layer.apply(variables, A, B), np.float32(expected))


def test_calibration_sees_both_branches():
    spec = Uniform(bits=4, scale="range", statistic="absmax")
    layer = Add(quantization=Quantization(activations=spec, rules=EVERYWHERE))
    variables = layer.init(jax.random.key(0), A, 3 * B)
    _, state = layer.apply(variables, A, 3 * B, mutable=[PARAMETERS, STATISTICS, CALIBRATION["activations"]])
    expected = max(np.max(np.abs(A)), np.max(np.abs(3 * B)))
    assert state[PARAMETERS]["activations"]["x_max"] == expected


def test_sign_is_the_layer_s():
    spec = Uniform(bits=4, scale="constant", scale_value=0.25)
    y = Add(signed=False, quantization=Quantization(activations=spec, rules=EVERYWHERE)).apply({}, A, B)
    expected = sum(np.clip(np.round(x / 0.25), 0, 15) for x in (A, B)) * 0.25
    np.testing.assert_array_equal(y, np.float32(expected))
