"""Learned step size quantization reproduces the reference vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.quantizers import Uniform, quantizer_of
from qflax.quantizers.statistics import symmetric_range

pytestmark = pytest.mark.exact

WEIGHTS = ["w2", "w3", "w4", "w8"]
ACTIVATIONS = ["a2", "a4", "a8"]


def quantizer(case):
    signed = bool(case["signed"])
    spec = Uniform(bits=int(case["bits"]), scale="lsq", narrow=False)
    return quantizer_of(spec, weights=signed, signed=signed)


def variables(scale):
    return {"quantizer_params": {"scale": jnp.asarray(scale)}, "quantizer_stats": {"count": jnp.int32(1)}}


@pytest.mark.parametrize("name", WEIGHTS + ACTIVATIONS)
def test_values_and_gradients(golden, name):
    case = golden("lsq").case(name)
    model, gy = quantizer(case), case["gy"]

    def loss(v, s):
        q = model.apply(variables(s), v)
        return jnp.sum(gy * q.value), q

    (grad_v, grad_s), q = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(case["v"], case["s"])
    assert (-q.format.lowest, q.format.highest) == (case["Qn"], case["Qp"])
    np.testing.assert_array_equal(np.round(np.float64(q.value) / case["s"]), case["v_bar"])
    np.testing.assert_allclose(q.value, case["v_hat"], rtol=1e-6)
    np.testing.assert_allclose(grad_v, case["grad_v"], rtol=1e-6, atol=1e-6)
    terms = np.sum(np.abs(gy * case["dvhat_ds"])) * case["grad_scale"]
    assert abs(grad_s - case["grad_s"]) <= 1e-6 * (1 + terms)


@pytest.mark.parametrize("name", WEIGHTS)
def test_calibration_starts_from_the_paper_s_initial_scale(golden, name):
    case = golden("lsq").case(name)
    model = quantizer(case)
    fresh = {**variables(1.0), "quantizer_stats": {"count": jnp.int32(0)}}
    state = model.apply(
        fresh, case["v"], mutable=["quantizer_params", "quantizer_stats", "calibrate_weights"]
    )[1]
    np.testing.assert_allclose(state["quantizer_params"]["scale"], case["s_init"], rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_initial_scale_of_activations_is_that_of_their_magnitudes(golden, name):
    # The reference takes the mean of abs(v); an unsigned format's data has been through a ReLU.
    case = golden("lsq").case(name)
    fmt = quantizer(case).format
    x_max = symmetric_range(jnp.abs(case["v"]), "mean", fmt, percentile=100)
    np.testing.assert_allclose(x_max / fmt.threshold, case["s_init"], rtol=1e-6)
