"""What is quantized by rules equals what is built of qflax's layers."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.linen import quantize
from qflax.models import build_model
from qflax.quantizers import calibrate, quantization_from_config

WEIGHTS = dict(kind="uniform", bits=4, granularity="per_channel", scale="lsq")
ACTIVATIONS = dict(kind="uniform", bits=4, scale="lsq")
INPUT = dict(kind="uniform", bits=8, signed=True, scale="static")


class PlainBlock(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        conv = lambda strides, name: nn.Conv(  # noqa: E731
            self.features, (3, 3), strides, padding=((1, 1), (1, 1)), use_bias=False, name=name
        )
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)  # noqa: E731
        y = nn.relu(norm("norm1")(conv(self.strides, "conv1")(x)))
        y = norm("norm2")(conv(1, "conv2")(y))
        if self.strides > 1:
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (self.features // 4, self.features // 4)))
        return nn.relu(y + x)


class PlainResNet(nn.Module):
    """ResNet of `depth` layers for CIFAR-10, in nothing but Flax; names are those of qflax's."""

    depth: int

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(16, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm_init")(x))
        for i in range(3):
            for j in range((self.depth - 2) // 6):
                strides = 2 if i and not j else 1
                x = PlainBlock(16 * 2**i, strides, name=f"stage{i + 1}_block{j + 1}")(x, train)
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


def _positive(shape):
    return np.random.default_rng(1).random(shape, np.float32)


@pytest.fixture(scope="module")
def both():
    """By rules and of qflax's layers, with the same parameters and ranges, and images."""
    by_rules = quantize(
        PlainResNet(20),
        weights=WEIGHTS,
        activations=ACTIVATIONS,
        rules=[
            dict(layers="*relu_*", activations={}),
            dict(layers="conv_init/input", activations=INPUT),
        ],
    )
    policy = dict(weights=WEIGHTS, activations=ACTIVATIONS, outputs=None, biases=None)
    policy["rules"] = [dict(layers="input", activations=INPUT)]
    own = build_model(
        "resnet20",
        num_classes=10,
        stem="3x3",
        shortcut="A",
        residual="signed",
        norm="batch",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-5,
        dtype=jnp.float32,
        quantization=quantization_from_config(policy),
        axis_name=None,
    )
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(lambda: own.init(jax.random.key(0), images, train=False))()
    theirs = jax.jit(lambda: by_rules.init(jax.random.key(0), images, train=False))()
    for name in ("params", "batch_stats"):
        assert jax.tree.structure(variables[name]) == jax.tree.structure(theirs[name])
        moved = jax.tree.map(lambda x: x + 0.1 * _positive(x.shape), variables[name])
        variables[name] = theirs[name] = moved
    return (
        by_rules,
        calibrate(by_rules, theirs, [images], train=False),
        own,
        calibrate(own, variables, [images], train=False),
        images,
    )


def test_resnet20_has_the_same_logits(both):
    by_rules, theirs, own, variables, images = both
    expected = jax.jit(lambda v, x: own.apply(v, x, train=False))(variables, images)
    logits = jax.jit(lambda v, x: by_rules.apply(v, x, train=False))(theirs, images)
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("what", ["logits", "gradient"])
def test_compiled_program_has_the_same_operations(both, what):
    """So at run time the mechanism costs nothing."""
    by_rules, theirs, own, ours, images = both
    programs = []
    for model, variables in ((by_rules, theirs), (own, ours)):
        function = lambda v, x, model=model: model.apply(v, x, train=False)  # noqa: E731
        if what == "gradient":
            logits = function
            function = jax.grad(lambda v, x, logits=logits: jnp.sum(logits(v, x) ** 2), allow_int=True)
        text = jax.jit(function).lower(variables, images).compile().as_text()
        programs.append(collections.Counter(re.findall(r"= (?:\([^)]*\)|\S+) ([a-z\-]+)\(", text)))
    assert programs[0] == programs[1] and sum(programs[0].values()) > 1000
