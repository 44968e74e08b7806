"""Kernels on the grids of their quantizers."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import qflax
from qflax.training.kernels import layer_kernels

SHAPE = (4, 4, 3)


class Single(nn.Module):
    """A network of one layer."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        del train
        return self.layer(x)


def kernels(**weights):
    """Of a convolution whose kernel ends far outside of the quantizer's range."""
    rng = np.random.default_rng(0)
    model = qflax.quantize(Single(nn.Conv(64, (3, 3))), weights=weights)
    variables = model.init(jax.random.key(0), np.ones((1, *SHAPE), np.float32))
    kernel = rng.normal(0, 0.1, (3, 3, 3, 64)).astype(np.float32)
    params = jax.tree.map(lambda x: kernel if x.shape == kernel.shape else x, variables["params"])
    return kernel, layer_kernels(model, {**variables, "params": params}, SHAPE)


@pytest.mark.parametrize("step", [2.0**-6, 2.0**-3], ids=["most are clipped", "none is"])
def test_codes_are_weights_clipped_and_rounded(step):
    kernel, (layer,) = kernels(kind="uniform", bits=4, scale="constant", scale_value=step)
    np.testing.assert_array_equal(layer.codes, np.clip(np.round(kernel.ravel() / step), -7, 7))
    np.testing.assert_allclose(layer.weights, kernel.ravel() / step, rtol=1e-6)
    assert layer.bits == 4 and (np.abs(layer.weights).max() > 7.5) == (step < 0.1)


def test_weights_that_are_more_than_rounded_are_left_out():
    rules = [dict(layers="input", activations=dict(bits=8))]
    model = qflax.quantize(
        Single(nn.Dense(16)),
        weights=dict(kind="accumulator_aware", bits=8, accumulator_bits=12),
        rules=rules,
    )
    x = np.ones((1, 256), np.float32)
    (layer,) = layer_kernels(model, model.init(jax.random.key(0), x), (256,))
    assert layer.weights is None and layer.codes.size == 256 * 16
