"""Learned rounding of layers (AdaRound) and blocks (BRECQ, QDrop)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Conv, Dense
from qflax.ptq.parts import block_parts, layer_parts
from qflax.ptq.reconstruction import Reconstruction, reconstruct
from qflax.ptq.taps import capturing
from qflax.quantizers import (
    Minifloat,
    MixedPrecision,
    Quantization,
    Uniform,
    calibrate,
    freeze_widths,
)

WEIGHTS = Uniform(bits=3, granularity="per_channel", statistic="mse")
POLICY = Quantization(weights=WEIGHTS, activations=Uniform(bits=4, statistic="mse"))
QUICK = Reconstruction(iterations=100, batch_size=16, learning_rate=0.05)


def start(small_net, policy, float_variables, batches):
    model = small_net(policy)
    variables = {**model.init(jax.random.key(0), batches[0], train=False), **float_variables}
    variables = calibrate(model, variables, batches, train=False)
    return model, {**variables, "quantizer_stats": freeze_widths(variables["quantizer_stats"])}


def error(model, variables, small_net, float_variables, batches, path):
    goal = capturing(small_net(), outputs=[path])(float_variables, batches[0])[1][path]
    return float(jnp.mean((capturing(model, outputs=[path])(variables, batches[0])[1][path] - goal) ** 2))


@pytest.mark.parametrize(
    ("parts_of", "drop"), [pytest.param(layer_parts, 0.0, marks=pytest.mark.thorough), (block_parts, 0.5)]
)
def test_outputs_come_nearer_to_the_float_network_s(small_net, float_variables, batches, parts_of, drop):
    model, variables = start(small_net, POLICY, float_variables, batches)
    parts, told = parts_of(model, small_net(), variables, batches[0][:1]), []
    settings = dataclasses.replace(QUICK, drop=drop)
    arguments = small_net(), float_variables, batches, parts, settings, told.append
    new = reconstruct(model, variables, *arguments)
    assert told == [f"{part.start} ({i + 1} of {len(parts)})" for i, part in enumerate(parts)]
    for path in ("block", "classifier"):
        before, after = (error(model, v, small_net, float_variables, batches, path) for v in (variables, new))
        assert after < 0.75 * before, path
    learned = [not np.array_equal(*pair) for pair in _scales(variables, new)]
    assert any(learned) == (parts_of is block_parts)  # A layer's ranges are not its business.
    for name in ("stem", "hidden"):
        np.testing.assert_array_equal(
            variables["quantizer_params"][name]["weights"]["scale"],
            new["quantizer_params"][name]["weights"]["scale"],
        )


def _scales(*trees):
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(t["quantizer_params"]) for t in trees), strict=True)
    return [(a, b) for (path, a), (_, b) in pairs if path[-2].key == "activations"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "spec",
    [
        Uniform(bits=4, scale="statistic", granularity="per_channel"),
        Minifloat(exponent_bits=3, mantissa_bits=2, scale="statistic", granularity="per_channel"),
        Minifloat(exponent_bits=4, mantissa_bits=3, specials="nan"),
        MixedPrecision(bits=3, granularity="per_channel"),
        Uniform(bits=1, scale="lsq"),
    ],
    ids=lambda spec: f"{type(spec).__name__}-{getattr(spec, 'scale', '')}",
)
def test_kernels_of_every_kind_end_next_to_where_they_were_and_stay_there(spec):
    """The quantizer maps the result to itself, bit for bit; no weight moved further than to a neighbour."""
    model, reference = Single(Quantization(weights=spec)), Single()
    x = [np.random.default_rng(1).normal(size=(32, 12)).astype(np.float32)]
    variables = model.init(jax.random.key(0), x[0], train=False)
    original = variables["params"]["layer"]["kernel"]
    variables = calibrate(model, variables, x, train=False)
    variables = {**variables, "quantizer_stats": freeze_widths(variables.get("quantizer_stats", {}))}
    parts = layer_parts(model, reference, variables, x[0][:1])
    new = reconstruct(model, variables, reference, {"params": variables["params"]}, x, parts, QUICK)
    kernel = new["params"]["layer"]["kernel"]

    def keep(module, _):
        return module.name == "weights"

    state = model.apply(new, x[0], train=False, capture_intermediates=keep, mutable=["intermediates"])[1]
    quantized = state["intermediates"]["layer"]["weights"]["__call__"][0]
    np.testing.assert_array_equal(quantized.value, kernel)
    assert not np.array_equal(kernel, original)
    if isinstance(spec, Uniform) and spec.bits > 1:
        assert np.max(np.abs(kernel - original) / quantized.scale) < 1 + 1e-5


class Single(nn.Module):
    """One dense layer."""

    quantization: Quantization = Quantization()

    @nn.compact
    def __call__(self, x, *, train):
        del train
        return Dense(6, name="layer", quantization=self.quantization)(x)


@pytest.mark.parametrize(
    "spec", [Uniform(bits=4, scale="statistic", statistic="mean"), Uniform(bits=2, scale="dorefa")]
)
def test_a_scale_that_follows_the_kernel_is_refused(spec):
    model, x = Single(Quantization(weights=spec)), [np.ones((8, 12), np.float32)]
    variables = model.init(jax.random.key(0), x[0], train=False)
    parts = layer_parts(model, Single(), variables, x[0][:1])
    reference = {"params": variables["params"]}
    with pytest.raises(UserError, match="layer: .*rounded again; give them a scale of 'static'") as error:
        reconstruct(model, variables, Single(), reference, x, parts, dataclasses.replace(QUICK, iterations=2))
    assert "\n" not in str(error.value)


class Bypass(nn.Module):
    """A block that gets a second array behind the first one."""

    quantization: Quantization = Quantization()

    @nn.compact
    def __call__(self, x, *, train):
        del train
        y = Conv(4, (3, 3), name="first", quantization=self.quantization)(x)
        return jnp.mean(Second(self.quantization, name="second")(y, x), (1, 2))


class Second(nn.Module):
    quantization: Quantization

    @nn.compact
    def __call__(self, y, x):
        return Conv(4, (3, 3), name="conv", quantization=self.quantization)(y) + x[..., :1]


@pytest.mark.thorough
def test_a_block_with_a_second_input_is_refused_and_its_layers_are_not(batches):
    policy = Quantization(weights=WEIGHTS)
    model, reference = Bypass(policy), Bypass()
    variables = model.init(jax.random.key(0), batches[0], train=False)
    variables = calibrate(model, variables, batches, train=False)
    weights = {"params": variables["params"]}
    short = dataclasses.replace(QUICK, iterations=2)
    parts = block_parts(model, reference, variables, batches[0][:1])
    with pytest.raises(UserError, match="second: .*depends on more than .*use 'adaround'"):
        reconstruct(model, variables, reference, weights, batches, parts, short)
    parts = layer_parts(model, reference, variables, batches[0][:1])
    assert [part.start for part in parts] == ["first", "second/conv"]
    reconstruct(model, variables, reference, weights, batches, parts, short)
