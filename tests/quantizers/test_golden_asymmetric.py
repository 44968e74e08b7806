"""Asymmetric activation quantizers reproduce the reference vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import IntegerFormat
from qflax.quantizers import Uniform, quantizer_of
from qflax.quantizers.statistics import asymmetric_range

pytestmark = pytest.mark.exact


def quantizer(case, **fields):
    return quantizer_of(Uniform(bits=int(case["bits"]), symmetric=False, **fields), weights=False)


def codes_of(q):
    return np.round(np.float64(q.value) / np.float64(q.scale)) + np.float64(q.zero_point)


def variables(width, x_min):
    params = {"width": jnp.asarray(width), "x_min": jnp.asarray(x_min)}
    return {"quantizer_params": params, "quantizer_stats": {"count": jnp.int32(1)}}


@pytest.mark.parametrize("name", ["a8", "a4", "a4_pos", "a8_b", "ties"])
def test_learned_ends_of_the_range(golden, name):
    vectors = golden("asym_acts")
    case = vectors.case(name)
    x, gy = ((case if name == "ties" else vectors)[array] for array in ("x", "gy"))
    model = quantizer(case, scale="range")

    def loss(x, width, x_min):
        q = model.apply(variables(width, x_min), x)
        return jnp.sum(gy * q.value), q

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (grad_x, grad_value, grad_zp_value), q = gradient(x, case["value"], case["zp_value"])
    assert q.zero_point == case["zero_point"]
    assert (q.format.lowest, q.format.highest) == (case["qmin"], case["qmax"])
    np.testing.assert_array_equal(codes_of(q), case["codes"])
    np.testing.assert_allclose(q.scale, case["scale"], rtol=1e-6)
    np.testing.assert_allclose(q.value, case["y"], rtol=1e-6)
    np.testing.assert_allclose(grad_x, case["grad_x"], rtol=1e-6, atol=1e-6)
    terms = np.sum(np.abs(gy * (case["codes"] - case["zero_point"]))) / case["threshold"]
    assert abs(grad_value - case["grad_value"]) <= 1e-6 * (1 + terms)
    # At zero the lower end moves down only, where the reference differentiates its magnitude upwards.
    expected = case["grad_zp_value"] * (-1 if case["zp_value"] == 0 else 1)
    assert abs(grad_zp_value - expected) <= 1e-6 * (1 + np.sum(np.abs(gy)))


def test_a_positive_lower_end_counts_by_its_magnitude(golden):
    vectors = golden("asym_acts")
    case, model = vectors.case("a8"), quantizer(vectors.case("a8"), scale="range")

    def value(x_min):
        return model.apply(variables(case["value"], x_min), vectors["x"]).value

    np.testing.assert_array_equal(value(-case["zp_value"]), value(case["zp_value"]))
    gradient = jax.grad(lambda x_min: jnp.sum(vectors["gy"] * value(x_min)))(-case["zp_value"])
    assert abs(gradient + case["grad_zp_value"]) <= 1e-6 * (1 + np.sum(np.abs(vectors["gy"])))


def test_running_average_of_percentiles(golden):
    case = golden("asym_acts").case("stats_default")
    # Two tails of 0.001 percent.
    model = quantizer(case, scale="ema", statistic="percentile", percentile=99.998, momentum=0.1)
    state = model.init(jax.random.key(0), case["x"][0])
    for i, batch in enumerate(case["x"]):
        q, state = model.apply(state, batch, mutable=["quantizer_stats"])
        np.testing.assert_allclose(q.scale, case["train_scale"][i], rtol=1e-6)
        assert q.zero_point == case["train_zero_point"][i]
        np.testing.assert_array_equal(codes_of(q), case["train_codes"][i])
        width = state["quantizer_stats"]["x_max"] - state["quantizer_stats"]["x_min"]
        np.testing.assert_allclose(width, case["range_buffer"][i], rtol=1e-6)
        np.testing.assert_allclose(state["quantizer_stats"]["x_min"], case["zp_buffer"][i], rtol=1e-6)


def test_percentile_ranks_and_codes_of_unequal_tails(golden):
    case = golden("asym_acts").case("stats_q99_5")
    assert (case["low_percentile_q"], case["high_percentile_q"]) == (5, 99)
    model, fmt = quantizer(case, scale="range"), IntegerFormat(bits=4, signed=False)
    width, x_min = 0.0, 0.0
    for i, batch in enumerate(case["x"]):
        # The spec has one percentile for both tails: 5 percent below is that of 90, 1 above that of 98.
        low = asymmetric_range(jnp.asarray(batch), "percentile", fmt, percentile=90.0)[0]
        high = asymmetric_range(jnp.asarray(batch), "percentile", fmt, percentile=98.0)[1]
        q = model.apply(variables(high - low, low), batch)
        np.testing.assert_allclose(q.scale, case["train_scale"][i], rtol=1e-6)
        assert q.zero_point == case["train_zero_point"][i]
        np.testing.assert_array_equal(codes_of(q), case["train_codes"][i])
        new = 1.0 if i == 0 else 0.1
        width, x_min = width + new * (high - low - width), x_min + new * (low - x_min)
        np.testing.assert_allclose(width, case["range_buffer"][i], rtol=1e-6)
        np.testing.assert_allclose(x_min, case["zp_buffer"][i], rtol=1e-6)
