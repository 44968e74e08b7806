"""Minifloat quantizers reproduce the reference vectors: values bit for bit, three gradients, two scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import MinifloatEstimator, MinifloatFormat
from qflax.quantizers import Minifloat, quantizer_of

pytestmark = pytest.mark.exact

SPECIALS = {"e5m2": "ieee", "e4m3": "nan", "e5m10_ieee": "ieee"}
FORMATS = [
    "e5m2",
    "e5m2_nospecial",
    "e4m3",
    "e4m3_nospecial",
    "e3m4",
    "e3m2",
    "e2m3",
    "e2m1",
    "e3m1",
    "e2m2",
    "e5m10",
    "e5m10_ieee",
]
GRADIENTS = {
    "grad_brevitas": MinifloatEstimator(surrogate="proportional"),
    "grad_ste": MinifloatEstimator(),
    "grad_ste_strict": MinifloatEstimator(clip="before_rounding"),
}


def format_of(golden, name):
    case = golden("minifloat").case(name)
    return MinifloatFormat(
        exponent_bits=int(case["exponent_bits"]),
        mantissa_bits=int(case["mantissa_bits"]),
        bias=int(case["exponent_bias"]),
        specials=SPECIALS.get(name, "none"),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_constants_and_values(golden, name):
    case, form = golden("minifloat").case(name), format_of(golden, name)
    constants = {field: np.float32(getattr(form, field)) for field in ("max", "min_normal", "min_subnormal")}
    assert constants == {field: case[field] for field in constants}
    assert form.bias == 2 ** (form.exponent_bits - 1) - 1
    if "values" in case:
        np.testing.assert_array_equal(form.values, case["values"])


@pytest.mark.parametrize(
    "name,variant",
    # Scales of 1, of no power of two, and of powers of two.
    [(name, variant) for name in FORMATS for variant in ("s1", "sn")]
    + [(name, "sp") for name in ("e2m1", "e3m1", "e4m3")],
)
def test_values_and_gradients(golden, name, variant):
    case, form = golden("minifloat").case(f"{name}.{variant}"), format_of(golden, name)
    x, gy, scale = (jnp.asarray(case[field]) for field in ("x", "gy", "scale"))
    y = jax.jit(form.fake_quant)(x, scale)
    np.testing.assert_array_equal(y, case["y"])
    np.testing.assert_array_equal(np.signbit(y), np.signbit(case["y"]))
    for field, estimator in GRADIENTS.items():

        def loss(x, estimator=estimator):
            return jnp.sum(gy * form.fake_quant(x, scale, estimator=estimator))

        gradient = jax.jit(jax.grad(loss))(x)
        # XLA's CPU backend takes subnormals of float32 for zero: y / x is then 1, the subnormal rule.
        representable = np.abs(case["x"] / case["scale"]) >= 2.0**-126
        expected = np.where(representable, case[field], case["gy"])
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("granularity", ["pt", "pc"])
@pytest.mark.parametrize("name", ["e4m3", "e4m3_nospecial", "e3m1", "e2m1"])
def test_weights_scaled_by_their_maximum(golden, name, granularity):
    case, form = golden("minifloat").case(f"weights.{name}_{granularity}"), format_of(golden, name)
    spec = Minifloat(
        exponent_bits=form.exponent_bits,
        mantissa_bits=form.mantissa_bits,
        specials=form.specials,
        scale="statistic",
        granularity={"pt": "per_tensor", "pc": "per_channel"}[granularity],
        surrogate="proportional",
    )
    x = case["x"]
    apply = jax.jit(lambda x: quantizer_of(spec, weights=True).apply({}, x))
    q = apply(x)
    np.testing.assert_allclose(q.scale, case["scale"], rtol=1e-6)
    np.testing.assert_allclose(q.value, case["y"], rtol=1e-6)
    patterns = form.encode(q.value, q.scale)
    np.testing.assert_array_equal(patterns, form.encode(case["y"], case["scale"]))
    gradient = jax.grad(lambda x: jnp.sum(case["gy"] * apply(x).value))(x)
    axes = tuple(range(x.ndim - 1)) if granularity == "pc" else None
    # The largest weight receives a sum over its group; all others their own upstream gradient.
    largest = np.abs(x) == np.max(np.abs(x), axis=axes, keepdims=True)
    terms = np.sum(np.abs(case["gy"] * case["y"] / case["scale"] / form.max), axis=axes)
    tolerance = 1e-6 * (1 + np.abs(case["gy"]) + np.where(largest, terms, 0))
    np.testing.assert_array_less(np.abs(gradient - case["grad_brevitas"]), tolerance)
