"""Mean outputs of layers after quantization."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, AveragePool, Conv, Dense, MaxPool
from qflax.ptq import correct_biases, correct_biases_analytically
from qflax.quantizers import FLOAT, Quantization, Uniform, calibrate, value_of

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(16, 6, 6, 3)).astype(np.float32) for _ in range(3)]


class Net(nn.Module):
    """Names out of alphabetical order, with a norm."""

    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, x, *, train):
        policy = {"quantization": self.quantization}
        x = Conv(8, (3, 3), name="z_conv", **policy)(x)
        x = Activation(name="act", **policy)(x)
        x = Conv(8, (3, 3), use_bias=False, name="b_conv", **policy)(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
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


@pytest.mark.thorough
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


def test_a_norm_takes_the_shift_of_a_layer_without_a_bias():
    model, variables = start()
    corrected = correct_biases(model, variables, Net(), variables, BATCHES)
    goal, before, after = (
        outputs(network, v, "norm").mean((0, 1, 2))
        for network, v in ((Net(), variables), (model, variables), (model, corrected))
    )
    assert np.max(np.abs(before - goal)) > 1e-2
    np.testing.assert_allclose(after, goal, atol=1e-5)


class Normed(nn.Module):
    """Norm, ReLU and a layer whose weights alone are quantized; with or without padding."""

    quantization: Quantization = FLOAT
    options: Mapping | None = None
    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x, *, train):
        x = Conv(8, (1, 1), use_bias=False, name="first")(x)
        x = self.norm(use_running_average=not train, name="norm")(x)
        x = Activation(name="act")(x)
        return Conv(
            6,
            (3, 3),
            padding=0,
            feature_group_count=2,
            name="second",
            quantization=self.quantization,
            **(self.options or {}),
        )(x)


def test_the_analytic_correction_is_that_of_normal_inputs():
    """With normal inputs, as many as it takes, it is the empirical one up to their sampling error."""
    batches = [RNG.normal(size=(256, 6, 6, 3)).astype(np.float32) for _ in range(4)]
    model, reference = Normed(Quantization(weights=Uniform(bits=2))), Normed()
    variables = model.init(jax.random.key(1), batches[0], train=False)
    params = variables["params"]
    norm = {"scale": jnp.linspace(0.5, 2, 8), "bias": jnp.linspace(-1, 1, 8)}
    variables = {**variables, "params": {**params, "norm": norm}}
    pixels = np.concatenate(batches).reshape(-1, 3) @ np.asarray(params["first"]["kernel"])[0, 0]
    statistics = {"norm": {"mean": pixels.mean(0), "var": pixels.var(0)}}
    variables = calibrate(model, {**variables, "batch_stats": statistics}, batches, train=False)
    arguments = model, variables, reference, variables
    analytic = correct_biases_analytically(*arguments, batches[0][:1])["params"]["second"]["bias"]
    empirical = correct_biases(*arguments, batches)["params"]["second"]["bias"]
    assert np.max(np.abs(empirical)) > 0.1
    np.testing.assert_allclose(analytic, empirical, atol=0.02)


@pytest.mark.parametrize("options", [{"input_dilation": 2}, {"mask": np.ones((3, 3, 4, 6))}])
def test_layers_whose_outputs_leave_out_weights_are_not_corrected_analytically(options):
    model, reference = Normed(Quantization(weights=Uniform(bits=2)), options), Normed(options=options)
    variables = model.init(jax.random.key(1), BATCHES[0], train=False)
    with pytest.raises(UserError, match="use 'bias_correction'"):
        correct_biases_analytically(model, variables, reference, variables, BATCHES[0][:1])


@pytest.mark.parametrize("missing", [["scale"], ["bias"], ["scale", "bias"]])
def test_norms_without_a_scale_or_bias_have_one_and_zero(missing):
    norms = nn.BatchNorm, functools.partial(nn.BatchNorm, **{f"use_{name}": False for name in missing})
    found = []
    for norm in norms:
        model = Normed(Quantization(weights=Uniform(bits=2)), norm=norm)
        variables = model.init(jax.random.key(1), BATCHES[0], train=False)
        arguments = model, variables, Normed(norm=norm), variables, BATCHES[0][:1]
        found.append(correct_biases_analytically(*arguments)["params"]["second"]["bias"])
    np.testing.assert_array_equal(*found)
    assert np.any(found[0])


class Pooled(nn.Module):
    """What lies between a norm and a quantized layer."""

    between: tuple[nn.Module, ...]
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, x, *, train):
        x = Conv(8, (1, 1), use_bias=False, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        for module in self.between:
            x = module(x)
        return Dense(6, name="second", quantization=self.quantization)(x)


@pytest.mark.parametrize(
    ("between", "known"),
    [
        ((Activation, AveragePool), True),
        ((MaxPool, Activation), False),
        ((Activation, MaxPool, AveragePool), False),
        ((AveragePool, Activation), False),
    ],
)
def test_means_are_known_behind_averages_alone(between, known):
    window = {"window": (2, 2), "strides": 2, "padding": ((0, 0), (0, 0))}
    modules = tuple(kind(**window) if kind is MaxPool else kind() for kind in between)
    coarse = Quantization(weights=Uniform(bits=2))
    model, reference = Pooled(modules, coarse), Pooled(modules)
    variables = model.init(jax.random.key(1), BATCHES[0], train=False)
    arguments = model, variables, reference, variables, BATCHES[0][:1]
    if known:
        assert np.any(correct_biases_analytically(*arguments)["params"]["second"]["bias"])
    else:
        with pytest.raises(UserError, match="use 'bias_correction'"):
            correct_biases_analytically(*arguments)


def test_layers_that_are_left_alone_are_told():
    """One that is called twice, whose outputs have two means; nothing is done where there is no other."""

    class Twice(nn.Module):
        quantization: Quantization = FLOAT
        last: bool = True

        @nn.compact
        def __call__(self, x, *, train):
            layer = Dense(3, name="twice", quantization=self.quantization)
            x = value_of(layer(value_of(layer(x))))
            return Dense(4, name="once", quantization=self.quantization)(x) if self.last else x

    coarse = Quantization(weights=Uniform(bits=2))
    for last in (True, False):
        model, reference, told = Twice(coarse, last), Twice(last=last), []
        variables = model.init(jax.random.key(1), BATCHES[0], train=False)
        found = correct_biases(model, variables, reference, variables, BATCHES, told.append)
        assert told == ["bias correction leaves alone twice"]
        changed = [name for name, layer in found["params"].items() if np.any(layer["bias"])]
        assert changed == (["once"] if last else [])


def test_without_a_norm_before_a_layer_nothing_is_known_analytically():
    variables = Plain(Dense(4)).init(jax.random.key(0), BATCHES[0], train=False)
    with pytest.raises(UserError, match="use 'bias_correction'") as error:
        correct_biases_analytically(Plain(Dense(4)), variables, Plain(Dense(4)), variables, BATCHES[0][:1])
    assert "\n" not in str(error.value)
