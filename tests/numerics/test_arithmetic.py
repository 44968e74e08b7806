"""Quotients, products and sums are the same bits in every program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import full_precision, on_cpu, product, quotient, total

pytestmark = [
    pytest.mark.exact,
    pytest.mark.skipif(
        jax.default_backend() != "cpu",
        reason="accelerators divide float32 to within a few units in the last place",
    ),
]

X = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (100,)])
def test_quotient_is_the_ieee_quotient_with_and_without_jit(shape):
    divisor = np.random.default_rng(1).uniform(0.01, 0.02, shape).astype(np.float32)
    for function in (quotient, jax.jit(quotient), jax.jit(lambda x, _: quotient(x, divisor))):
        np.testing.assert_array_equal(function(jnp.asarray(X), jnp.asarray(divisor)), X / divisor)


def test_quotient_of_a_scalar_and_a_constant_is_the_ieee_quotient():
    divide = jax.jit(lambda x: quotient(x, 127))
    for x in X[0]:
        assert divide(x) == x / np.float32(127)


def test_an_addition_that_follows_is_not_fused_with_the_quotient():
    y = jax.jit(lambda x, s, z: quotient(x, s) + z)(jnp.asarray(X), jnp.float32(0.0123), jnp.float32(7))
    np.testing.assert_array_equal(y, X / np.float32(0.0123) + np.float32(7))


def test_nan_stays_nan():
    assert np.isnan(quotient(jnp.float32(jnp.nan), 2.0))


def test_a_product_is_rounded_before_what_follows():
    rng = np.random.default_rng(2)
    factor, other, offset = (rng.normal(size=100).astype(np.float32) for _ in range(3))
    fused = jax.jit(lambda x, f, o: x * f + o)(X, factor, offset)
    assert np.any(fused != X * factor + offset)  # Else this test could not fail.
    protected = jax.jit(lambda x, f, g, o: product(product(x, f), g) + o)
    np.testing.assert_array_equal(protected(X, factor, other, offset), (X * factor) * other + offset)
    constants = jax.jit(lambda x: product(product(x, factor), other) + offset)
    np.testing.assert_array_equal(constants(X), (X * factor) * other + offset)


def test_the_gradient_of_a_product_is_the_other_factor():
    factor = jnp.arange(1.0, 101.0)
    gradients = jax.grad(lambda x, f: jnp.sum(product(x, f)), argnums=(0, 1))(jnp.asarray(X), factor)
    np.testing.assert_array_equal(gradients[0], np.broadcast_to(factor, X.shape))
    np.testing.assert_allclose(gradients[1], X.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(product(x, x)))(jnp.asarray(X)), 2 * X)
    assert np.isnan(product(jnp.float32(jnp.nan), 2.0))


def test_products_of_arrays_are_in_full_precision_whatever_the_setting():
    def double(x):
        return jnp.matmul(x, 2 * jnp.eye(100))

    with jax.default_matmul_precision("bfloat16"):
        texts = [
            jax.jit(function).lower(X).as_text()
            for function in (double, full_precision()(double), on_cpu()(double))
        ]
    assert ["HIGHEST" in text for text in texts] == [False, True, True]


@pytest.mark.parametrize("shape", [(1, 7), (3, 3, 50, 40), (4097, 3), (20_000,)])
def test_a_total_is_added_in_the_same_order_in_every_program(shape):
    x = np.random.default_rng(3).normal(size=(*shape, 1)[: max(len(shape), 2)]).astype(np.float32)
    rows = x.reshape(-1, x.shape[-1])
    while len(rows) > 1:
        rows = np.concatenate([rows, np.zeros((len(rows) % 2, rows.shape[1]), np.float32)])
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
    programs = [
        total,
        jax.jit(total),
        jax.jit(lambda x: total(jnp.abs(x) * jnp.sign(x))),
        jax.jit(lambda x: jax.vmap(total)(jnp.stack([x, x]))[1]),
        jax.jit(lambda x: jax.value_and_grad(lambda x: (total(x)[0], total(x)), has_aux=True)(x)[0][1]),
    ]
    for program in programs:
        np.testing.assert_array_equal(program(jnp.asarray(x)), rows[0])
    exact = x.astype(np.float64).reshape(-1, x.shape[-1]).sum(0)
    np.testing.assert_allclose(rows[0], exact, atol=1e-6 * np.abs(x).sum() / x.shape[-1])


def test_the_gradient_of_a_total_is_one():
    weights = jnp.arange(100.0)
    gradient = jax.grad(lambda x: jnp.dot(total(x), weights))(jnp.asarray(X))
    np.testing.assert_array_equal(gradient, np.broadcast_to(weights, X.shape))
