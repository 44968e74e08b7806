"""The integer runner: exact sums, accumulators that wrap, saturate or are checked."""

import jax
import numpy as np
import pytest
from networks import INTEGER, LAYERS, images

from qflax.deploy import runner as runner_lib
from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.ranges import integer_ranges
from qflax.deploy.runner import IntegerRunner
from qflax.errors import UserError
from qflax.numerics import IntegerFormat

pytestmark = pytest.mark.exact

X = images(30, seed=3)


def dense(kernel, bias=None, *, bits, promised=None, shape=None):
    """The graph of a layer with unsigned inputs and signed weights of so many bits; outputs are its sums.

    Args:
      kernel: codes [in, out].
      bias: integers, added behind a reshape to `shape` where there is one.
      promised: accumulator bits.
    """
    floats = {"one": np.float32(1), "zero": np.float32(0)}
    constants = {name: Constant(array=array) for name, array in floats.items()}
    weights = IntegerFormat(bits=bits, signed=True)
    constants["kernel"] = Constant(array=np.float32(kernel), format=weights, accumulator_bits=promised)
    grid = {"format": IntegerFormat(bits=bits, signed=False), "rounding": "half_even"}
    last = "sums"
    nodes = [
        Node(operation="quantize", inputs=("input", "one", "zero"), output="codes", attributes=grid),
        Node(operation="dense", inputs=("codes", "kernel"), output="sums", layer="head"),
    ]
    if shape is not None:
        nodes.append(
            Node(operation="reshape", inputs=(last,), output="shaped", attributes={"shape": (-1, *shape)})
        )
        last = "shaped"
    if bias is not None:
        constants["bias"] = Constant(array=np.float32(bias), format=IntegerFormat(bits=32, signed=True))
        nodes.append(Node(operation="add", inputs=("bias", last), output="biased"))
        last = "biased"
    return Graph(input="input", shape=(len(kernel),), output=last, nodes=tuple(nodes), constants=constants)


@pytest.fixture
def network(trained, lowered):
    """Name of a policy -> graph, and what the trained network gives for `X`."""

    def get(name):
        function, variables = trained(name)
        return lowered(name), np.asarray(jax.jit(function)(variables, X))

    return get


@pytest.mark.thorough
@pytest.mark.parametrize("name", INTEGER)
def test_integer_units_and_float_units_agree(network, name, monkeypatch):
    graph, expected = network(name)
    np.testing.assert_array_equal(IntegerRunner(graph)(X), expected)
    monkeypatch.setattr(runner_lib, "EXACT_IN_FLOAT32", 0)
    integers = IntegerRunner(graph)
    np.testing.assert_array_equal(integers(X.astype(np.uint8)), expected)


def test_extremes_are_within_the_bounds_and_grow(network):
    graph, _ = network("int4")
    run, ranges = IntegerRunner(graph), integer_ranges(graph)
    run(X[:2])
    first = dict(run.extremes)
    run(X)
    assert tuple(run.extremes) == LAYERS
    for node in graph.nodes:
        if node.operation in ("conv", "dense"):
            low, high = run.extremes[node.layer]
            assert ranges[node.output][0] <= low <= first[node.layer][0]
            assert first[node.layer][1] <= high <= ranges[node.output][1]
    assert run.extremes != first


def test_promised_accumulators_wrap_to_the_same_bits_and_others_break(network):
    graph, expected = network("a2q+")
    np.testing.assert_array_equal(IntegerRunner(graph, accumulators="wrap")(X), expected)
    np.testing.assert_array_equal(IntegerRunner(graph, accumulators="check")(X), expected)
    graph, expected = network("int4")
    np.testing.assert_array_equal(IntegerRunner(graph, accumulators="wrap")(X), expected)
    wrapped = IntegerRunner(graph, accumulators="wrap", bits=9)
    assert np.mean(np.argmax(wrapped(X), 1) != np.argmax(expected, 1)) > 0.3
    with pytest.raises(UserError, match="stem: sums from .* leave an accumulator of 9 bits"):
        IntegerRunner(graph, accumulators="check", bits=9)(X)


def test_check_is_of_partial_sums_in_the_worst_order(network):
    graph, _ = network("int4")
    exact, check = IntegerRunner(graph), IntegerRunner(graph, accumulators="check")
    exact(X), check(X)
    for layer, (low, high) in exact.extremes.items():
        worst = check.extremes[layer]
        assert worst[0] <= low and high <= worst[1]
    assert check.extremes["stem"] != exact.extremes["stem"]


def test_wrong_choices_are_told(network):
    graph, _ = network("int4")
    with pytest.raises(UserError, match="accumulators='wraps'"):
        IntegerRunner(graph, accumulators="wraps")
    with pytest.raises(UserError, match="bits=65: an accumulator has 2 to 64 bits"):
        IntegerRunner(graph, bits=65)


@pytest.mark.parametrize("shape", [None, (1, 2)])
def test_integer_biases_are_in_the_accumulator(shape):
    kernel, biases, x = np.array([[7, -8], [-3, 2]]), np.array([100, -30]), np.array([[15, 4], [0, 15]])
    graph = dense(kernel, biases if shape is None else biases.reshape(shape), bits=4, shape=shape)
    sums, out = x @ kernel + biases, (-1, *(shape or (2,)))

    def run(mode, bits):
        runner = IntegerRunner(graph, accumulators=mode, bits=bits)
        return runner(np.float32(x)), runner.extremes["head"]

    for bits in (6, 7, 8):
        half = 2 ** (bits - 1)
        np.testing.assert_array_equal(run("wrap", bits)[0], ((sums + half) % (2 * half) - half).reshape(out))
        np.testing.assert_array_equal(run("saturate", bits)[0], sums.clip(-half, half - 1).reshape(out))
    # The products alone need 8 bits, and with the biases, added first or last, they reach from -150 to 205.
    assert np.abs(x @ kernel).max() < 2**7 <= np.abs(sums).max()
    y, extremes = run("check", 9)
    np.testing.assert_array_equal(y, sums.reshape(out))
    assert extremes == (-150, 205)
    assert run("exact", None)[1] == (min(sums.min(), (x @ kernel).min()), sums.max())
    with pytest.raises(UserError, match="head: sums from -150 to 205 leave an accumulator of 8 bits"):
        run("check", 8)


def test_sums_beyond_32_bits_are_exact_and_seen():
    graph = dense(np.full((64, 1), 2**15 - 1), bits=16)
    x = np.full((1, 64), 2**16 - 1, np.float32)
    total = 64 * (2**15 - 1) * (2**16 - 1)
    run = IntegerRunner(graph)
    assert run(x).item() == np.float32(total) and run.extremes == {"head": (0, total)}
    with pytest.raises(UserError, match=f"head: sums from 0 to {total} leave an accumulator of 32 bits"):
        IntegerRunner(graph, accumulators="check")(x)
    wrapped = (total + 2**31) % 2**32 - 2**31
    assert IntegerRunner(graph, accumulators="wrap")(x).item() == wrapped != total
    assert IntegerRunner(graph, accumulators="saturate", bits=36)(x).item() == 2**35
    assert not jax.config.jax_enable_x64
    with pytest.raises(UserError, match="head: its integers need 66 bits, and there are 64"):
        IntegerRunner(dense(np.full((16, 1), -(2**30)), bits=31))


@pytest.mark.parametrize("bits", [4, 16])
def test_promises_beyond_32_bits_are_kept(bits):
    kernel = np.full((64, 1), 2 ** (bits - 1) - 1)
    x = np.full((1, 64), 2**bits - 1, np.float32)
    exact = IntegerRunner(dense(kernel, bits=bits))(x)
    for mode in ("wrap", "saturate", "check"):
        for promised in (40, 64):
            graph = dense(kernel, bits=bits, promised=promised)
            assert IntegerRunner(graph, accumulators=mode)(x) == exact != 0
