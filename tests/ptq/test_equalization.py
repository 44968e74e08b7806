"""Cross-layer equalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, Conv, Dense
from qflax.ptq import equalize
from qflax.ptq.taps import run


def ranges(variables, first, second, groups, norm=None):
    """Of the channels between two layers: of what the first (with its norm) makes, and of the second's."""
    w = np.abs(np.asarray(leaf(variables["params"], first)["kernel"]))
    made = w.reshape(-1, w.shape[-1]).max(0)
    if norm is not None:
        variance = leaf(variables["batch_stats"], norm)["var"]
        made = made * np.abs(leaf(variables["params"], norm)["scale"]) / np.sqrt(variance + 1e-5)
    w = np.abs(np.asarray(leaf(variables["params"], second)["kernel"]))
    per_group = w.reshape(-1, w.shape[-2], groups, w.shape[-1] // groups).max((0, 3))  # [in / groups, groups]
    return made, per_group.T.reshape(-1)


def leaf(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def largest(variables, model, path, batch):
    """The largest magnitude of each channel that a module returns."""
    y = run(model, variables, batch, outputs=[path])[1][path]
    return np.max(np.abs(y), tuple(range(y.ndim - 1)))


@pytest.mark.thorough
def test_ranges_become_equal_and_the_function_stays(small_net, float_variables, batches):
    equal = equalize(small_net(), float_variables, batches[0])
    for first, second, groups, norm in (
        ("block/conv1", "block/conv2", 4, "block/norm1"),
        ("hidden", "classifier", 1, None),
    ):
        before = ranges(float_variables, first, second, groups, norm)
        after = ranges(equal, first, second, groups, norm)
        assert np.max(np.abs(np.log(before[0] / before[1]))) > 0.1
        place = small_net(), norm or first, batches[0]
        sizes, old = (largest(variables, *place) for variables in (equal, float_variables))
        bound = sizes > old.max() * 0.999
        np.testing.assert_allclose(after[0][~bound], after[1][~bound], rtol=1e-3)
        assert np.all(after[0][bound] < after[1][bound] * 1.001) and np.all(sizes < old.max() * 1.001)
        assert np.mean(bound) < 0.5
    expected, found = (small_net().apply(v, batches[1], train=False) for v in (float_variables, equal))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(
        equal["params"]["stem"]["kernel"], float_variables["params"]["stem"]["kernel"]
    )


class Hidden(nn.Module):
    """A second use of what is between two layers, by JAX alone."""

    factor: float

    @nn.compact
    def __call__(self, x, *, train):
        del train
        y = Activation(name="act")(Dense(8, name="first")(x))
        return Dense(4, name="second")(y) + self.factor * jnp.mean(y, axis=-1, keepdims=True)


def test_a_pair_whose_channels_go_elsewhere_is_left_alone():
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    variables = Hidden(1.0).init(jax.random.key(0), x, train=False)
    with pytest.raises(UserError, match="no two layers follow each other"):
        equalize(Hidden(1.0), variables, x)
    equalize(Hidden(0.0), variables, x)


class Tanh(nn.Module):
    """An activation function that passes on no factor."""

    @nn.compact
    def __call__(self, x, *, train):
        del train
        x = Activation(jnp.tanh, name="act")(Conv(8, (3, 3), name="first")(x))
        return Conv(4, (3, 3), name="second")(x)


def test_only_functions_that_pass_a_factor_on_will_do(batches):
    variables = Tanh().init(jax.random.key(0), batches[0], train=False)
    with pytest.raises(UserError, match="leave it out of the recipe"):
        equalize(Tanh(), variables, batches[0])


def test_an_empty_channel_stays_as_it_is(small_net, float_variables, batches):
    params = float_variables["params"]
    kernel = params["hidden"]["kernel"].at[:, 3].set(0.0)
    variables = {**float_variables, "params": {**params, "hidden": {**params["hidden"], "kernel": kernel}}}
    equal = equalize(small_net(), variables, batches[0])
    np.testing.assert_array_equal(
        equal["params"]["classifier"]["kernel"][3], params["classifier"]["kernel"][3]
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(equal))


@pytest.mark.parametrize("gain", [1.0, 1e-4])
def test_what_lies_between_two_layers_does_not_grow(small_net, float_variables, batches, gain):
    """A channel of a tiny gain has a bias all the same, which must not become the range of all."""
    norm = dict(float_variables["params"]["block"]["norm1"])
    norm = {"scale": norm["scale"].at[3].mul(gain), "bias": norm["bias"].at[3].set(0.5)}
    block = {**float_variables["params"]["block"], "norm1": norm}
    variables = {**float_variables, "params": {**float_variables["params"], "block": block}}
    equal = equalize(small_net(), variables, batches[0])
    before, after = (largest(v, small_net(), "block/norm1", batches[0]) for v in (variables, equal))
    assert after.max() <= before.max() * 1.001 and after[3] > 1.5 * before[3] * (gain < 1)


@pytest.mark.parametrize("options", [{}, dict(use_scale=False), dict(use_bias=False)])
def test_norms_may_have_no_scale_or_bias(batches, options):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = Conv(4, (3, 3), name="first")(x)
            x = nn.BatchNorm(use_running_average=not train, name="norm", **options)(x)
            x = Conv(4, (3, 3), name="second")(Activation(name="act")(x))
            return Conv(4, (3, 3), name="third")(Activation(name="act2")(x))

    variables = Net().init(jax.random.key(0), batches[0], train=False)
    equal = equalize(Net(), variables, batches[0])
    norms = [v["params"].get("norm", {}) for v in (equal, variables)]
    same = jax.tree.all(jax.tree.map(np.array_equal, *norms))
    assert same == (options == dict(use_scale=False))  # By what a norm cannot be divided, it is not.
    expected, found = (Net().apply(v, batches[1], train=False) for v in (variables, equal))
    np.testing.assert_allclose(found, expected, atol=1e-4)
