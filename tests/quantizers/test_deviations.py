"""What quantizers report of the distances between weights and their grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.quantizers import (
    DEVIATIONS,
    AccumulatorAware,
    Minifloat,
    MixedPrecision,
    Uniform,
    calibrate,
    quantizer_of,
)

X = np.random.default_rng(0).normal(size=(5, 7, 4)).astype(np.float32)

# A range below the largest weights: some are beyond.
SPECS = {
    "lsq": (Uniform(bits=3, scale="lsq", statistic="percentile", percentile=90.0), 1.0),
    "per channel": (
        Uniform(bits=3, granularity="per_channel", statistic="percentile", percentile=90.0),
        1.0,
    ),
    "constant": (Uniform(bits=2, scale="constant", scale_value=1.0), 1.0),
    "minifloat": (Minifloat(exponent_bits=2, mantissa_bits=1, scale="constant", scale_value=0.2), 6 * 0.2),
    "learned width": (MixedPrecision(bits=3, statistic="percentile", percentile=90.0), None),
}


def reported(spec, x, mutable=(DEVIATIONS,)):
    """Function of x -> its value behind the quantizer, and what is reported."""
    model = quantizer_of(spec, weights=True)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    return jax.jit(lambda x: model.apply(variables, x, mutable=list(mutable)))


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_squared_distance_of_weights_within_the_range_and_pulls_them_to_their_points(name):
    apply = reported(SPECS[name][0], X)
    value = np.asarray(apply(X)[0].value)
    beyond = np.abs(X) > np.abs(value).max(tuple(range(X.ndim - 1)) if name == "per channel" else None)
    assert 0 < beyond.mean() < 0.5
    distance = np.where(beyond, 0, X - value)
    total, gradient = jax.value_and_grad(lambda x: apply(x)[1][DEVIATIONS]["weights"])(jnp.asarray(X))
    np.testing.assert_allclose(total, np.sum(distance**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * distance, rtol=1e-5, atol=1e-7)


def test_nothing_is_reported_unasked_nor_of_activations_nor_of_norms_for_accumulators():
    spec = Uniform(bits=4)
    assert not reported(spec, X, ())(X)[1]
    model = quantizer_of(spec, weights=False)
    variables = calibrate(model, model.init(jax.random.key(0), X), [X])
    assert not model.apply(variables, X, mutable=[DEVIATIONS])[1]
    model = quantizer_of(AccumulatorAware(bits=4, accumulator_bits=16), weights=True)
    inputs = quantizer_of(Uniform(bits=4, scale="constant", scale_value=1.0), weights=False).apply({}, X)
    variables = model.init(jax.random.key(0), X, inputs)
    assert not model.apply(variables, X, inputs, mutable=[DEVIATIONS])[1]
