"""The projection onto the L1 ball is the nearest point in it."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflax.numerics import project_onto_l1_ball

pytestmark = pytest.mark.exact


def by_bisection(x, radius):
    """Soft thresholding in float64 by the threshold that bisection finds."""
    x = np.float64(x)
    if np.abs(x).sum() <= radius:
        return x
    low, high = 0.0, np.abs(x).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(x) - middle, 0).sum() > radius else (low, middle)
    return np.sign(x) * np.maximum(np.abs(x) - high, 0)


@given(st.integers(0, 2**31), st.floats(-3, 3), st.sampled_from([(1, 3), (9, 4), (3, 3, 8, 5)]))
def test_is_soft_thresholding_to_the_norm(seed, log10_radius, shape):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    radius = np.float32(10**log10_radius * rng.uniform(0.5, 2, shape[-1]))
    y = np.asarray(jax.jit(project_onto_l1_ball)(x, radius))
    for i in range(shape[-1]):
        expected = by_bisection(x[..., i].ravel(), radius[i])
        np.testing.assert_allclose(y[..., i].ravel(), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(np.float64(y[..., i])).sum() <= radius[i] * (1 + 1e-5)


def test_within_the_ball_nothing_moves_by_a_bit():
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    np.testing.assert_array_equal(project_onto_l1_ball(x, np.float32(100)), x)


@pytest.mark.parametrize("x", [np.zeros((4, 2)), np.ones((4, 2)), np.array([[5.0, 5.0], [0.0, 5.0]])])
def test_ties_zeros_and_an_empty_ball(x):
    x = np.float32(x)
    np.testing.assert_array_equal(project_onto_l1_ball(x, np.zeros(2, np.float32)), np.zeros_like(x))
    y = np.asarray(project_onto_l1_ball(x, np.ones(2, np.float32)))
    np.testing.assert_allclose(np.abs(y).sum(0), np.minimum(np.abs(x).sum(0), 1), rtol=1e-6)
