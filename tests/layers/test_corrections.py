"""Norm statistics and biases after quantization."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.layers import Activation, Conv, Dense, correct_biases, reestimate_norms
from qflax.quantizers import FLOAT, Quantization, Uniform, calibrate, value_of

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(16, 6, 6, 3)).astype(np.float32) for _ in range(3)]


class Net(nn.Module):
    """Names out of alphabetical order, with a norm."""

    quantization: Quantization = FLOAT
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        policy = {"quantization": self.quantization}
        x = Conv(8, (3, 3), name="z_conv", **policy)(x)
        x = Activation(name="act", **policy)(x)
        x = Conv(8, (3, 3), use_bias=False, name="b_conv", **policy)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        return Dense(4, name="a_dense", **policy)(jnp.mean(value_of(x), (1, 2)))


COARSE = Quantization(weights=Uniform(bits=2), activations=Uniform(bits=2))


class Plain(nn.Module):
    """One layer, called as a network is."""

    layer: nn.Module

    def __call__(self, x, *, train):
        del train
        return self.layer(x)


def outputs(model, variables, name):
    def keep(module, _):
        return module.name == name

    captured = [
        model.apply(variables, batch, train=False, capture_intermediates=keep, mutable=["intermediates"])[1]
        for batch in BATCHES
    ]
    values = [np.asarray(value_of(state["intermediates"][name]["__call__"][0])) for state in captured]
    return np.concatenate(values).astype(np.float64)


def start():
    model = Net(COARSE)
    variables = model.init(jax.random.key(0), BATCHES[0], train=False)
    return model, calibrate(model, variables, BATCHES, train=True)


def test_norms_get_the_mean_statistics_of_the_batches():
    model, variables = start()
    immediate = Net(COARSE, momentum=0.0)
    variables = reestimate_norms(immediate, variables, BATCHES)
    inputs = outputs(model, variables, "b_conv")
    statistics = variables["batch_stats"]["norm"]
    np.testing.assert_allclose(statistics["mean"], inputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    per_batch = [part.var((0, 1, 2)) for part in np.split(inputs, 3)]
    np.testing.assert_allclose(statistics["var"], np.mean(per_batch, 0), rtol=1e-4)


def test_every_biased_layer_gets_the_float_network_s_mean():
    model, variables = start()
    reference = Net()
    corrected = correct_biases(model, variables, reference, variables, BATCHES)
    for name in ("z_conv", "a_dense"):
        goal = outputs(reference, variables, name).mean
        axes = (0, 1, 2) if name == "z_conv" else (0,)
        before, after = (outputs(model, v, name).mean(axes) for v in (variables, corrected))
        assert np.max(np.abs(before - goal(axes))) > 1e-2
        np.testing.assert_allclose(after, goal(axes), atol=1e-5)
    kernels = functools.partial(jax.tree.map, lambda x: x if x.ndim > 1 else 0)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, kernels(variables["params"]), kernels(corrected["params"]))
    )


def test_biases_are_corrected_behind_quantized_outputs_too():
    fine = Quantization(weights=Uniform(bits=2), outputs=Uniform(bits=12, scale="static", statistic="absmax"))
    model, reference = Plain(Dense(4, quantization=fine)), Plain(Dense(4))
    batches = [batch.reshape(-1, 27) for batch in BATCHES]
    variables = model.init(jax.random.key(0), batches[0], train=False)
    variables = calibrate(model, variables, batches, train=False)
    corrected = correct_biases(model, variables, reference, variables, batches)
    goal, before, after = (
        np.mean([value_of(network.apply(v, batch, train=False)) for batch in batches], (0, 1))
        for network, v in ((reference, variables), (model, variables), (model, corrected))
    )
    assert np.max(np.abs(after - goal)) < 2e-3 < np.max(np.abs(before - goal))


def test_without_norms_there_is_nothing_to_reestimate():
    variables = {"params": {}}
    assert reestimate_norms(Net(), variables, BATCHES) == variables
