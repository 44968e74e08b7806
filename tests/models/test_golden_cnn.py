"""A quantized residual network reproduces the reference's codes and logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Activation, Add, AveragePool, Conv, Dense
from qflax.quantizers import Quantization, Rule, Uniform

PAD_ONE = ((1, 1), (1, 1))
POLICY = Quantization(
    weights=Uniform(bits=4, scale="statistic", granularity="per_channel"),
    activations=Uniform(bits=4, scale="range"),
    rules=(
        Rule("conv1", {"weights": {"bits": 8}}),
        Rule("linear", {"weights": {"bits": 8, "granularity": "per_tensor"}}),
    ),
)


class GoldenNet(nn.Module):
    """Stem, two residual blocks whose branches share a quantizer, and a classifier."""

    @nn.compact
    def __call__(self, x):
        """Maps [batch, 8, 8, 3] to logits and the quantized activations by name."""

        def conv(x, name, features, strides=1, kernel=(3, 3), padding=PAD_ONE):
            fields = {"strides": strides, "padding": padding, "use_bias": False, "quantization": POLICY}
            return Conv(features, kernel, name=name, **fields)(x)

        def norm(x, name):
            return nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)(x)

        def act(name):
            return Activation(quantization=POLICY, name=name)

        seen, stem_act, shortcut_act = {}, act("act_stem"), act("block2_act_shortcut")
        x = seen["stem"] = stem_act(norm(conv(x, "conv1", 8), "bn1"))

        y = seen["block1.act1"] = act("block1_act1")(norm(conv(x, "block1_conv1", 8), "block1_bn1"))
        y = seen["block1.branch"] = stem_act(norm(conv(y, "block1_conv2", 8), "block1_bn2"))
        x = seen["block1.out"] = act("block1_act_out")(Add(name="block1_add")(y, x))

        y = norm(conv(x, "block2_conv1", 16, strides=2), "block2_bn1")
        y = seen["block2.act1"] = act("block2_act1")(y)
        y = seen["block2.branch"] = shortcut_act(norm(conv(y, "block2_conv2", 16), "block2_bn2"))
        x = conv(x, "block2_shortcut_conv", 16, strides=2, kernel=(1, 1), padding="VALID")
        x = seen["block2.shortcut"] = shortcut_act(norm(x, "block2_shortcut_bn"))
        x = seen["block2.out"] = act("block2_act_out")(Add(name="block2_add")(y, x))

        pooled = AveragePool(quantization=POLICY, name="pool")(x)
        return Dense(10, quantization=POLICY, name="linear")(pooled), pooled, seen


def load(vectors, template):
    """Variables of the network from the reference vectors, whose names have dots for our underscores."""

    def value(path, leaf):
        module, name = path[1].key, path[-1].key
        prefix = module.replace("block1_", "block1.").replace("block2_", "block2.")
        if name == "count":
            return jnp.int32(1)
        array = vectors[f"{prefix}.{'value' if name == 'x_max' else name}"]
        assert array.shape == leaf.shape
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(value, template)


@pytest.fixture(scope="module")
def outputs(golden):
    vectors, model = golden("cnn_int"), GoldenNet()
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), vectors["images"]))
    return vectors, jax.jit(model.apply)(load(vectors, template), vectors["images"])


@pytest.mark.parametrize(
    "name",
    [
        "stem",
        *("block1.act1", "block1.branch", "block1.out"),
        *("block2.act1", "block2.branch", "block2.shortcut", "block2.out"),
    ],
)
def test_codes_of_every_activation_are_exact(outputs, name):
    vectors, (_, _, seen) = outputs
    codes = np.round(np.float64(seen[name].value) / np.float64(seen[name].scale))
    np.testing.assert_array_equal(codes, vectors[f"codes.{name}"])
    assert seen[name].format.bits == 4 and not seen[name].format.signed


def test_pooled_features_and_logits(outputs):
    vectors, (logits, pooled, _) = outputs
    np.testing.assert_allclose(pooled, vectors["pool"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logits, vectors["logits"], rtol=0, atol=2e-5)
