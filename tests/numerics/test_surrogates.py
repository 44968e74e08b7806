"""Gradient rules against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.numerics import SURROGATES, Estimator

pytestmark = pytest.mark.exact

RNG = np.random.default_rng(0)
G = RNG.normal(size=400).astype(np.float32)
OFFSET = np.concatenate([RNG.uniform(-0.5, 0.5, 397), [-0.5, 0.0, 0.5]]).astype(np.float32)


def reference(name, g, offset, strength):
    """Gradient before rounding, float64."""
    g, offset = np.float64(g), np.float64(offset)
    if name == "identity":
        return g
    if name == "ewgs":
        return g * (1 + strength * np.sign(g) * offset)
    if name == "psgd":
        return g * (np.abs(offset) + strength)
    # Soft staircase between two integers: tanh(k (t - 1/2)) / tanh(k / 2) / 2, with t from 0 to 1.
    t = np.where(offset >= 0, offset, 1 + offset)
    return g * strength / np.cosh(strength * (t - 0.5)) ** 2 / (2 * np.tanh(strength / 2))


@pytest.mark.parametrize("strength", [None, 0.5, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_rule_matches_its_formula(name, strength):
    got = Estimator(surrogate=name, strength=strength).through_rounding(jnp.asarray(G), jnp.asarray(OFFSET))
    used = SURROGATES[name][1] if strength is None else strength
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference(name, G, OFFSET, used), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0, 20.0])
def test_tanh_staircase_rises_by_one_over_a_step(strength):
    t = (np.arange(100_000) + 0.5) / 100_000  # From one integer to the next.
    offset = jnp.asarray(t - np.round(t), jnp.float32)
    slope = Estimator(surrogate="tanh", strength=strength).through_rounding(jnp.float32(1), offset)
    assert np.mean(np.float64(slope)) == pytest.approx(1, abs=2e-5)


def test_tanh_tends_to_the_identity_for_a_flat_staircase():
    g = Estimator(surrogate="tanh", strength=1e-2).through_rounding(jnp.asarray(G), jnp.asarray(OFFSET))
    np.testing.assert_allclose(g, G, rtol=1e-4)


def test_ewgs_pulls_values_towards_the_side_that_the_gradient_favours():
    g = Estimator(surrogate="ewgs", strength=0.2).through_rounding(
        jnp.asarray([1.0, 1.0, -1.0, -1.0]), jnp.asarray([0.5, -0.5, 0.5, -0.5])
    )
    np.testing.assert_allclose(g, [1.1, 0.9, -0.9, -1.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surrogate": "ewgz"}, r"surrogate='ewgz'.*did you mean 'ewgs'.*choices: identity"),
        ({"rounding": "half_evn"}, r"rounding='half_evn'.*did you mean 'half_even'"),
        ({"surrogate": "tanh", "rounding": "floor"}, r"surrogate='tanh' with rounding='floor'.*'half_even'"),
        ({"surrogate": "tanh", "rounding": "stochastic"}, r"surrogate='tanh' with rounding='stochastic'"),
        ({"surrogate": "tanh", "strength": 0.0}, r"strength=0.0: of surrogate='tanh'.*positive"),
        ({"surrogate": "tanh", "strength": -1.0}, r"strength=-1.0: .*positive"),
        ({"clip": "none"}, r"clip='none'.*choices: after_rounding, before_rounding, straight_through"),
    ],
)
def test_impossible_choice_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        Estimator(**fields)
