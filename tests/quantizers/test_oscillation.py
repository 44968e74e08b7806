"""Iterative weight freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.quantizers import (
    AccumulatorAware,
    Minifloat,
    MixedPrecision,
    Uniform,
    calibrate,
    freeze_widths,
    frozen_share,
    quantizer_of,
    set_oscillation_threshold,
)

SHAPE = (3, 5, 4)
SPECS = {
    "lsq": Uniform(bits=3),
    "per channel": Uniform(bits=3, granularity="per_channel", scale="log2"),
    "statistic": Uniform(bits=4, scale="statistic"),
    "signs": Uniform(bits=1),
    "tanh": Uniform(bits=3, scale="dorefa"),
    "minifloat": Minifloat(exponent_bits=2, mantissa_bits=1, scale="range"),
    "unscaled minifloat": Minifloat(exponent_bits=2, mantissa_bits=1),
    "learned width": MixedPrecision(bits=3),
}
# Frequencies at which some of the weights of `walk` freeze, and some do not.
THRESHOLDS = {"signs": 0.05, "statistic": 0.22, "tanh": 0.08, "minifloat": 0.14, "unscaled minifloat": 0.16}


def start(spec, x):
    """A quantizer of weights that freezes, and its variables, calibrated, of widths that are frozen."""
    model = quantizer_of(spec, weights=True, freezes_oscillating=True)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    return model, {**variables, "quantizer_stats": freeze_widths(variables["quantizer_stats"])}


def training_step(model):
    """Function of variables and weights -> the quantized weights, and the variables after the step."""

    @jax.jit
    def step(variables, x):
        y, new = model.apply(variables, x, mutable=["quantizer_stats"])
        return y, {**variables, **new}

    return step


def walk(steps, seed=0):
    """Weights [steps, *SHAPE] that tremble about points of their own and drift."""
    random = np.random.default_rng(seed)
    drift = np.cumsum(random.normal(size=(steps, *SHAPE)), 0) * 0.01
    return (random.normal(size=SHAPE) + drift + 0.15 * random.normal(size=(steps, *SHAPE))).astype(np.float32)


def frozen_by_the_paper(free, threshold, nearest):
    """Codes of every step, and of evaluation after them, and weights that are frozen by then, weight by
    weight as in algorithm 1.

    Args:
      free: [steps, *SHAPE], the codes of weights that never freeze.
      threshold: of the frequency.
      nearest: function from a mean of codes to a code.
    """
    codes, frozen = np.concatenate((free, free[-1:])), np.zeros(SHAPE, bool)
    for i in np.ndindex(SHAPE):
        mean, frequency, direction = np.float32(free[(0, *i)]), np.float32(0), 0
        for t in range(1, len(free)):
            change = np.sign(free[(t, *i)] - free[(t - 1, *i)])
            oscillates = change != 0 and direction != 0 and change != direction
            frequency += np.float32(0.01) * (np.float32(oscillates) - frequency)
            mean += np.float32(0.01) * (np.float32(free[(t, *i)]) - mean)
            direction = change or direction
            if frequency > threshold:
                frozen[i] = True
                codes[(slice(t + 1, None), *i)] = nearest(mean)
                break
    return codes, frozen


@pytest.mark.parametrize("name", SPECS)
def test_weights_freeze_as_in_the_paper(name):
    xs = walk(60)
    threshold = THRESHOLDS.get(name, 0.08)
    model, variables = start(SPECS[name], xs[0])
    never, step = variables, training_step(model)
    stats = set_oscillation_threshold(variables["quantizer_stats"], threshold)
    variables, free, codes = {**variables, "quantizer_stats": stats}, [], []
    for x in xs:
        y, never = step(never, x)
        free.append(np.asarray(y.unscaled))
        y, variables = step(variables, x)
        codes.append(np.asarray(y.unscaled))
        np.testing.assert_array_equal(y.value, y.unscaled * y.scale)
    assert frozen_share(never["quantizer_stats"]) == 0
    points = np.unique(free)
    expected, frozen = frozen_by_the_paper(
        np.stack(free), np.float32(threshold), lambda mean: nearest(points, mean)
    )
    assert 0.1 < frozen.mean() < 0.9
    np.testing.assert_array_equal(codes, expected[:-1])
    np.testing.assert_allclose(frozen_share(variables["quantizer_stats"]), frozen.mean(), rtol=1e-6)
    # Evaluation has the same weights, whatever becomes of those beneath.
    y = model.apply(variables, xs[-1])
    np.testing.assert_array_equal(y.unscaled, expected[-1])
    moved = model.apply(variables, np.where(frozen, 0.1, xs[-1]).astype(np.float32))
    if name not in ("statistic", "tanh"):  # Their scales are made of all weights.
        np.testing.assert_array_equal(moved.unscaled, expected[-1])


def nearest(points, mean):
    """The point nearest to a mean, of two the one with the even index; of signs the upper."""
    distance = np.abs(points - mean)
    best = np.flatnonzero(distance == distance.min())
    return points[best[-1] if len(points) == 2 else best[0]]


def test_frozen_weights_pass_their_gradients_to_the_scale_alone():
    xs = walk(60)
    model, variables = start(Uniform(bits=3, clip_gradient="straight_through", scale="log2"), xs[0])
    stats = set_oscillation_threshold(variables["quantizer_stats"], 0.08)
    variables, step = {**variables, "quantizer_stats": stats}, training_step(model)
    for x in xs:
        _, variables = step(variables, x)
    held = np.asarray(variables["quantizer_stats"]["oscillation"]["held"])
    assert 0.1 < held.mean() < 0.9
    weights = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    def loss(parameters, x):
        return jnp.sum(weights * model.apply({**variables, "quantizer_params": parameters}, x).value)

    d_parameters, d_x = jax.grad(loss, (0, 1))(variables["quantizer_params"], xs[-1])
    np.testing.assert_array_equal(d_x, np.where(held, 0, weights))
    y = model.apply(variables, xs[-1])
    scale = float(y.scale)
    expected = np.sum(weights * np.where(held, y.unscaled, y.unscaled - xs[-1] / scale)) * scale * np.log(2)
    np.testing.assert_allclose(d_parameters["log2_scale"], expected, rtol=1e-4)


def test_frozen_weights_follow_the_scale():
    xs = walk(60)
    model, variables = start(Uniform(bits=3, scale="log2"), xs[0])
    stats = set_oscillation_threshold(variables["quantizer_stats"], 0.08)
    variables, step = {**variables, "quantizer_stats": stats}, training_step(model)
    for x in xs:
        _, variables = step(variables, x)
    held = np.asarray(variables["quantizer_stats"]["oscillation"]["held"])
    before = model.apply(variables, xs[-1])
    wider = jax.tree.map(lambda log2_scale: log2_scale + 0.7, variables["quantizer_params"])
    after = model.apply({**variables, "quantizer_params": wider}, xs[-1])
    same = np.asarray(before.unscaled == after.unscaled)
    assert same[held].all() and not same[~held].all()


def test_another_calibration_lets_go():
    xs = walk(60)
    model, variables = start(Uniform(bits=3, scale="log2"), xs[0])
    stats = set_oscillation_threshold(variables["quantizer_stats"], 0.08)
    started, step = {**variables, "quantizer_stats": stats}, training_step(model)
    variables = started
    for x in xs:
        _, variables = step(variables, x)
    same = calibrate(model, variables, [xs[0]], roles=("activations",))
    assert frozen_share(same["quantizer_stats"]) == frozen_share(variables["quantizer_stats"]) > 0
    jax.tree.map(np.testing.assert_array_equal, calibrate(model, variables, [xs[0]]), started)


def test_while_a_width_is_learned_nothing_freezes():
    xs = walk(60)
    model = quantizer_of(MixedPrecision(bits=3), weights=True, freezes_oscillating=True)
    variables = calibrate(model, model.init(jax.random.key(0), xs[0]), [xs[0]])
    stats = set_oscillation_threshold(variables["quantizer_stats"], 0.01)
    variables, step = {**variables, "quantizer_stats": stats}, training_step(model)
    for x in xs:
        _, variables = step(variables, x)
    record = variables["quantizer_stats"]["oscillation"]
    assert record["steps"] == 0 and not record["frequency"].any() and not record["held"].any()


def test_learned_widths_of_more_than_four_bits_do_not_freeze():
    xs = walk(60)
    model = quantizer_of(
        MixedPrecision(bits=3, granularity="per_channel"), weights=True, freezes_oscillating=True
    )
    variables = calibrate(model, model.init(jax.random.key(0), xs[0]), [xs[0]])
    stats = set_oscillation_threshold(freeze_widths(variables["quantizer_stats"]), 0.02)
    stats = {**stats, "bits": jnp.float32([4, 4, 5, 6])}
    variables, step = {**variables, "quantizer_stats": stats}, training_step(model)
    for x in xs:
        _, variables = step(variables, x)
    record = variables["quantizer_stats"]["oscillation"]
    often, held = np.any(record["frequency"] > 0.02, (0, 1)), np.any(record["held"], (0, 1))
    assert often[1:].all() and held[1:].tolist() == [True, False, False]


def test_only_weights_on_the_nearest_points_have_records():
    x = walk(1)[0]
    model = quantizer_of(Uniform(bits=3), weights=True)
    assert frozen_share(model.init(jax.random.key(0), x)["quantizer_stats"]) is None
    model = quantizer_of(Uniform(bits=3, scale="static"), weights=False, freezes_oscillating=True)
    assert frozen_share(model.init(jax.random.key(0), x)["quantizer_stats"]) is None
    inputs = quantizer_of(Uniform(bits=4, scale="constant", scale_value=1.0), weights=False).apply({}, x)
    spec = AccumulatorAware(bits=4, accumulator_bits=16)
    model = quantizer_of(spec, weights=True, freezes_oscillating=True)
    assert frozen_share(model.init(jax.random.key(0), x, inputs)["quantizer_stats"]) is None
    model = quantizer_of(Uniform(bits=5), weights=True, freezes_oscillating=True)
    assert frozen_share(model.init(jax.random.key(0), x)["quantizer_stats"]) is None
    model = quantizer_of(Uniform(bits=3, rounding="floor"), weights=True, freezes_oscillating=True)
    with pytest.raises(UserError, match=r"rounding='floor': weights that oscillate freeze at the nearest"):
        model.init(jax.random.key(0), x)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5, float("nan")])
def test_what_is_no_threshold(threshold):
    with pytest.raises(UserError, match=r"threshold=.*: a frequency of oscillations is in \(0, 1\]"):
        set_oscillation_threshold({}, threshold)
