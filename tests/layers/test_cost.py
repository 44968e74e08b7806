"""Layers report what they cost; counts agree with counting by hand."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import COST, Activation, Add, Conv, Dense, LayerCost, layer_costs
from qflax.layers.cost import sizes, sown_costs
from qflax.quantizers import MixedPrecision, Quantization, Rule, Uniform, calibrate, value_of

EXAMPLE = np.zeros((1, 8, 8, 3), np.float32)


class Net(nn.Module):
    """Names out of alphabetical order."""

    quantization: Quantization = Quantization()

    @nn.compact
    def __call__(self, x):
        policy = {"quantization": self.quantization}
        x = Conv(6, (3, 3), strides=2, name="z_conv", **policy)(x)
        x = Activation(name="m_act", **policy)(x)
        y = Conv(6, (3, 5), feature_group_count=3, use_bias=False, name="b_depth", **policy)(x)
        x = Add(name="y_add", **policy)(y, x)
        return Dense(10, name="a_dense", **policy)(jnp.mean(value_of(x), axis=(1, 2)))


FLOAT = Quantization()


def costs_of(quantization=FLOAT):
    model = Net(quantization)
    shapes = jax.eval_shape(model.init, jax.random.key(0), EXAMPLE)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    return layer_costs(model, variables, EXAMPLE)


def test_counts_of_every_kind_of_layer():
    conv, act, depth, add, dense = costs_of()
    assert (conv.kind, conv.weights, conv.biases, conv.macs) == ("conv", 3 * 3 * 3 * 6, 6, 16 * 162)
    assert (act.kind, act.activations, act.weights, act.macs) == ("activation", 4 * 4 * 6, 0, 0)
    assert (depth.kind, depth.weights, depth.biases, depth.macs) == ("conv", 3 * 5 * 2 * 6, 0, 16 * 180)
    assert (add.kind, add.activations) == ("activation", 0)  # A float sum is not stored.
    assert (dense.kind, dense.weights, dense.biases, dense.macs) == ("dense", 60, 10, 60)


def test_dense_counts_one_product_for_each_position():
    x = np.zeros((1, 5, 4), np.float32)
    (cost,) = layer_costs(Dense(3), Dense(3).init(jax.random.key(0), x), x)
    assert cost.macs == 5 * 4 * 3


@pytest.mark.parametrize("abstract", [False, True])
def test_order_is_the_network_s(abstract):
    model = Net()
    init = lambda: model.init(jax.random.key(0), EXAMPLE)  # noqa: E731
    costs = layer_costs(model, jax.eval_shape(init) if abstract else init(), EXAMPLE)
    assert [cost.path for cost in costs] == ["z_conv", "m_act", "b_depth", "y_add", "a_dense"]
    product, biased = ("weights", "outputs"), ("weights", "outputs", "biases")
    assert [cost.roles for cost in costs] == [biased, ("activations",), product, ("activations",), biased]


def test_a_layer_that_is_called_twice_computes_and_stores_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv, act = Conv(3, (1, 1), name="conv"), Activation(name="act")
            return act(conv(act(conv(x))))

    costs = layer_costs(Twice(), Twice().init(jax.random.key(0), EXAMPLE), EXAMPLE)
    pixels = math.prod(EXAMPLE.shape[1:3])
    assert [(c.path, c.weights, c.biases, c.macs, c.activations) for c in costs] == [
        ("conv", 9, 3, 9 * pixels, 0),
        ("conv", 0, 0, 9 * pixels, 0),
        ("act", 0, 0, 0, 3 * pixels),
        ("act", 0, 0, 0, 3 * pixels),
    ]


@pytest.mark.parametrize("abstract", [False, True])
def test_a_repeated_layer_has_a_cost_for_each_repetition(abstract):
    """Learned widths of their own among them."""
    quantization = Quantization(weights=MixedPrecision(bits=4), activations=Uniform(bits=3))
    axes = dict(variable_axes={True: 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
    model = nn.vmap(Dense, **axes)(5, quantization=quantization, quantize_input=True)
    x = np.ones((1, 4), np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    variables["quantizer_params"]["weights"]["step"] /= jnp.asarray([1, 4])
    given = jax.eval_shape(lambda: variables) if abstract else variables
    costs = [cost for cost in layer_costs(model, given, x) if cost.kind == "dense"]
    assert [(cost.weights, cost.biases, cost.macs) for cost in costs] == 2 * [(20, 5, 20)]
    if not abstract:
        assert [cost.weight_bits for cost in costs] == [4, 6]
        assert all(cost.accumulation.exact_bits > 2 for cost in costs)
        assert sizes(costs)["weight_kib"] == (20 * (4 + 6) + 2 * 5 * 32) / 8 / 1024


def test_quantized_outputs_are_stored_and_integer_biases_have_their_bits():
    quantization = Quantization(
        weights=Uniform(bits=4),
        activations=Uniform(bits=3),
        outputs=Uniform(bits=5),
        rules=(Rule("z_conv", {"outputs": None}), Rule("b_depth", {"outputs": {"bits": 7}})),
    )
    conv, _, depth, _, dense = costs_of(quantization)
    assert (conv.activations, depth.activations, dense.activations) == (0, 4 * 4 * 6, 10)
    assert (depth.activation_bits, dense.activation_bits) == (7, 5)
    cost = LayerCost("a", "dense", ("weights",), weights=100, biases=10, weight_bits=4, bias_bits=16)
    assert cost.weight_bytes == 100 * 4 / 8 + 10 * 2


def test_bits_are_those_of_the_quantizers_and_their_inputs():
    rules = (Rule("z_conv", {"weights": {"bits": 8}}), Rule("*add", {"activations": {"bits": 6}}))
    conv, act, depth, add, dense = costs_of(
        Quantization(weights=Uniform(bits=4), activations=Uniform(bits=3), rules=rules)
    )
    assert [c.weight_bits for c in (conv, depth, dense)] == [8, 4, 4]
    assert [c.input_bits for c in (conv, depth, dense)] == [32, 3, 32]
    assert (act.activation_bits, add.activation_bits) == (3, 6)
    assert add.activations == 2 * 4 * 4 * 6  # Both branches are stored.


def test_bytes_and_bit_operations():
    cost = LayerCost(
        "a", "conv", ("weights",), 100, 10, 1000, 50, weight_bits=4, input_bits=3, activation_bits=6
    )
    assert cost.weight_bytes == 100 * 4 / 8 + 10 * 4
    assert cost.activation_bytes == 50 * 6 / 8
    assert cost.bit_operations == 1000 * 4 * 3


def test_bit_operations_of_a_large_float_layer_do_not_overflow():
    x = np.zeros((1, 64, 64, 16), np.float32)
    model = Conv(16, (3, 3), use_bias=False)
    variables = {"params": {"kernel": jnp.zeros((3, 3, 16, 16))}}
    (cost,) = layer_costs(model, variables, x)
    assert cost.bit_operations == 64 * 64 * 9 * 256 * 1024 > 2**31


def test_costs_are_sown_only_on_request():
    model = Net()
    variables = model.init(jax.random.key(0), EXAMPLE)
    assert COST not in variables
    assert not isinstance(model.apply(variables, EXAMPLE), tuple)
    _, state = model.apply(variables, EXAMPLE, mutable=[COST])
    assert len(sown_costs(state)) == 5
    assert sown_costs({}) == ()


def test_counts_do_not_depend_on_the_batch():
    model = Net()
    variables = model.init(jax.random.key(0), EXAMPLE)
    assert layer_costs(model, variables, np.zeros((3, 8, 8, 3), np.float32)) == layer_costs(
        model, variables, EXAMPLE
    )
