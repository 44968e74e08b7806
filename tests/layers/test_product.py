"""Layers with kernels compute what Flax's do, on grids."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Conv, ConvTranspose, Dense, DenseGeneral, Einsum, layer_costs
from qflax.quantizers import IntegerBias, Quantization, Uniform, calibrate

CASES = {
    "conv": (Conv(6, (3, 3), strides=(2, 1), padding="VALID"), (2, 7, 8, 4)),
    "conv 1d": (Conv(6, 3, padding="CAUSAL"), (2, 9, 4)),
    "conv 3d": (Conv(5, (2, 3, 2), strides=2), (2, 5, 6, 4, 3)),
    "dilated": (Conv(6, (3, 3), kernel_dilation=2, padding=2), (2, 8, 8, 4)),
    "stretched input": (Conv(6, (3, 3), input_dilation=2, padding=1), (2, 5, 5, 4)),
    "circular": (Conv(6, (3, 3), padding="CIRCULAR"), (2, 6, 6, 4)),
    "groups": (Conv(6, (3, 3), feature_group_count=2), (2, 6, 6, 4)),
    "depthwise": (Conv(8, (3, 3), feature_group_count=4, use_bias=False), (2, 6, 6, 4)),
    "several batch axes": (Conv(6, (3, 3)), (2, 3, 6, 6, 4)),
    "masked": (Conv(6, (1, 1), mask=np.tri(4, 6, dtype=np.float32)[None, None]), (2, 3, 3, 4)),
    "transposed": (ConvTranspose(6, (3, 3), strides=(2, 2)), (2, 5, 5, 4)),
    "transposed kernel": (ConvTranspose(6, (4, 4), strides=(2, 2), transpose_kernel=True), (2, 5, 5, 4)),
    "dense": (Dense(6), (2, 3, 4)),
    "general": (DenseGeneral((3, 2), axis=(1, -1)), (2, 4, 5, 3)),
    "general, one number": (DenseGeneral(6, use_bias=False), (2, 4, 5)),
    "einsum": (Einsum((4, 3, 5), "btd,dhk->bthk"), (2, 6, 4)),
    "einsum, outputs apart": (Einsum((5, 4, 3), "btd,hdk->bhtk"), (2, 6, 4)),
    "einsum of each": (Einsum((3, 4, 5), "bed,edk->bek"), (2, 3, 4)),
}
ABSMAX = dict(scale="static", statistic="absmax", signed=True)
POLICY = Quantization(
    weights=Uniform(bits=4, granularity="per_channel", **ABSMAX), activations=Uniform(bits=8, **ABSMAX)
)


def case(name):
    """Ours, Flax's, an input."""
    layer, shape = CASES[name]
    fields = {f: getattr(layer, f) for f in layer.layer.__dataclass_fields__ if f not in ("parent", "name")}
    return layer, layer.layer(**fields), np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_float_layer_is_that_of_flax(name):
    ours, theirs, x = case(name)
    variables = ours.init(jax.random.key(0), x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs.init(jax.random.key(0), x)):
        own = variables["params"][path[-1].key]
        assert own.shape == leaf.shape and own.dtype == leaf.dtype
        np.testing.assert_array_equal(own, leaf)
    variables = jax.tree.map(lambda x: x + 0.1, variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_quantized_layer_is_that_of_flax_on_grids(name):
    """Each output channel's weights lie on a grid of its own, and inputs on one."""
    ours, theirs, x = case(name)
    ours = ours.clone(quantization=POLICY, quantize_input=True)
    variables = calibrate(ours, ours.init(jax.random.key(0), x), [x])
    params = dict(variables["params"])
    shape, flat = params["kernel"].shape, ours._flat(params["kernel"], jnp.asarray(x))
    scale = jnp.max(jnp.abs(flat), range(flat.ndim - 1)) / 7
    on_grid = jnp.round(flat / scale) * scale
    params["kernel"] = ours._unflat(on_grid, shape, jnp.asarray(x))
    step = np.abs(x).max() / 128
    expected = theirs.apply({"params": params}, np.clip(np.round(x / step), -128, 127) * step)
    y = ours.apply(variables, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    (place, cost) = layer_costs(ours, variables, x)
    assert place.activation_bits == cost.input_bits == 8 and cost.weight_bits == 4
    assert cost.weights == np.prod(shape) and cost.accumulation is not None


@pytest.mark.parametrize("name", CASES)
def test_operations_are_counted(name):
    """As XLA counts those of Flax's layer, where it has no padding and no gaps to leave out."""
    ours, theirs, x = case(name)
    variables = ours.init(jax.random.key(0), x[:1])
    (cost,) = layer_costs(ours, variables, x[:1])
    if name in (
        "dense",
        "general",
        "general, one number",
        "einsum",
        "einsum, outputs apart",
        "einsum of each",
    ):
        flops = jax.jit(theirs.apply).lower(variables, x[:1]).cost_analysis()["flops"]
        biases = theirs.apply(variables, x[:1]).size if ours.use_bias else 0
        assert 2 * cost.macs == flops - biases
    assert cost.macs > 0
    if name == "several batch axes":
        (alone,) = layer_costs(ours, variables, x[:1, 0])
        assert cost.macs == x.shape[1] * alone.macs


@pytest.mark.parametrize("biases", [None, IntegerBias()], ids=["float", "integer"])
@pytest.mark.parametrize("name", ["dense", "general", "conv", "transposed", "einsum"])
def test_sums_of_codes_stay_within_float16(name, biases):
    """600 products of codes of 127 are 150 times as much as it holds; what they stand for is 30."""
    kernel = {"dense": (600, 2), "einsum": (600, 2)}.get(name, (1, 1, 600, 2))
    layers = {
        "dense": Dense(2),
        "general": DenseGeneral(2, axis=(1, 2, 3)),
        "conv": Conv(2, (1, 1)),
        "transposed": ConvTranspose(2, (1, 1)),
        "einsum": Einsum((600, 2), "bd,df->bf"),
    }
    quantization = dataclasses.replace(POLICY, biases=biases)
    layer = layers[name].clone(dtype=jnp.float16, quantization=quantization, quantize_input=True)
    x = np.ones((1, *kernel[:-1]) if len(kernel) == 2 else (1, 1, 1, 600), np.float16)
    variables = layer.init(jax.random.key(0), x)
    params = {"kernel": jnp.full(kernel, 0.05), "bias": jnp.full(2, 0.5)}
    y = layer.apply(calibrate(layer, {**variables, "params": params}, [x]), x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.ravel(), [30.5, 30.5], rtol=0.01)


def test_bias_is_on_the_sums_grid():
    layer = DenseGeneral(
        (3, 2),
        quantize_input=True,
        quantization=Quantization(
            weights=POLICY.weights, activations=POLICY.activations, biases=IntegerBias(bits=16)
        ),
    )
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    variables = calibrate(layer, layer.init(jax.random.key(0), x), [x])
    assert layer.apply(variables, x).shape == (2, 3, 2)
    (_, cost) = layer_costs(layer, variables, x)
    assert cost.bias_bits == 16 and cost.biases == 6


def test_gradients_are_those_of_flax():
    for name in ("conv", "transposed", "general", "einsum, outputs apart"):
        ours, theirs, x = case(name)
        variables = theirs.init(jax.random.key(0), x)
        losses = [lambda v, layer=layer, x=x: jnp.sum(jnp.sin(layer.apply(v, x))) for layer in (ours, theirs)]
        gradients = [jax.grad(loss)(variables) for loss in losses]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)
    assert issubclass(Conv, nn.Conv)
