"""Gradients within `jax.shard_map`: of what is the same on all devices they are sums over the devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qflax.numerics import (
    Estimator,
    IntegerFormat,
    MinifloatEstimator,
    MinifloatFormat,
    bit_width,
    convolve,
    floor_at,
    highest_code,
    power_of_two,
    product,
    quantize_to_range,
    quotient,
    round_straight_through,
    scale_gradient,
    straight_through,
    vary_alike,
)
from qflax.quantizers import quantized_array

DEVICES = 2
INT4, E4M3 = IntegerFormat(bits=4, signed=True), MinifloatFormat(exponent_bits=4, mantissa_bits=3)
AXIS = "batch"


def random(*shape):
    return np.random.default_rng(0).uniform(0.2, 2.0, (DEVICES, *shape)).astype(np.float32)


X, SCALE, IMAGES, KERNEL = random(4, 3), random(3) / 8, random(2, 5, 5, 4), random(3, 3, 4, 6) - 1
# Functions and their operands, whose first axis is over devices.
FUNCTIONS = {
    "integers": (lambda x, s, z: INT4.fake_quant(x - 1, s, z), (X, SCALE, np.float32([[0.0], [1.0]]))),
    "psgd": (lambda x, s: INT4.fake_quant(x, s, estimator=Estimator(surrogate="psgd")), (X, SCALE)),
    "minifloats": (lambda x, s: E4M3.fake_quant(1000 * x, s), (X, SCALE)),
    "proportional": (
        lambda x, s: E4M3.fake_quant(x, s, estimator=MinifloatEstimator(surrogate="proportional")),
        (X, SCALE),
    ),
    "range": (lambda x, s, m: quantize_to_range(x - 1, s, m, signed=True), (X, SCALE, 4 * SCALE)),
    "convolution": (convolve, (IMAGES, KERNEL)),
    "grouped": (lambda x, k: convolve(x, k[:, :, :2], groups=2), (IMAGES, KERNEL)),
    "straight_through": (lambda x, y: straight_through(jnp.round(x), y), (X, 2 * X)),
    "unscaled": (
        lambda x, s: quantized_array(product(x, s), jnp.round(x), jax.lax.stop_gradient(s), INT4).unscaled,
        (X, SCALE),
    ),
    "product": (product, (X, SCALE)),
    "quotient": (quotient, (X, SCALE)),
    "bit_width": (lambda s, m: bit_width(s, m, True), (SCALE, X)),
    "highest_code": (lambda b: highest_code(round_straight_through(3 * b), False), (X,)),
    "scales": (lambda s: power_of_two(floor_at(scale_gradient(s, 0.5), 0.1)), (SCALE,)),
}


def summed(function, operands):
    y = function(*operands)
    return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape))


@pytest.mark.thorough
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_a_sum_over_devices(name):
    function, operands = FUNCTIONS[name]
    mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], (AXIS,))
    every = tuple(range(len(operands)))
    for varying in itertools.product([False, True], repeat=len(operands)):
        if not any(varying):
            continue
        given = [x if varies else x[0] for x, varies in zip(operands, varying, strict=True)]
        specs = tuple(P(AXIS) if varies else P() for varies in varying)

        def on_device(*operands, varying=varying):
            def loss(*operands):
                own = [x[0] if varies else x for x, varies in zip(operands, varying, strict=True)]
                return jax.lax.psum(summed(function, own), AXIS)

            return jax.grad(loss, argnums=every)(*operands)

        def in_all(*operands, varying=varying):
            return sum(
                summed(function, [x[i] if varies else x for x, varies in zip(operands, varying, strict=True)])
                for i in range(DEVICES)
            )

        found = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=specs))(*given)
        expected = jax.jit(jax.grad(in_all, argnums=every))(*given)
        for own, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(own, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", [INT4, E4M3])
def test_a_key_for_each_device_rounds_one_array_in_different_ways(fmt):
    estimator = (Estimator if fmt is INT4 else MinifloatEstimator)(
        rounding="stochastic", clip="straight_through"
    )
    mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], (AXIS,))

    def on_device(x, key):
        quantize = lambda x: fmt.fake_quant(x, jnp.float32(0.3), estimator=estimator, key=key[0])  # noqa: E731
        y, pull = jax.vjp(quantize, x)
        return y[None], pull(jax.lax.pcast(jnp.ones_like(x), AXIS, to="varying"))[0]

    specs = dict(in_specs=(P(), P(AXIS)), out_specs=(P(AXIS), P()))
    y, gradient = jax.jit(jax.shard_map(on_device, mesh=mesh, **specs))(
        X[0], jax.random.split(jax.random.key(0))
    )
    assert (y[0] != y[1]).any()
    np.testing.assert_array_equal(gradient, DEVICES)


def test_without_devices_nothing_is_cast():
    traced = jax.make_jaxpr(lambda x, y: vary_alike(x, None, y))(1.0, X)
    assert not traced.eqns and len(traced.jaxpr.outvars) == 2
