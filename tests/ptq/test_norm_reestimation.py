"""Norm statistics after quantization."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from qflax.layers import Conv
from qflax.ptq import reestimate_norms
from qflax.quantizers import FLOAT, Minifloat, Quantization, Uniform, calibrate, value_of

COARSE = Quantization(weights=Uniform(bits=2), activations=Uniform(bits=2))


@pytest.fixture(scope="module")
def quantized(small_net, float_variables, batches):
    model = small_net(COARSE)
    variables = {**model.init(jax.random.key(0), batches[0], train=False), **float_variables}
    return calibrate(model, variables, batches, train=False)


def reestimated(small_net, quantized, float_variables, batches, policy=COARSE):
    models = small_net(policy, momentum=0.0), small_net(momentum=0.0)
    return reestimate_norms(models[0], quantized, models[1], float_variables, batches)


def test_statistics_move_by_what_quantization_changes(small_net, quantized, float_variables, batches):
    found = reestimated(small_net, quantized, float_variables, batches)["batch_stats"]
    both = [
        [
            model.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]["norm"]
            for batch in batches
        ]
        for model, variables in (
            (small_net(COARSE, momentum=0.0), quantized),
            (small_net(momentum=0.0), float_variables),
        )
    ]
    (own_mean, own_var), (goal_mean, goal_var) = (
        [np.mean([statistics[name] for statistics in part], 0) for name in ("mean", "var")] for part in both
    )
    old = float_variables["batch_stats"]["norm"]
    assert np.max(np.abs(own_mean - goal_mean)) > 1e-2
    np.testing.assert_allclose(found["norm"]["var"], old["var"] * own_var / goal_var, rtol=1e-5)
    made = (own_mean - found["norm"]["mean"]) / np.sqrt(found["norm"]["var"])
    np.testing.assert_allclose(made, (goal_mean - old["mean"]) / np.sqrt(old["var"]), atol=1e-5)


def test_statistics_that_are_no_norm_s_stay():
    class Net(nn.Module):
        momentum: float = 0.99

        @nn.compact
        def __call__(self, x, *, train=False):
            norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")
            counted = self.variable("batch_stats", "count", lambda: np.float32(3))
            self.variable("batch_stats", "var", lambda: np.float32(2))
            return norm(x) + 0 * counted.value

    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    found = reestimate_norms(Net(0.0), variables, Net(0.0), variables, [x])["batch_stats"]
    assert (found["count"], found["var"]) == (3, 2)
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])


def test_a_channel_that_quantization_makes_zero_is_not_blown_up():
    """Its mean is that of the float network, too; a variance of 0 would make 300 times what is left of it."""

    class Net(nn.Module):
        quantization: Quantization = FLOAT
        momentum: float = 0.99

        @nn.compact
        def __call__(self, x, *, train=False):
            x = value_of(Conv(8, (3, 3), use_bias=False, quantization=self.quantization, name="conv")(x))
            return nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)

    rng = np.random.default_rng(0)
    seen, plain = (rng.normal(mean, 1, (32, 8, 8, 3)).astype(np.float32) for mean in (0.3, 0.4))
    coarse, reference = Quantization(weights=Minifloat(exponent_bits=3, mantissa_bits=1)), Net()
    variables = reference.init(jax.random.key(0), seen)
    kernel = variables["params"]["conv"]["kernel"]
    kernel = kernel.at[..., :2].set(0.06 * np.sign(kernel[..., :2]))  # Below half of the least number.
    variables = {**variables, "params": {"conv": {"kernel": kernel}, "norm": variables["params"]["norm"]}}
    model, immediate = Net(coarse), Net(momentum=0.0)
    variables |= immediate.apply(variables, seen, train=True, mutable=["batch_stats"])[1]
    quantized = {**model.init(jax.random.key(0), seen), **variables}
    found = reestimate_norms(Net(coarse, 0.0), quantized, immediate, variables, [plain])
    means = [np.mean(y, (0, 1, 2)) for y in (model.apply(found, plain), reference.apply(variables, plain))]
    assert np.max(np.abs(model.apply(found, plain)[..., :2])) < 1
    np.testing.assert_allclose(*means, atol=1e-4)


def test_images_unlike_those_of_training_change_nothing_in_a_float_network(
    small_net, float_variables, batches
):
    others = [3 * batch + 1 for batch in batches]
    found = reestimated(small_net, float_variables, float_variables, others, Quantization())
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], float_variables["batch_stats"])


def test_without_norms_there_is_nothing_to_reestimate(small_net):
    variables = {"params": {}}
    assert reestimate_norms(small_net(), variables, small_net(), variables, []) == variables
