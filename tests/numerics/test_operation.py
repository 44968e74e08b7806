"""Operations stay one equation; under transformations they are their functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import PRIMITIVE, Operation

pytestmark = pytest.mark.exact

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@Operation
def shifted_tanh(x, shift, *, times: int = 1):
    """tanh(x) times and shift."""
    return times * jnp.tanh(x) + shift


def test_a_trace_shows_one_equation_with_its_options():
    traced = jax.make_jaxpr(lambda x: shifted_tanh(x, 1.0, times=2))(X)
    (equation,) = traced.eqns
    assert equation.primitive is PRIMITIVE
    assert equation.params == {"operation": shifted_tanh, "options": (("times", 2),)}
    assert repr(shifted_tanh) == "shifted_tanh" and shifted_tanh.__doc__ == "tanh(x) times and shift."


def test_it_computes_its_function_everywhere():
    expected = 2 * np.tanh(X) + np.float32(1)
    for function in (shifted_tanh, jax.jit(shifted_tanh, static_argnames="times")):
        np.testing.assert_allclose(function(X, 1.0, times=2), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: shifted_tanh(x, 1.0, times=2))(X), expected, rtol=1e-5)
    mapped = jax.pmap(lambda x: shifted_tanh(x, 1.0, times=2))(X[None])
    np.testing.assert_allclose(mapped[0], expected, rtol=1e-5)


def test_its_gradient_is_that_of_its_function():
    gradients = jax.grad(lambda x, s: jnp.sum(shifted_tanh(x, s, times=2)), argnums=(0, 1))(X, 1.0)
    np.testing.assert_allclose(gradients[0], 2 * (1 - np.tanh(X) ** 2), rtol=1e-5)
    assert gradients[1] == X.size


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_its_type_is_that_of_its_function(wrap):
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("batch",)), jax.sharding.PartitionSpec("batch")

    def both(x):
        y = shifted_tanh(x, 1.0)
        assert jax.typeof(y) == jax.typeof(jnp.tanh(x) + 1.0)
        return y

    mapped = wrap(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(mapped(X), np.tanh(X) + np.float32(1), rtol=1e-5)
    assert jax.jit(lambda: shifted_tanh(1.0, 1.0))().weak_type
