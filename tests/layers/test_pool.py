"""Global average pooling."""

import jax
import numpy as np

from qflax.layers import AveragePool
from qflax.quantizers import Quantization, QuantizedArray, Rule, Uniform, quantizer_of

X = np.abs(np.random.default_rng(0).normal(size=(2, 4, 6, 3))).astype(np.float32)
SPEC = Uniform(bits=8, scale="constant", scale_value=1 / 64)


def test_pool_is_the_mean_over_height_and_width_and_float_by_default():
    y = AveragePool(quantization=Quantization(activations=SPEC)).apply({}, X)
    np.testing.assert_allclose(y, X.mean(axis=(1, 2)), rtol=1e-6)


def test_quantized_input_is_used_by_its_values():
    q = quantizer_of(SPEC, weights=False).apply({}, X)
    np.testing.assert_array_equal(AveragePool().apply({}, q), AveragePool().apply({}, q.value))


def test_a_rule_on_its_output_quantizes_the_mean_as_unsigned():
    quantization = Quantization(activations=SPEC, rules=(Rule("*output", {"activations": {}}),))
    y = AveragePool(quantization=quantization).apply({}, X)
    assert isinstance(y, QuantizedArray) and y.format.lowest == 0
    np.testing.assert_array_equal(y.value, np.round(np.asarray(AveragePool().apply({}, X)) * 64) / 64)


def test_pool_has_no_variables():
    assert not AveragePool().init(jax.random.key(0), X)
