"""Activation quantizers with a learned or averaged range reproduce the reference vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.layers import Activation
from qflax.quantizers import Quantization, Uniform

pytestmark = pytest.mark.exact

CASES = [
    *(f"u{bits}" for bits in range(2, 9)),
    *(f"s{bits}" for bits in range(2, 9)),
    *("s2n", "s4n", "s8n", "u5_negvalue", "ties.u4", "ties.s4", "ties.s8"),
]


def layer(case, **fields):
    narrow = "narrow" in case and bool(case["narrow"])
    spec = Uniform(bits=int(case["bits"]), narrow=narrow, **fields)
    function = (lambda x: x) if case["signed"] else nn.relu  # The layer infers the sign from the function.
    return Activation(function, Quantization(activations=spec))


def codes_of(q):
    return np.round(np.float64(q.value) / np.float64(q.scale))


def variables(x_max):
    return {
        "quantizer_params": {"activations": {"x_max": jnp.asarray(x_max)}},
        "quantizer_stats": {"activations": {"count": jnp.int32(1)}},
    }


@pytest.mark.parametrize("name", CASES)
def test_learned_range(golden, name):
    vectors = golden("uniform_acts")
    case = vectors.case(name)
    x, gy = (
        (case if name.startswith("ties") else vectors)["x"],
        (case if name.startswith("ties") else vectors)["gy"],
    )
    model = layer(case, scale="range")

    def loss(x, x_max):
        q = model.apply(variables(x_max), x)
        return jnp.sum(gy * q.value), q

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grad_x, grad_value), q = gradient(x, case["value"])
    assert (q.format.lowest, q.format.highest) == (case["qmin"], case["qmax"])
    np.testing.assert_array_equal(codes_of(q), case["codes"])
    np.testing.assert_allclose(q.scale, case["scale"], rtol=1e-6)
    np.testing.assert_allclose(q.value, case["y"], rtol=1e-6)
    np.testing.assert_allclose(grad_x, case["grad_x"], rtol=1e-6, atol=1e-6)
    terms = np.sum(np.abs(gy * case["codes"])) / case["threshold"]
    assert abs(grad_value - case["grad_value"]) <= 1e-6 * (1 + terms)


@pytest.mark.parametrize(("name", "percentile"), [("stats_default", 99.999), ("stats_q99", 99.0)])
def test_running_average_of_a_percentile(golden, name, percentile):
    case = golden("uniform_acts").case(name)
    assert case["percentile_q"] == np.float32(percentile)
    model = layer(case, scale="ema", statistic="percentile", percentile=percentile, momentum=0.1)
    state = model.init(jax.random.key(0), case["x"][0])
    threshold = 2 ** int(case["bits"]) - 1 if not case["signed"] else 2 ** (int(case["bits"]) - 1)
    for i, batch in enumerate(case["x"]):
        q, state = model.apply(state, batch, mutable=["quantizer_stats"])
        np.testing.assert_array_equal(codes_of(q), case["train_codes"][i])
        np.testing.assert_allclose(q.scale, case["batch_stat"][i] / threshold, rtol=1e-6)
        own = state["quantizer_stats"]["activations"]
        np.testing.assert_allclose(own["x_max"], case["buffer"][i], rtol=1e-6)
        assert own["count"] == i + 1
    q = model.apply(state, case["x"])
    np.testing.assert_allclose(q.scale, case["eval_scale"], rtol=1e-6)
    np.testing.assert_array_equal(codes_of(q), case["eval_codes"])
