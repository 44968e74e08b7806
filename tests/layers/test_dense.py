"""Dense layer: Flax's own when float, that of the quantized kernel otherwise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Dense
from qflax.quantizers import Quantization, Uniform, quantizer_of

X = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)


@pytest.mark.parametrize("fields", [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}])
@pytest.mark.parametrize("shape", [(5, 12), (5, 2, 6)])
def test_float_layer_is_flax_s(fields, shape):
    x = X.reshape(shape)
    mine, theirs = Dense(7, bias_init=nn.initializers.normal(), **fields), nn.Dense(7, **fields)
    variables = mine.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), x))
    y, expected = mine.apply(variables, x), theirs.apply(variables, x)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(y), np.float32(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_quantized_layer_multiplies_by_the_quantized_kernel(granularity):
    spec = Uniform(bits=4, scale="statistic", granularity=granularity)
    layer = Dense(7, quantization=Quantization(weights=spec))
    variables = layer.init(jax.random.key(0), X)
    kernel = quantizer_of(spec, weights=True).apply({}, variables["params"]["kernel"])
    assert kernel.scale.shape == (() if granularity == "per_tensor" else (7,))
    np.testing.assert_allclose(layer.apply(variables, X), X @ np.asarray(kernel.value), rtol=1e-5, atol=1e-6)
