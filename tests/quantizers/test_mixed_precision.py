"""Quantizers that learn their width: start, gradients, bounds, freezing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.numerics import power_of_two
from qflax.quantizers import (
    CONSTRAINTS,
    PARAMETERS,
    STATISTICS,
    MixedPrecision,
    bits_of,
    calibrate,
    constrain,
    freeze_widths,
    limit_gradients,
    quantizer_of,
    widths_frozen,
)
from qflax.quantizers.mixed_precision import PARAMETRIZATIONS

X = np.random.default_rng(0).normal(size=(64, 5, 6)).astype(np.float32)


def calibrated(weights=True, **fields):
    model = quantizer_of(MixedPrecision(**{"bits": 4, **fields}), weights=weights, signed=weights)
    variables = model.init(jax.random.key(0), X)
    return model, calibrate(model, variables, [np.abs(X) if not weights else X])


def frozen(variables, bits=None):
    statistics = variables[STATISTICS]
    if bits is not None:
        statistics = {**statistics, "bits": jnp.full_like(statistics["bits"], bits)}
    return {**variables, STATISTICS: freeze_widths(statistics)}


CASES = list(itertools.product(PARAMETRIZATIONS, ("per_tensor", "per_channel"), (False, True), (True, False)))


@pytest.mark.thorough
@pytest.mark.parametrize("parametrization,granularity,power,weights", CASES)
def test_starts_with_its_bits_and_stays_on_its_grid_when_frozen(parametrization, granularity, power, weights):
    fields = dict(parametrization=parametrization, granularity=granularity, power_of_two=power)
    model, variables = calibrated(weights, **fields)
    shape = (6,) if granularity == "per_channel" else ()
    assert set(variables[PARAMETERS]) == set(PARAMETRIZATIONS[parametrization])
    assert all(value.shape == shape for value in variables[PARAMETERS].values())
    x = X if weights else np.abs(X)
    q = model.apply(variables, x)
    # A step that was rounded to a power of two may have made the range one bit wider or narrower.
    assert np.all(
        np.abs(np.asarray(q.format.bits) - 4) <= (1 if power and "bits" not in parametrization else 0)
    )
    for bits in (2, 3, 5):
        q = jax.jit(model.apply)(frozen(variables, bits), x)
        assert bits_of(q) == bits and q.format.bits.shape == shape
        codes = q.format.encode(q.value, q.scale)
        np.testing.assert_array_equal(q.format.decode(codes, q.scale), q.value)
        np.testing.assert_array_equal(jnp.abs(codes) <= 2 ** (bits - weights) - 1, True)
        assert len(np.unique(codes)) > 2 ** (bits - 2) and (weights or codes.min() == 0)
        if power:
            np.testing.assert_array_equal(power_of_two(q.scale), q.scale)


def constraint_of(model, variables):
    return model.apply(variables, X, mutable=[CONSTRAINTS])[1]


def gradients(model, variables, x):
    def loss(parameters):
        q = model.apply({**variables, PARAMETERS: parameters}, x)
        return jnp.sum(q.value * jnp.sin(jnp.arange(x.size).reshape(x.shape))), bits_of(q)

    return (
        jax.grad(lambda p: loss(p)[0])(variables[PARAMETERS]),
        jax.grad(lambda p: loss(p)[1] + 0.0)(variables[PARAMETERS]),
    )


def test_gradients_of_the_other_parametrizations_follow_from_the_first():
    # With x_max = d (2^(b-1) - 1): the paper's U1 and U2 are chain rules of U3.
    model, variables = calibrated(parametrization="step_range")
    highest = 7.0
    base, width = gradients(model, variables, X)
    d_max = highest + 1
    for parametrization in ("bits_step", "bits_range"):
        other, own = calibrated(parametrization=parametrization)
        value, bits = gradients(other, own, X)
        if parametrization == "bits_step":
            expected = {
                "step": base["step"] + highest * base["x_max"],
                "bits": base["x_max"] * own[PARAMETERS]["step"] * d_max * np.log(2),
            }
        else:
            step = own[PARAMETERS]["x_max"] / highest
            expected = {
                "x_max": base["x_max"] + base["step"] / highest,
                "bits": -base["step"] * step / highest * d_max * np.log(2),
            }
        for name, gradient in expected.items():
            np.testing.assert_allclose(value[name], gradient, rtol=1e-4, atol=1e-4)
        assert bits["bits"] == 1 and not bits[next(name for name in bits if name != "bits")]
    d, x_max = variables[PARAMETERS]["step"], variables[PARAMETERS]["x_max"]
    np.testing.assert_allclose(width["x_max"], 1 / ((x_max + d) * np.log(2)), rtol=1e-5)
    np.testing.assert_allclose(width["step"], -x_max / d / ((x_max + d) * np.log(2)), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("x_max", np.linspace(0.5, 3, 40).tolist())
def test_at_the_bounds_of_the_width_gradients_are_the_same(bits, x_max):
    model, variables = calibrated(bits=bits)
    start = {"step": jnp.float32(x_max) / (2 ** (bits - 1) - 1), "x_max": jnp.float32(x_max)}
    parameters = constrain(start, constraint_of(model, variables))
    free = quantizer_of(MixedPrecision(bits=bits, min_bits=2, max_bits=12), weights=True)
    same = {**variables, PARAMETERS: parameters}
    for ours, unbounded in zip(gradients(model, same, X), gradients(free, same, X), strict=True):
        assert ours["x_max"] != 0
        for name in ours:
            np.testing.assert_allclose(ours[name], unbounded[name], rtol=1e-5)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_calibrating_a_frozen_quantizer_keeps_its_width_and_fits_its_range(parametrization):
    model, variables = calibrated(bits=8, parametrization=parametrization)
    variables = frozen(variables, 3)
    before = np.mean((model.apply(variables, X).value - X) ** 2)
    variables = calibrate(model, variables, [X])
    q = model.apply(variables, X)
    assert bits_of(q) == 3 and np.mean((q.value - X) ** 2) <= 1.5 * before


@pytest.mark.parametrize("step,x_max", [(0.72, 0.8), (0.3, 1.1), (0.011, 2.0)])
def test_steps_of_powers_of_two_stay_monotone(step, x_max):
    model, variables = calibrated(power_of_two=True)
    variables = {**variables, PARAMETERS: {"step": jnp.float32(step), "x_max": jnp.float32(x_max)}}
    x = np.linspace(-4, 4, 999, dtype=np.float32)
    q = model.apply(variables, x)
    assert np.all(np.diff(q.value) >= 0) and bits_of(q) <= 8


def test_a_frozen_width_gets_no_gradient_and_the_range_that_of_its_step():
    model, variables = calibrated()
    values, widths = gradients(model, frozen(variables), X)
    assert not any(np.any(g) for g in widths.values())
    assert not values["step"] and values["x_max"]
    other, own = calibrated(parametrization="bits_range")
    own = {**own, PARAMETERS: {**own[PARAMETERS], "x_max": variables[PARAMETERS]["x_max"]}}
    np.testing.assert_allclose(values["x_max"], gradients(other, own, X)[0]["x_max"], rtol=1e-5)


def test_calibration_records_the_width_that_freezing_keeps():
    """Not that of the initial kernel, which may be of zeros."""
    model = quantizer_of(MixedPrecision(bits=8, start="paper"), weights=True)
    variables = calibrate(model, model.init(jax.random.key(0), jnp.zeros(X.shape)), [X])
    live = bits_of(model.apply(variables, X))
    variables = {**variables, STATISTICS: freeze_widths(variables[STATISTICS])}
    assert bits_of(model.apply(variables, X)) == live == 8


def test_a_training_pass_records_the_width_and_freezing_keeps_it():
    model, variables = calibrated()
    step = variables[PARAMETERS]["step"] * 2.5
    variables = {**variables, PARAMETERS: {**variables[PARAMETERS], "step": step}}
    q, state = model.apply(variables, X, mutable=[STATISTICS])
    assert bits_of(q) == state[STATISTICS]["bits"] == 3  # log2(7 / 2.5 + 1) + 1 = 2.9
    assert not widths_frozen(state[STATISTICS])
    assert not widths_frozen(freeze_widths(state[STATISTICS], jnp.bool_(False)))
    variables = {**variables, STATISTICS: freeze_widths(state[STATISTICS], jnp.bool_(True))}
    assert widths_frozen(variables[STATISTICS])
    variables = {**variables, PARAMETERS: {**variables[PARAMETERS], "step": step / 9}}
    q, state = model.apply(variables, X, mutable=[STATISTICS])
    assert bits_of(q) == state[STATISTICS]["bits"] == 3
    assert widths_frozen({}) is None
    stacked = {"one": {"frozen": jnp.bool_(True)}, "repeated": {"frozen": jnp.asarray([True, False])}}
    assert not widths_frozen(stacked) and widths_frozen(freeze_widths(stacked))


@pytest.mark.thorough
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_whatever_the_update_the_width_stays_in_bounds(parametrization):
    model, variables = calibrated(parametrization=parametrization, min_bits=3, max_bits=6)
    state, rng = constraint_of(model, variables), np.random.default_rng(0)
    for _ in range(200):
        wild = {name: jnp.float32(rng.normal() * 10 ** rng.uniform(-6, 6)) for name in variables[PARAMETERS]}
        parameters = constrain(wild, state)
        q = model.apply({**variables, PARAMETERS: parameters}, X)
        assert 3 <= bits_of(q) <= 6
        assert q.scale > 0 and np.isfinite(q.value).all()
        again = constrain(parameters, state)
        np.testing.assert_allclose(jax.tree.leaves(again), jax.tree.leaves(parameters), rtol=1e-6)


def test_the_step_never_exceeds_the_range():
    model, variables = calibrated()
    parameters = constrain(
        {"step": jnp.float32(0.9), "x_max": jnp.float32(0.5)}, constraint_of(model, variables)
    )
    assert parameters["step"] == parameters["x_max"] == 0.5  # Two bits.


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_gradients_are_limited_to_a_step(parametrization):
    model, variables = calibrated(parametrization=parametrization)
    state, step = constraint_of(model, variables), float(model.apply(variables, X).scale)
    huge = {name: jnp.float32(-1e6) for name in variables[PARAMETERS]}
    limited = limit_gradients(huge, variables[PARAMETERS], state)
    for name, value in limited.items():
        np.testing.assert_allclose(value, -1 if name == "bits" else -step, rtol=1e-6)
    tiny = {name: jnp.float32(1e-6) for name in variables[PARAMETERS]}
    assert limit_gradients(tiny, variables[PARAMETERS], state) == tiny


def test_the_paper_s_start():
    model, variables = calibrated(start="paper")
    largest = np.max(np.abs(X))
    assert variables[PARAMETERS]["step"] == 2.0 ** np.floor(np.log2(largest / 7))
    assert variables[PARAMETERS]["x_max"] == 7 * variables[PARAMETERS]["step"]
    model, variables = calibrated(weights=False, bits=6, start="paper")
    assert variables[PARAMETERS] == {"step": 2.0**-3, "x_max": 63 / 8}


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(bits=0), "bits=0: starts outside 1 to max_bits=8 bits"),
        (dict(bits=9), "bits=9: starts outside 1 to max_bits=8 bits"),
        (dict(bits=4, max_bits=17), "max_bits=17: a learned width has at most 16 bits"),
        (dict(bits=4, min_bits=9), "min_bits=9: must be from 1 to max_bits=8"),
        (dict(bits=4, parametrization="step"), "parametrization='step': unknown"),
        (dict(bits=4, min_step=2.0), "min_step=2.0: must be below max_step=1.0"),
        (dict(bits=4, max_range=-1.0), "max_range=-1.0: must be positive"),
        (dict(bits=4, power_of_two="yes"), "power_of_two='yes': must be True or False"),
        (dict(bits=4, start="zero"), "start='zero': unknown"),
    ],
)
def test_impossible_specs(fields, message):
    with pytest.raises(UserError, match=message):
        MixedPrecision(**fields)


@pytest.mark.parametrize("fields", [dict(bits=1), dict(bits=4, min_bits=1)])
def test_signed_data_has_no_single_bit(fields):
    with pytest.raises(UserError, match="bits=1: signed data has at least 2"):
        quantizer_of(MixedPrecision(**fields), weights=True).init(jax.random.key(0), X)
