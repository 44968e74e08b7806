"""Small networks in the layouts of the CIFAR-10 configurations reproduce the references."""

import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Activation, AveragePool, Conv, Dense, Quantize
from qflax.models import BasicBlock, build_model
from qflax.quantizers import QuantizedArray, value_of
from qflax.training import build

pytestmark = pytest.mark.exact

# Layer of the reference -> ours. Shared activation layers come twice.
LAYERS = {"conv1": "conv_init", "bn1": "norm_init", "act_stem": "act_init", "linear": "classifier"}
BLOCK = {
    **{f"conv{i}": f"conv{i}" for i in (1, 2)},
    **{f"bn{i}": f"norm{i}" for i in (1, 2)},
    "act1": "act1",
    "act_out": "act2",
    "shortcut_conv": "conv_shortcut",
    "shortcut_bn": "norm_shortcut",
    "act_shortcut": "act_shortcut",
}
LAYERS |= {f"block{i}.{k}": f"stage{i}_block1/{v}" for i in (1, 2) for k, v in BLOCK.items()}
PARAMETERS = {"scale": "scale", "bias": "bias", "mean": "mean", "var": "var", "kernel": "kernel"}

# Activation of the reference -> our layer, and which of its calls.
ACTIVATIONS = {
    "stem": ("act_init", 0),
    "block1.act1": ("stage1_block1/act1", 0),
    "block1.branch": ("act_init", 1),
    "block1.out": ("stage1_block1/act2", 0),
    "block2.act1": ("stage2_block1/act1", 0),
    "block2.shortcut": ("stage2_block1/act_shortcut", 0),
    "block2.branch": ("stage2_block1/act_shortcut", 1),
    "block2.out": ("stage2_block1/act2", 0),
}
OUTPUTS = {
    "conv1_out": ("conv_init", 0),
    **{f"block{i}.conv{j}_out": (f"stage{i}_block1/conv{j}", 0) for i in (1, 2) for j in (1, 2)},
    "block2.shortcut_conv_out": ("stage2_block1/conv_shortcut", 0),
    "input": ("input", 0),
    "linear_input": ("pool/output", 0),
}


def network(config, epsilon):
    """The network of a configuration, with one block in each of two stages of 8 and 16 channels."""
    model = build_model(
        "resnet18",
        num_classes=10,
        stem=config.stem,
        shortcut=config.shortcut,
        residual=config.residual,
        norm="batch",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=float(epsilon),
        quantization=build.quantization(config),
    )
    assert model.block is BasicBlock
    return model.clone(stage_sizes=(1, 1), num_filters=8)


def load(vectors, template):
    """The reference's variables, under our names; ranges of activations from its `value`."""
    theirs = {ours: name for name, ours in LAYERS.items()}

    def value(path, leaf):
        *layers, name = (key.key for key in path[1:])
        if name == "count":
            return jnp.int32(1)
        if name == "x_max":
            array = vectors[f"{theirs['/'.join(layers[:-1])]}.value"]
        else:
            array = vectors[f"{theirs['/'.join(layers)]}.{name}"]
        assert array.shape == leaf.shape, path
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(value, template)


def run(config, vectors):
    """Logits, and every layer's outputs by path and call."""
    model, images = network(config, vectors["bn_epsilon"]), vectors["images"]
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    keep = lambda module, _: isinstance(module, Activation | AveragePool | Conv | Dense | Quantize)  # noqa: E731
    forward = functools.partial(
        model.apply, train=False, capture_intermediates=keep, mutable=["intermediates"]
    )
    logits, state = jax.jit(forward)(load(vectors, template), images)

    def at(layer, call=0):
        return functools.reduce(lambda tree, name: tree[name], layer.split("/"), state["intermediates"])[
            "__call__"
        ][call]

    return logits, at


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.fixture(scope="module")
def integers(golden):
    """The accumulator-aware layout with the reference's weight quantizers: they know of no accumulator."""
    default = importlib.import_module("configs.default")
    config = config_of("resnet18_w4a4_a2q_16b_cifar10")
    config.weights = default.uniform(bits=4, scale="statistic", granularity="per_channel")
    _, stem, pool, classifier = config.rules  # The vectors have float images.
    per_tensor = {**classifier["weights"], "granularity": "per_tensor"}
    six = {**pool["activations"], "bits": 6}
    config.rules = (stem, {**pool, "activations": six}, {**classifier, "weights": per_tensor})
    return golden("cnn_int"), *run(config, golden("cnn_int"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_of_every_activation_are_exact(integers, name):
    vectors, _, at = integers
    y = at(*ACTIVATIONS[name])
    codes = np.round(np.float64(y.value) / np.float64(y.scale))
    np.testing.assert_array_equal(codes, vectors[f"codes.{name}"])
    assert y.format.bits == 4 and not y.format.signed


def test_the_pool_is_truncated_and_the_bias_is_an_integer(integers):
    vectors, logits, at = integers
    pooled = at("pool")
    np.testing.assert_array_equal(
        np.round(np.float64(pooled.value) / np.float64(pooled.scale)), vectors["trunc.pool_codes"]
    )
    np.testing.assert_allclose(pooled.scale, vectors["trunc.pool_scale"], rtol=1e-6)
    assert pooled.format.bits == vectors["trunc.pool_bits"] and not pooled.format.signed
    np.testing.assert_allclose(logits, vectors["trunc.logits"], rtol=0, atol=2e-5)
    # With the bias alone: what is left of the logits when the products are taken away.
    products = pooled.value @ (vectors["linear.kernel_codes"] * vectors["linear.kernel_scale"])
    codes = np.round((np.float64(logits) - np.float64(products)) / np.float64(vectors["trunc.bias_scale"]))
    np.testing.assert_array_equal(codes, np.broadcast_to(vectors["trunc.bias_codes"], codes.shape))


def test_without_truncation_and_integer_bias_it_is_the_plain_mean(golden):
    vectors, default = golden("cnn_int"), importlib.import_module("configs.default")
    config = config_of("resnet18_w4a4_a2q_16b_cifar10")
    config.weights = default.uniform(bits=4, scale="statistic", granularity="per_channel")
    per_tensor = dict(bits=8, granularity="per_tensor")
    config.rules = (
        dict(layers="conv_init", weights=dict(bits=8)),
        dict(layers="classifier", weights=per_tensor),
    )
    logits, at = run(config, vectors)
    np.testing.assert_allclose(at("pool").value, vectors["pool"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logits, vectors["logits"], rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=["e4m3", "e3m1"])
def minifloats(request, golden):
    """The minifloat layout, unscaled as the reference is."""
    config = config_of("resnet18_w8a8_e4m3_cifar10")
    for role in ("weights", "activations", "outputs"):
        if request.param == "e3m1":
            config[role].update(exponent_bits=3, mantissa_bits=1, specials="none")
    vectors = golden(f"cnn_{request.param}")
    return vectors, *run(config, vectors)


@pytest.mark.parametrize("name", ACTIVATIONS | OUTPUTS)
def test_minifloat_values_are_exact(minifloats, name):
    vectors, _, at = minifloats
    layer, call = (ACTIVATIONS | OUTPUTS)[name]
    y = at(layer, call)
    assert isinstance(y, QuantizedArray)
    np.testing.assert_array_equal(value_of(y)[:16], vectors[f"q.{name}"])


def test_minifloat_logits_are_not_quantized(minifloats):
    vectors, logits, at = minifloats
    assert not isinstance(at("classifier"), QuantizedArray)
    # The sums of the classifier are exact; the bias is added in float32.
    np.testing.assert_allclose(logits, vectors["logits"], rtol=1e-6, atol=1e-6)


def test_the_networks_have_norms_and_quantizers_where_they_must(golden):
    """Without its activation layers shared, the network would have three more of them."""
    model = network(config_of("resnet18_w4a4_a2q_16b_cifar10"), 1e-5)
    assert isinstance(model, nn.Module)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    ranges = [
        p for p, _ in jax.tree_util.tree_leaves_with_path(params["quantizer_params"]) if "x_max" in str(p[-1])
    ]
    assert len(ranges) == 6  # Stem, two a block, and the projected shortcut.
