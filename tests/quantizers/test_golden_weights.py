"""Weight quantizers reproduce the reference vectors: absolute-maximum scale, gradient through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.quantizers import Uniform, quantizer_of

pytestmark = pytest.mark.exact

BITS = {"conv": (2, 3, 4, 5, 6, 8), "dense": (4, 8)}
CASES = [
    f"{layer}.w{bits}_{granularity}_{span}"
    for layer in BITS
    for bits in BITS[layer]
    for granularity in ("pt", "pc")
    for span in ("narrow", "full")
]


def quantizer(case):
    spec = Uniform(
        bits=int(case["bits"]),
        scale="statistic",
        statistic="absmax",
        narrow=bool(case["narrow"]),
        granularity="per_channel" if case["per_channel"] else "per_tensor",
    )
    return quantizer_of(spec, weights=True)


def check_forward(case, x, transform):
    q = transform(lambda x: quantizer(case).apply({}, x))(jnp.asarray(x))
    codes = np.round(np.float64(q.value) / np.float64(q.scale))
    np.testing.assert_array_equal(codes, case["codes"])
    np.testing.assert_allclose(q.scale, case["scale"], rtol=1e-6)
    np.testing.assert_allclose(q.value, case["y"], rtol=1e-6)
    assert q.scale.shape == case["scale"].shape
    assert q.zero_point == case["zero_point"] == 0


def check_gradient(case, x, gy):
    gradient_of = jax.jit(jax.grad(lambda x: jnp.sum(gy * quantizer(case).apply({}, x).value)))
    gradient = gradient_of(jnp.asarray(x))
    axes = tuple(range(x.ndim - 1)) if case["per_channel"] else None
    # The largest weight receives a sum over its group; all others their own upstream gradient.
    largest = np.abs(x) == np.max(np.abs(x), axis=axes, keepdims=True)
    terms = np.sum(np.abs(gy * (case["codes"] - np.float64(x) / case["scale"])), axis=axes)
    tolerance = 1e-6 * (1 + np.abs(gy) + np.where(largest, terms, 0))
    np.testing.assert_array_less(np.abs(gradient - case["grad_x"]), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_values(golden, name):
    vectors = golden("uniform_weights")
    check_forward(vectors.case(name), vectors[f"{name.split('.')[0]}.x"], jax.jit)


@pytest.mark.parametrize("name", CASES)
def test_gradient_flows_through_the_absolute_maximum(golden, name):
    vectors, layer = golden("uniform_weights"), name.split(".")[0]
    check_gradient(vectors.case(name), vectors[f"{layer}.x"], vectors[f"{layer}.gy"])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["ties.w4", "ties.w8"])
def test_half_way_points_go_to_the_even_code(golden, name, transform):
    case = golden("uniform_weights").case(name)
    check_forward(case, case["x"], transform)


def test_channels_without_weights_have_the_smallest_scale_and_a_gradient(golden):
    case = golden("uniform_weights").case("zeroch.w8")
    check_forward(case, case["x"], jax.jit)
    check_gradient(case, case["x"], case["gy"])
