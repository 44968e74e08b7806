"""A2Q and A2Q+ reproduce the reference vectors: integers, penalty, initialisation, gradients, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import IntegerFormat, accumulator_extremes
from qflax.quantizers import (
    PARAMETERS,
    PENALTIES,
    PROJECTED,
    STATISTICS,
    AccumulatorAware,
    quantized_array,
    quantizer_of,
)

pytestmark = pytest.mark.exact

FILES = ("a2q_small", "a2q_conv3x3x64x64")


def cases(golden, file):
    arrays = golden(file)._arrays
    return sorted({name.rsplit(".", 1)[0] for name in arrays if name.endswith(".acc_bits")})


def inputs(case):
    fmt = IntegerFormat(bits=int(case["input_bits"]), signed=bool(case["input_signed"]))
    return quantized_array(jnp.zeros(()), jnp.zeros(()), jnp.ones(()), fmt)


def spec(case, **fields):
    return AccumulatorAware(
        bits=int(case["weight_bits"]),
        accumulator_bits=int(case["acc_bits"]),
        variant="a2q+" if case["zero_centered"] else "a2q",
        **fields,
    )


def variables(case, log2_scale, log2_norm, **more):
    return {
        PARAMETERS: {"log2_scale": log2_scale, "log2_norm": log2_norm, **more},
        STATISTICS: {"accumulator_bits": jnp.int32(case["acc_bits"])},
    }


@functools.cache
def jitted(spec):
    model = quantizer_of(spec, weights=True)
    return jax.jit(lambda variables, v, x: model.apply(variables, v, x, mutable=[PENALTIES]))


def check_codes(expected, v, q, where):
    codes = np.asarray(np.round(q.value / q.scale), np.int64)
    difference = np.abs(codes - expected["codes"]).ravel()
    fragile = np.zeros(difference.shape, bool)
    fragile[expected["fragile_idx"]] = True
    assert not difference[~fragile].any(), where
    assert difference.max() <= 1, where
    # Where no element of a channel differs, so do none of its extremes.
    same = ~(difference.reshape(codes.shape).any(tuple(range(codes.ndim - 1))))
    assert same.sum() > 0
    return codes, same


def check_extremes(case, expected, codes, same):
    low, high = -(2 ** (int(case["acc_bits"]) - 1)), 2 ** (int(case["acc_bits"]) - 1) - 1
    x = inputs(case).format
    for i in range(codes.shape[-1]):
        channel = codes[..., i]
        positive, negative = int(channel[channel > 0].sum()), int(-channel[channel < 0].sum())
        extremes = accumulator_extremes(positive, negative, x.lowest, x.highest)
        assert low <= extremes[0] and extremes[1] <= high
        if same[i]:
            assert extremes == (expected["acc_min"][i], expected["acc_max"][i])


@pytest.mark.parametrize("start", ["naive", "ep"])
@pytest.mark.parametrize("file", FILES)
def test_integers_penalties_and_extremes(golden, file, start):
    count = 0
    for name in cases(golden, file):
        case, expected = golden(file).case(name), golden(file).case(f"{name}.{start}")
        layer = golden(file).case(name.split(".")[0]) if file == "a2q_small" else golden(file)
        v = expected["v"] if "v" in expected else layer["v"]
        own = variables(case, expected["log2_s"], expected["log2_g"])
        q, state = jitted(spec(case))(own, v, inputs(case))
        np.testing.assert_allclose(q.scale, expected["s"], rtol=1e-6)
        codes, same = check_codes(expected, v, q, name)
        check_extremes(case, expected, codes, same)
        if start == "naive":
            np.testing.assert_allclose(state[PENALTIES]["accumulator"], expected["penalty"], rtol=1e-5)
        else:
            assert abs(state[PENALTIES]["accumulator"]) < 1e-4
        count += 1
    assert count == len(cases(golden, file)) >= 2


@pytest.mark.parametrize("file", FILES)
def test_initialisation_and_projection(golden, file):
    for name in cases(golden, file):
        case, naive, ep = (golden(file).case(name + suffix) for suffix in ("", ".naive", ".ep"))
        layer = golden(file).case(name.split(".")[0]) if file == "a2q_small" else golden(file)
        model, x = quantizer_of(spec(case), weights=True), inputs(case)
        initial = model.init(jax.random.key(0), layer["v"], x)
        marked = [PARAMETERS, STATISTICS, "calibrate_weights"]
        own = {**initial, **model.apply(initial, layer["v"], x, mutable=marked)[1]}
        for ours, theirs in (("log2_scale", "log2_s"), ("log2_norm", "log2_g")):
            np.testing.assert_allclose(own[PARAMETERS][ours], naive[theirs], rtol=1e-6, atol=1e-6)
        state = model.apply(own, layer["v"], x, mutable=[PROJECTED, PARAMETERS])[1]
        kernel, parameters = state[PROJECTED]["kernel"], state[PARAMETERS]
        expected = ep["v"] if "v" in ep else layer["v"]
        np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-6)
        assert bool(np.any(kernel != layer["v"])) == bool(ep["changed"])
        np.testing.assert_allclose(parameters["log2_norm"], ep["log2_g"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(parameters["log2_scale"], own[PARAMETERS]["log2_scale"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["grad.a2q", "grad.a2qplus"])
def test_gradients(golden, name, tied):
    case = golden("a2q_grad").case(name)
    model, x = quantizer_of(spec(case, tied=tied), weights=True), inputs(case)
    more = {} if tied else {"log2_norm_scale": jnp.asarray(case["log2_s"])}
    own = variables(case, jnp.asarray(case["log2_s"]), jnp.asarray(case["log2_g"]), **more)

    def run(parameters, v):
        return model.apply({**own, PARAMETERS: parameters}, v, x, mutable=[PENALTIES])

    q, state = run(own[PARAMETERS], case["v"])
    np.testing.assert_array_equal(np.round(q.value / q.scale), case["codes"])
    np.testing.assert_allclose(state[PENALTIES]["accumulator"], case["penalty"], rtol=1e-5)
    g, g_v = jax.grad(lambda p, v: jnp.sum(case["gw"] * run(p, v)[0].value), (0, 1))(
        own[PARAMETERS], case["v"]
    )
    p = jax.grad(lambda p: run(p, case["v"])[1][PENALTIES]["accumulator"])(own[PARAMETERS])

    def close(ours, theirs, tolerance=2e-5):
        # Sums over a channel: relative to the largest channel's.
        np.testing.assert_allclose(
            ours, case[theirs], rtol=tolerance, atol=1e-6 * np.max(np.abs(case[theirs]))
        )

    close(g_v, "grad_v")
    close(g["log2_norm"], "grad_log2_g")
    close(p["log2_norm"], "penalty_grad_log2_g")
    if tied:
        close(g["log2_scale"], "grad_log2_s")
        close(p["log2_scale"], "penalty_grad_log2_s")
    else:
        close(g["log2_scale"], "grad_log2_s_post")
        close(g["log2_norm_scale"], "grad_log2_s_pre")
        close(p["log2_norm_scale"], "penalty_grad_log2_s")
        assert not np.any(p["log2_scale"])
