"""Rounding modes agree with their table, and stochastic rounding is unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import ROUNDING_MODES, round_to_integer

pytestmark = pytest.mark.exact

X = np.array([2.5, -2.5, 1.2, -1.2, 3.5, 0.5, -0.5, 7.0, 0.49999997, 8388607.5], np.float32)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("half_even", [2, -2, 1, -1, 4, 0, 0, 7, 0, 8388608]),
        ("floor", [2, -3, 1, -2, 3, 0, -1, 7, 0, 8388607]),
        ("ceil", [3, -2, 2, -1, 4, 1, 0, 7, 1, 8388608]),
        ("toward_zero", [2, -2, 1, -1, 3, 0, 0, 7, 0, 8388607]),
    ],
)
def test_mode_matches_its_table(mode, expected):
    np.testing.assert_array_equal(round_to_integer(jnp.asarray(X), mode), np.float32(expected))


def test_stochastic_mean_is_the_input_and_outcomes_are_its_two_neighbours():
    x = jnp.asarray([0.25, -0.25, 3.9, -7.5, 100.1], jnp.float32)
    samples = round_to_integer(jnp.broadcast_to(x, (20_000, 5)), "stochastic", jax.random.key(0))
    # Five standard deviations of the mean of so many Bernoulli variables.
    np.testing.assert_allclose(jnp.mean(samples, axis=0), x, atol=5 * 0.5 / np.sqrt(20_000))
    for column, value in zip(np.asarray(samples).T, np.asarray(x), strict=True):
        assert set(column) == {np.floor(value), np.floor(value) + 1}


@pytest.mark.parametrize("integer", [0.0, -1.0, 200.0, -32767.0, 65535.0])
def test_stochastic_leaves_integers_where_they_are(integer):
    x = jnp.full((100_000,), integer, jnp.float32)
    np.testing.assert_array_equal(round_to_integer(x, "stochastic", jax.random.key(1)), x)


def test_stochastic_depends_on_the_key_only_and_is_half_even_without_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=100) * 5, jnp.float32)
    first, again = (round_to_integer(x, "stochastic", jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != round_to_integer(x, "stochastic", jax.random.key(4)))
    np.testing.assert_array_equal(round_to_integer(x, "stochastic"), jnp.round(x))


@pytest.mark.parametrize("mode", ROUNDING_MODES)
def test_dtype_is_kept_and_nan_stays_nan(mode):
    y = round_to_integer(jnp.asarray([jnp.nan, 1.5], jnp.float32), mode, jax.random.key(0))
    assert y.dtype == jnp.float32
    assert np.isnan(y[0]) and np.isfinite(y[1])
