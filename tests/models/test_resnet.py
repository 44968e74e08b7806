"""Residual networks: published sizes, structure, and the float network as a special case."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import layer_costs
from qflax.models import MODELS, build_model
from qflax.quantizers import PARAMETERS, STATISTICS, Quantization, Rule, Uniform

EXAMPLE = np.zeros((1, 32, 32, 3), np.float32)
SMALL = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


FLOAT = Quantization()


def make(
    name="resnet20",
    shortcut="A",
    quantization=FLOAT,
    stem="3x3",
    residual="signed",
    norm="batch",
    num_classes=10,
    **fields,
):
    return build_model(
        name,
        num_classes=num_classes,
        stem=stem,
        shortcut=shortcut,
        residual=residual,
        norm=norm,
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-5,
        quantization=quantization,
        **fields,
    )


def abstract(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), EXAMPLE, train=False))


def filled(model):
    """Variables with random kernels, also of the classifier, without compiling the initialisation."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1]), leaf.dtype)
        return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract(model))


def logits_of(model, variables):
    return jax.jit(lambda variables: model.apply(variables, SMALL, train=False))(variables)


def costs_of(model):
    return layer_costs(model, abstract(model), EXAMPLE, train=False)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_resnet20_has_the_published_sizes():
    model = make()
    costs = costs_of(model)
    assert sum(c.weights + c.biases for c in costs) == 268_346
    assert sum(c.activations for c in costs) == 188_416
    assert max(c.activations for c in costs) == 16_384
    assert sum(c.macs for c in costs) == 40_551_040
    variables = abstract(model)
    assert size(variables["params"]) == 268_346 + 1_376
    assert size(variables["batch_stats"]) == 1_376
    assert not variables.keys() & {PARAMETERS, STATISTICS}


def test_multiplications_of_resnet20_by_hand():
    # A stage has 6 convolutions; the first one of a later stage reads half as many channels.
    stem = 32 * 32 * 27 * 16
    first = 6 * 32 * 32 * 9 * 16 * 16
    second = 16 * 16 * 9 * (16 * 32 + 5 * 32 * 32)
    third = 8 * 8 * 9 * (32 * 64 + 5 * 64 * 64)
    assert stem + first + second + third + 640 == 40_551_040


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet8", 75_290), ("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)],
)
def test_depth_is_that_of_the_name(name, parameters):
    model = make(name)
    costs = costs_of(model)
    assert sum(c.kind in ("conv", "dense") for c in costs) == int(name.removeprefix("resnet"))
    assert size(abstract(model)["params"]) == parameters


def test_option_b_adds_two_projections_with_norm():
    a, b = (abstract(make(shortcut=shortcut))["params"] for shortcut in "AB")
    assert size(b) - size(a) == 16 * 32 + 32 * 64 + 2 * (32 + 64)
    paths = [c.path for c in costs_of(make(shortcut="B")) if "shortcut" in c.path]
    assert paths == ["stage2_block1/conv_shortcut", "stage3_block1/conv_shortcut"]


def test_layers_come_in_the_network_s_order():
    paths = [c.path for c in costs_of(make("resnet8")) if c.kind != "activation"]
    blocks = [f"stage{i}_block1/conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert paths == ["conv_init", *blocks, "classifier"]
    paths = [c.path for c in costs_of(make("resnet8"))]
    assert paths[:3] == ["input", "conv_init", "act_init"] and paths[-2:] == ["pool/output", "classifier"]


def test_four_bits_take_an_eighth_of_the_bytes():
    spec = Uniform(bits=4, scale="statistic")
    model = make(quantization=Quantization(weights=spec, activations=Uniform(bits=4)))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract(model))
    costs = layer_costs(model, variables, EXAMPLE, train=False)
    assert sum(c.weight_bytes for c in costs) == 268_336 / 2 + 10 * 4
    assert sum(c.activation_bytes for c in costs) == 188_416 / 2
    assert max(c.activation_bytes for c in costs) == 16_384 / 2
    first = next(c for c in costs if c.kind == "conv")
    assert (first.weight_bits, first.input_bits) == (4, 32)  # The image is float without a rule.
    # The classifier reads the mean, integers of 6 more bits: 64 codes were added.
    assert [c.input_bits for c in costs if c.kind in ("conv", "dense")] == [32] + [4] * 18 + [10]


def test_option_a_subsamples_and_pads_channels_with_zeros():
    # With zero convolutions and unit norms a block is the ReLU of its shortcut.
    model = make("resnet8")
    variables = filled(model)
    params = variables["params"]
    for i in (1, 2, 3):
        params[f"stage{i}_block1"] = jax.tree.map(jnp.zeros_like, params[f"stage{i}_block1"])
    stem = nn.Conv(16, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)
    features = np.asarray(stem.apply({"params": params["conv_init"]}, SMALL))
    features = np.maximum(features / np.sqrt(1 + 1e-5), 0)[:, ::4, ::4]
    padded = np.pad(features, [(0, 0), (0, 0), (0, 0), (8 + 16, 8 + 16)])
    expected = padded.mean(axis=(1, 2)) @ np.asarray(params["classifier"]["kernel"])
    np.testing.assert_allclose(logits_of(model, variables), expected, rtol=1e-4, atol=1e-4)


def test_classifier_starts_at_zero():
    model = make("resnet8")
    classifier = jax.jit(lambda: model.init(jax.random.key(0), SMALL, train=False)["params"]["classifier"])()
    np.testing.assert_array_equal(classifier["kernel"], 0)
    np.testing.assert_array_equal(classifier["bias"], 0)


def test_policy_of_float_layers_is_the_float_network():
    rules = (Rule("*", {"weights": None, "activations": None}),)
    everything_float = Quantization(weights=Uniform(bits=4), activations=Uniform(bits=4), rules=rules)
    models = [make("resnet8"), make("resnet8", quantization=everything_float)]
    assert abstract(models[0]) == abstract(models[1])
    variables = filled(models[0])
    logits = [logits_of(model, variables) for model in models]
    assert logits[0].shape == (4, 10) and logits[0].dtype == jnp.float32
    np.testing.assert_array_equal(*logits)
    assert np.any(logits[0] != 0)


def test_sixteen_bits_are_close_to_float_and_two_are_not():
    model = make("resnet8")
    variables = filled(model)
    expected = logits_of(model, variables)

    def error(bits):
        weights = Uniform(bits=bits, scale="statistic", granularity="per_channel")
        quantized = make("resnet8", quantization=Quantization(weights=weights))
        return jnp.max(jnp.abs(logits_of(quantized, variables) - expected))

    scale = jnp.max(jnp.abs(expected))
    assert error(16) < 1e-3 * scale < 1e-1 * scale < error(2)


def test_training_updates_norm_statistics_and_every_weight_gets_a_gradient():
    weights = Uniform(bits=4, scale="statistic")
    quantization = Quantization(weights, activations=Uniform(bits=4, scale="constant", scale_value=0.3))
    model = make("resnet8", "B", quantization)
    variables = filled(model)

    def loss(params):
        inputs = {**variables, "params": params}
        logits, state = model.apply(inputs, SMALL, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), state

    gradient, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    same = jax.tree.map(np.array_equal, state["batch_stats"], variables["batch_stats"])
    assert not any(jax.tree.leaves(same))


IMAGENET = {"stem": "7x7", "shortcut": "B", "num_classes": 1000}


@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        # As published with torchvision's weights, and usual for CIFAR-10.
        ("resnet18", IMAGENET, 11_689_512),
        ("resnet34", IMAGENET, 21_797_672),
        ("resnet50", IMAGENET, 25_557_032),
        ("resnet18", {"shortcut": "B"}, 11_173_962),
        ("resnet18", {"shortcut": "B", "residual": "unsigned"}, 11_173_962),
        ("resnet34", {"shortcut": "B"}, 21_282_122),
        ("resnet50", {"shortcut": "B"}, 23_520_842),
    ],
)
def test_wide_resnets_have_the_published_sizes(name, fields, parameters):
    model = make(name, **fields)
    assert size(abstract(model)["params"]) == parameters


@pytest.mark.parametrize(("name", "macs"), [("resnet18", 1_814_073_344), ("resnet50", 4_089_184_256)])
def test_imagenet_resnets_multiply_as_often_as_published(name, macs):
    model, example = make(name, **IMAGENET), np.zeros((1, 224, 224, 3), np.float32)
    assert sum(cost.macs for cost in layer_costs(model, abstract(model), example, train=False)) == macs


def test_unsigned_residuals_add_rectified_branches():
    # With norms that turn the branch negative, nothing of it is left, and the shortcut passes unchanged.
    model, signed = (make("resnet8", "B", residual=residual) for residual in ("unsigned", "signed"))
    variables = filled(model)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, filled(signed))
    params = variables["params"]
    block = params["stage1_block1"]
    block["norm2"] = {"scale": jnp.zeros(16), "bias": -jnp.ones(16)}
    changed = {
        **params,
        "stage1_block1": {**block, "norm2": {"scale": jnp.zeros(16), "bias": -2 * jnp.ones(16)}},
    }
    logits = [logits_of(model, {**variables, "params": p}) for p in (params, changed)]
    np.testing.assert_array_equal(*logits)
    logits = [logits_of(signed, {**variables, "params": p}) for p in (params, changed)]
    assert np.any(logits[0] != logits[1])


@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_unsigned_residuals_share_the_quantizer_of_the_shortcut(name):
    quantization = Quantization(activations=Uniform(bits=4, scale="range"))
    model = make(name, "B", residual="unsigned", quantization=quantization)
    projected = [path for path, own in abstract(model)[PARAMETERS].items() if "act_shortcut" in own]
    # The first stage of ResNet-8 has as many channels as the stem, that of ResNet-50 four times as many.
    assert len(projected) == {"resnet8": 2, "resnet50": 4}[name]
    paths = [c.path for c in costs_of(model) if c.activations]
    assert paths.count("act_init") == (2 if name == "resnet8" else 1)
    assert paths.count(f"{projected[0]}/act_shortcut") == 2


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "resnet21"}, ["model='resnet21'", "did you mean", *MODELS]),
        ({"shortcut": "C"}, ["shortcut='C'", "A, B"]),
        ({"stem": "5x5"}, ["stem='5x5'", "3x3, 7x7"]),
        ({"residual": "sign"}, ["residual='sign'", "did you mean", "signed, unsigned"]),
    ],
)
def test_unknown_names_are_refused_with_the_choices(fields, parts):
    with pytest.raises(UserError) as caught:
        make(**fields)
    for part in parts:
        assert part in str(caught.value)
