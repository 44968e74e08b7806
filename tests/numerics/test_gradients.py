"""Identities that shape gradients: exact forward, the documented gradient backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import floor_at, power_of_two, scale_gradient

pytestmark = pytest.mark.exact

X = np.random.default_rng(0).normal(size=200).astype(np.float32)


def test_scale_gradient_is_exact_forward_and_scales_backward():
    y, pullback = jax.vjp(jax.jit(lambda x: scale_gradient(x, 0.37)), jnp.asarray(X))
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0], np.full(200, 0.37, np.float32))


def test_scale_gradient_accepts_a_traced_factor():
    gradient = jax.jit(jax.grad(lambda x, factor: scale_gradient(x, factor)))(2.0, jnp.float32(0.25))
    assert gradient == 0.25


def test_floor_at_is_a_maximum_whose_gradient_is_one_on_both_sides():
    x = jnp.asarray([-1.0, 0.0, 0.5, 2.0], jnp.float32)
    y, pullback = jax.vjp(lambda x: floor_at(x, 0.5), x)
    np.testing.assert_array_equal(y, np.float32([0.5, 0.5, 0.5, 2.0]))
    np.testing.assert_array_equal(pullback(jnp.asarray([1.0, 2.0, 3.0, 4.0]))[0], [1, 2, 3, 4])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_powers_of_two_are_fixed_points_over_all_exponents(wrap):
    powers = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
    np.testing.assert_array_equal(wrap(power_of_two)(jnp.asarray(powers)), powers)


def test_power_of_two_is_the_nearest_in_the_log_domain():
    mantissas = np.float32([1.0, 1.2, 1.414, 1.4143, 1.7, 1.9999])
    exponents = np.arange(-100, 100)
    x = np.ldexp(mantissas[:, None], exponents).astype(np.float32)
    expected = np.ldexp(np.float32([1, 1, 1, 2, 2, 2])[:, None], exponents)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(x)), expected.astype(np.float32))


def test_gradient_of_power_of_two_is_output_over_input():
    x = jnp.asarray(np.abs(X) + 0.01)
    gradient = jax.vmap(jax.grad(power_of_two))(x)
    np.testing.assert_allclose(gradient, np.asarray(power_of_two(x)) / np.asarray(x), rtol=1e-6)
    assert np.all((gradient >= 2**-0.5001) & (gradient <= 2**0.5001))
