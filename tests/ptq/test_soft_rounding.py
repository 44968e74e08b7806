"""Learned rounding between the neighbours on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.ptq.soft_rounding import hard_value, indecision, initial_choice, neighbours, soft_value, up
from qflax.quantizers import Minifloat, MixedPrecision, Uniform, calibrate, quantizer_of

SPECS = {
    "uniform": Uniform(bits=4, granularity="per_channel", scale="static"),
    "full range": Uniform(bits=3, narrow=False, scale="static"),
    "bipolar": Uniform(bits=1, scale="static"),
    "e3m2": Minifloat(exponent_bits=3, mantissa_bits=2, scale="static", granularity="per_channel"),
    "e4m3": Minifloat(exponent_bits=4, mantissa_bits=3, specials="nan"),
    "mixed": MixedPrecision(bits=4, granularity="per_channel"),
}
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 6)), jnp.float32)


@pytest.fixture(params=SPECS)
def grid(request):
    quantizer = quantizer_of(SPECS[request.param], weights=True)
    model = quantizer.clone(name="weights")
    variables = calibrate(model, model.init(jax.random.key(0), KERNEL), [KERNEL])
    return model.apply(variables, KERNEL)


def points_of(grid):
    """All points of a channel's grid, ascending, [points, channels]."""
    if hasattr(grid.format, "values"):
        positive = np.float32(grid.format.values)
        codes = np.concatenate([-positive[::-1], positive])
    elif getattr(grid.format, "bipolar", False):
        codes = np.float32([-1, 1])
    else:
        codes = np.arange(int(np.min(grid.format.lowest)), int(np.max(grid.format.highest)) + 1)
    return np.float32(codes)[:, None] * np.broadcast_to(grid.scale, KERNEL.shape[-1:])


def test_neighbours_enclose_the_value_with_nothing_between(grid):
    low, high = (np.asarray(side) for side in neighbours(KERNEL, grid))
    points, x = points_of(grid), np.asarray(KERNEL)
    ends = points.min(0), points.max(0)
    inside = np.clip(x, *ends)
    assert np.all(low <= inside + 1e-6) and np.all(inside <= high + 1e-6)
    for channel in range(x.shape[-1]):
        for side in (low, high):
            distance = np.abs(points[:, channel, None] - side[..., channel].reshape(-1)).min(0)
            assert np.max(distance) <= 1e-6
        between = (points[:, channel, None] > low[..., channel].reshape(-1) + 1e-6) & (
            points[:, channel, None] < high[..., channel].reshape(-1) - 1e-6
        )
        assert not between.any()


def test_a_choice_starts_where_the_value_is_and_ends_on_a_neighbour(grid):
    low, high = neighbours(KERNEL, grid)
    choice = initial_choice(KERNEL, low, high)
    share = (KERNEL - low) / jnp.where(high > low, high - low, 1)
    plain = (share > 0.01) & (share < 0.99) & (high > low)
    np.testing.assert_allclose(soft_value(choice, low, high)[plain], KERNEL[plain], atol=1e-5)
    hard = hard_value(choice, low, high)
    assert jnp.all((hard == low) | (hard == high))
    nearest = jnp.where(high - KERNEL < KERNEL - low, high, low)
    clear = plain & (jnp.abs(share - 0.5) > 1e-3)
    np.testing.assert_array_equal(hard[clear], nearest[clear])


def test_the_regularizer_is_zero_for_choices_that_are_made():
    assert indecision(jnp.asarray([-10.0, 10.0]), 2.0) == 0
    np.testing.assert_allclose(indecision(jnp.zeros(3), 2.0), 3.0, atol=1e-6)
    assert up(jnp.asarray(-10.0)) == 0 and up(jnp.asarray(10.0)) == 1
    gradient = jax.grad(lambda v: indecision(v, 3.0))(jnp.asarray([-0.5, 0.5]))
    assert gradient[0] > 0 > gradient[1]  # Descent moves each away from the middle.
