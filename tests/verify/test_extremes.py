"""Bounds on accumulators are exact."""

import itertools

import numpy as np
import pytest

from qflax.verify.extremes import IntegerLayer, width, wrapped_sum
from qflax.verify.network import Node


def layer(codes, x_low, x_high, bias=None, promised=None):
    operation = {2: "dense", 4: "conv"}[np.ndim(codes)]
    node = Node(operation=operation, inputs=(0, 1), output=2, attributes={}, layer="", promised=promised)
    made = IntegerLayer(
        node=node, codes=np.array(codes), weight_bits=4, x_low=x_low, x_high=x_high, scale=np.ones(1)
    )
    if bias is not None:
        made.bias_low, made.bias_high = np.minimum(bias, 0).tolist(), np.maximum(bias, 0).tolist()
    return made


@pytest.mark.parametrize(
    "low, high, bits",
    [
        (0, 0, 1),
        (-1, 0, 1),
        (0, 1, 2),
        (-2, 1, 2),
        (-2048, 2047, 12),
        (-2049, 0, 13),
        (0, 2048, 13),
        (3, 4, 4),
    ],
)
def test_width(low, high, bits):
    assert width(low, high) == bits


def test_wrapping():
    assert wrapped_sum([7, 1], 4) == -8 and wrapped_sum([-8, -1], 4) == 7 and wrapped_sum([7, 1, -3], 4) == 5


@pytest.mark.parametrize("x_low, x_high", [(0, 3), (-2, 1), (-1, 0)])
@pytest.mark.parametrize("bias", [[0, 0], [9, -9]])
def test_extremes_are_those_of_all_inputs_and_all_partial_sums(x_low, x_high, bias):
    codes = np.random.default_rng(3).integers(-3, 4, (3, 2))
    low, high = layer(codes, x_low, x_high, bias).extremes()
    for channel in range(2):
        seen = set()
        for x in itertools.product(range(x_low, x_high + 1), repeat=3):
            products = [a * int(b) for a, b in zip(x, codes[:, channel], strict=True)]
            for terms in ([*products, bias[channel]], [bias[channel], *products]):
                seen |= set(itertools.accumulate(terms, initial=0))
        assert (min(seen), max(seen)) == (low[channel], high[channel])


def test_extremes_are_attained_if_the_accumulator_is_wide_enough():
    for shape in ((20, 3), (3, 3, 4, 5)):
        codes = np.random.default_rng(1).integers(-7, 8, shape)
        bias = np.random.default_rng(2).integers(-90, 90, shape[-1])
        low, high = layer(codes, 0, 15, bias).extremes()
        needed = width(min(low), max(high))
        assert layer(codes, 0, 15, bias, promised=needed).attained()
        assert not layer(codes, 0, 15, bias, promised=needed - 1).attained()


def test_a_bias_does_not_make_up_for_sums_that_overflow():
    assert not layer([[4]], 0, 2, bias=[-1], promised=4).attained()  # 8 - 1.
    assert layer([[4]], 0, 2, bias=[-1], promised=5).attained()


def test_sums_beyond_64_bits_are_exact():
    codes = np.full((2**10, 1), 2**31 - 1)
    low, high = layer(codes, -(2**31), 2**31 - 1).extremes()
    assert low == [-(2**31) * (2**31 - 1) * 2**10] and high == [(2**31 - 1) ** 2 * 2**10]


CASES = ["c16x32.a2qplus_w4u4p12.naive", "fc72x10.a2qplus_w4u8p14.ep", "pw64x128.a2q_w8u8p15.ep"]


@pytest.mark.parametrize("name", CASES)
def test_rounded_accumulator_aware_weights_do_not_hold(golden, name):
    """Exports of these weights must not round again what was truncated."""
    shape, case, _ = name.split(".")
    vectors = golden("a2q_small")
    case, made = vectors.case(f"{shape}.{case}"), vectors.case(name)
    weights = made["v"] if "v" in made else vectors[f"{shape}.v"]
    weights = (weights - (made["mean"] if "mean" in made else 0)) / made["pre_scale"]  # noqa: SIM401
    bits, highest = int(case["acc_bits"]), 2 ** int(case["input_bits"]) - 1
    low, high = layer(made["codes"], 0, highest).extremes()
    assert low == made["acc_min"].tolist() and high == made["acc_max"].tolist()
    assert width(min(low), max(high)) <= bits
    threshold = 2 ** (int(case["weight_bits"]) - 1) - 1
    rounded = np.clip(np.rint(weights), -threshold, threshold).astype(np.int64)
    low, high = layer(rounded, 0, highest).extremes()
    assert width(min(low), max(high)) > bits
