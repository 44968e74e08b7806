"""Bounds on accumulators, from types, norms and integers."""

import math

import numpy as np
import pytest

from qflax.numerics import accumulator_extremes, data_type_width, norm_width, width_of_extremes

pytestmark = pytest.mark.exact


@pytest.mark.parametrize(
    "low,high,bits",
    [(0, 0, 1), (-1, 0, 1), (0, 1, 2), (-2, 1, 2), (-3, 0, 3), (-128, 127, 8), (-129, 0, 9), (0, 2**40, 42)],
)
def test_width_of_extremes(low, high, bits):
    assert width_of_extremes(low, high) == bits


@pytest.mark.parametrize("depth", [1, 27, 72, 576, 4608])
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize("input_bits", [1, 4, 8])
@pytest.mark.parametrize("signed", [0, 1])
def test_data_type_width_is_the_paper_s_formula(depth, weight_bits, input_bits, signed):
    a = math.log2(depth) + input_bits + weight_bits - 1 - signed
    expected = math.ceil(a + math.log2(1 + 2**-a) + 1 - 1e-12)
    assert data_type_width(depth, weight_bits, input_bits, bool(signed)) == expected


def test_bounds_get_tighter_and_the_exact_one_is_attained():
    rng = np.random.default_rng(0)
    for _ in range(200):
        bits, input_bits, signed = rng.integers(2, 9), rng.integers(2, 9), bool(rng.integers(2))
        w = rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), rng.integers(1, 100))
        positive, negative = int(w[w > 0].sum()), int(-w[w < 0].sum())
        x_min, x_max = (
            (-(2 ** (input_bits - 1)), 2 ** (input_bits - 1) - 1) if signed else (0, 2**input_bits - 1)
        )
        low, high = accumulator_extremes(positive, negative, int(x_min), int(x_max))
        assert high == np.sum(np.where(w > 0, x_max, x_min) * w)
        assert low == np.sum(np.where(w > 0, x_min, x_max) * w)
        exact, norm = width_of_extremes(low, high), norm_width(positive + negative, int(input_bits), signed)
        assert exact <= norm <= data_type_width(len(w), int(bits), int(input_bits), signed)
        assert exact == 1 or low < -(2 ** (exact - 2)) or high > 2 ** (exact - 2) - 1  # And no bit less.


def test_unsigned_weights_may_be_twice_as_large():
    assert data_type_width(10, 4, 4, False, weight_signed=False) == norm_width(10 * 16, 4, False) == 13
    assert data_type_width(10, 4, 4, False) == 12
