"""The integer runner: int32 sums, accumulators that wrap or are checked."""

import jax
import numpy as np
import pytest
from networks import INTEGER, LAYERS, images

from qflax.deploy import runner as runner_lib
from qflax.deploy.ranges import integer_ranges
from qflax.deploy.runner import IntegerRunner
from qflax.errors import UserError

X = images(30, seed=3)


@pytest.fixture
def network(trained, lowered):
    """Name of a policy -> graph, and what the trained network gives for `X`."""

    def get(name):
        function, variables = trained(name)
        return lowered(name), np.asarray(jax.jit(function)(variables, X))

    return get


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
    with pytest.raises(UserError, match="accumulators='saturate'"):
        IntegerRunner(graph, accumulators="saturate")
    with pytest.raises(UserError, match="bits=40: an accumulator has 2 to 32 bits"):
        IntegerRunner(graph, bits=40)
