"""Integer-only networks: no floats between the pixels and the last scale, and nearly all codes the same."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from networks import INPUT, images, value

from qflax.deploy.lowering import lower
from qflax.deploy.ranges import integer_ranges
from qflax.deploy.rescaling import integer_only
from qflax.deploy.runner import IntegerRunner, execute
from qflax.errors import UserError
from qflax.layers import Dense, Quantize
from qflax.quantizers import Quantization, Uniform, calibrate

pytestmark = pytest.mark.exact

X = images(50, seed=4)
INTEGER_ONLY = ("int4", "per channel", "zero points", "mixed", "a2q+")


@pytest.mark.parametrize("name", INTEGER_ONLY)
def test_codes_are_the_same_but_for_roundings(lowered, name):
    graph = lowered(name)
    only = integer_only(graph)
    quantizers = [node.output for node in graph.nodes if node.operation == "quantize"]
    expected = jax.jit(lambda x: execute(graph, x)[0])(X)
    with jax.enable_x64(True):
        values = jax.jit(lambda x: execute(only, x)[0])(X)
    different = [np.asarray(values[q]) != np.asarray(expected[q]) for q in quantizers]
    # Rounding half up instead of to even, and multipliers of 31 bits.
    assert sum(d.sum() for d in different) <= 1e-3 * sum(d.size for d in different)
    for q in quantizers[:2]:
        assert np.max(np.abs(np.asarray(values[q]) - np.asarray(expected[q]))) <= 1


@pytest.mark.parametrize("name", INTEGER_ONLY)
def test_nothing_but_the_last_scale_is_a_float(lowered, name):
    only = integer_only(lowered(name))
    assert not [node for node in only.nodes if node.operation == "quantize"]
    with jax.enable_x64(True):
        ranges = integer_ranges(only)
    floats = [node for node in only.nodes if node.output not in ranges]
    assert {node.layer for node in floats} <= {"classifier", ""} and len(floats) <= 2


def test_the_runner_takes_it_as_an_option(lowered):
    graph = lowered("int4")
    run = IntegerRunner(graph, rescaling="integer")
    expected = np.asarray(IntegerRunner(graph)(X))
    np.testing.assert_allclose(run(X.astype(np.uint8)), expected, atol=0.1 * np.abs(expected).max())
    assert np.mean(np.argmax(run(X.astype(np.uint8)), 1) == np.argmax(expected, 1)) > 0.9
    with pytest.raises(UserError, match="images of whole numbers, and these are float32; pass uint8"):
        run(X)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("name", ["e4m3", "float"])
def test_minifloats_and_floats_are_told_of(lowered, name):
    graph = lowered(name)
    if name == "float":
        assert IntegerRunner(graph, rescaling="integer")(X.astype(np.uint8)).shape == (50, 4)
    else:
        with pytest.raises(UserError, match="rescaling='integer' needs sums of scaled integers"):
            IntegerRunner(graph, rescaling="integer")
    with pytest.raises(UserError, match="rescaling='fixed'"):
        IntegerRunner(graph, rescaling="fixed")


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-30])
def test_sums_that_are_next_to_nothing(size):
    """As behind a norm whose scale is."""
    weights = Uniform(bits=8, scale="static")
    policy = Quantization(weights=weights, activations=Uniform(bits=8, scale="static"), rules=(INPUT,))

    class Dead(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Quantize(name="input", quantization=policy)(x / 128 - 1)
            x = value(Dense(8, quantization=policy, name="first")(x)) * np.float32(size)
            return value(Dense(4, quantize_input=True, quantization=policy, name="last")(x))

    x = np.random.default_rng(0).integers(0, 256, (16, 20)).astype(np.uint8)
    variables = Dead().init(jax.random.key(0), x.astype(np.float32))
    variables = calibrate(Dead(), variables, [x.astype(np.float32)])
    graph = lower(functools.partial(Dead().apply, variables), (20,))
    expected = IntegerRunner(graph)(x)
    scale = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(IntegerRunner(graph, rescaling="integer")(x), expected, atol=0.02 * scale)
