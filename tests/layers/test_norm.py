"""Batch normalisation: Flax's own, and in evaluation the same bits in every program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import BatchNorm

pytestmark = pytest.mark.exact

X = np.random.default_rng(0).normal(size=(20, 5, 5, 16)).astype(np.float32)


def variables_of(**fields):
    rng = np.random.default_rng(1)
    variables = nn.BatchNorm(use_running_average=True, **fields).init(jax.random.key(0), X)
    return jax.tree.map(lambda x: rng.uniform(0.1, 3, x.shape).astype(np.float32), variables)


@pytest.mark.parametrize("fields", [{}, {"use_scale": False}, {"use_bias": False, "epsilon": 0.1}])
@pytest.mark.parametrize("running", [True, False])
def test_it_is_flax_s(fields, running):
    variables = variables_of(**fields)
    own, flax = (
        layer(use_running_average=running, momentum=0.9, **fields).apply(
            variables, X, mutable=["batch_stats"]
        )
        for layer in (BatchNorm, nn.BatchNorm)
    )
    np.testing.assert_allclose(own[0], flax[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, own[1], flax[1])


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float16])
@pytest.mark.parametrize("fields", [{}, {"use_scale": False, "use_bias": False}])
def test_its_dtype_is_flax_s(fields, dtype, param_dtype):
    fields = {**fields, "dtype": dtype, "param_dtype": param_dtype}
    with jax.enable_x64(True):
        for input_dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            x = jnp.asarray(X, input_dtype)
            variables = nn.BatchNorm(use_running_average=True, **fields).init(jax.random.key(0), x)
            own, flax = (
                layer(use_running_average=True, **fields).apply(variables, x)
                for layer in (BatchNorm, nn.BatchNorm)
            )
            assert own.dtype == flax.dtype
            np.testing.assert_allclose(np.float64(own), np.float64(flax), rtol=0.02, atol=0.02)


def test_evaluation_is_one_product_and_one_sum():
    variables = variables_of()
    params, stats = variables["params"], variables["batch_stats"]
    variance = stats["var"] + np.float32(1e-5)
    factor = params["scale"] * (np.sqrt(variance) / variance)
    expected = X * factor + (params["bias"] - stats["mean"] * factor)
    layer = BatchNorm(use_running_average=True)
    for apply in (layer.apply, jax.jit(layer.apply), jax.jit(lambda _, x: layer.apply(variables, x))):
        np.testing.assert_array_equal(apply(variables, X), expected)


def test_it_does_not_change_the_variables_it_is_given():
    variables = variables_of()
    before = jax.tree.map(np.copy, variables)
    BatchNorm(use_running_average=True).apply(variables, X)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
