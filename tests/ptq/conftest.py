"""A small network with what real ones have: norms, a residual addition, groups, pooling, a classifier."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from qflax.layers import Activation, Add, AveragePool, Conv, Dense
from qflax.quantizers import FLOAT, Quantization, value_of

BATCHES = [np.random.default_rng(i).normal(size=(16, 8, 8, 3)).astype(np.float32) for i in range(3)]


class Block(nn.Module):
    """Two convolutions, one of them grouped, and a shortcut."""

    quantization: Quantization
    norm: functools.partial

    @nn.compact
    def __call__(self, x):
        policy = {"quantization": self.quantization}
        y = Conv(16, (3, 3), use_bias=False, name="conv1", **policy)(x)
        y = Activation(name="act1", **policy)(self.norm(name="norm1")(y))
        y = Conv(16, (3, 3), use_bias=False, feature_group_count=4, name="conv2", **policy)(y)
        y = self.norm(name="norm2")(value_of(y))
        return Activation(name="act2", **policy)(Add(name="add", **policy)(y, x))


class SmallNet(nn.Module):
    """A stem, a block, and two dense layers without a norm."""

    quantization: Quantization = FLOAT
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        policy = {"quantization": self.quantization}
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=self.momentum)
        x = Conv(16, (3, 3), strides=2, use_bias=False, name="stem", **policy)(x)
        x = Activation(name="act", **policy)(norm(name="norm")(x))
        x = Block(self.quantization, norm, name="block")(x)
        x = AveragePool(name="pool", **policy)(x)
        x = Activation(name="act_hidden", **policy)(Dense(24, name="hidden", **policy)(x))
        return value_of(Dense(5, name="classifier", **policy)(x))


def random_variables(seed=0):
    """Variables of the float network with norms that have seen something."""
    variables = SmallNet().init(jax.random.key(seed), BATCHES[0], train=False)
    model, rng = SmallNet(momentum=0.0), np.random.default_rng(seed)
    variables = {**variables, "params": jax.tree.map(lambda x: _disturbed(x, rng), variables["params"])}
    return {**variables, **model.apply(variables, BATCHES[0], train=True, mutable=["batch_stats"])[1]}


def _disturbed(x, rng):
    return x if x.ndim > 1 else x + rng.normal(size=x.shape).astype(np.float32) * 0.3


@pytest.fixture(scope="session")
def float_variables():
    """Of `SmallNet` without quantizers."""
    return random_variables()


@pytest.fixture(scope="session")
def small_net():
    """The class of the network."""
    return SmallNet


@pytest.fixture(scope="session")
def batches():
    """Three batches of its inputs."""
    return BATCHES
