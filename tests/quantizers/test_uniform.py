"""The quantizer module: every kind of scale, its variables, modes and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.quantizers import PARAMETERS, STATISTICS, Uniform, calibrate, quantizer_of
from qflax.quantizers.collections import CALIBRATION, GIVEN

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(16, 3, 8)) * np.linspace(0.5, 2, 8)).astype(np.float32)
GY = RNG.normal(size=X.shape).astype(np.float32)

WEIGHT_SCALES = ("constant", "static", "statistic", "ema", "lsq", "log2", "range", "pact", "dorefa")
ACTIVATION_SCALES = tuple(scale for scale in WEIGHT_SCALES if scale not in ("statistic", "dorefa"))
ONE_SCALE = ("constant", "dorefa")  # Scales that are the same for all channels.
COMBINATIONS = [
    *((True, scale, "per_tensor", True) for scale in WEIGHT_SCALES),
    *((False, scale, "per_tensor", True) for scale in ACTIVATION_SCALES),
    *((True, scale, "per_channel", True) for scale in WEIGHT_SCALES if scale not in ONE_SCALE),
    *((False, scale, "per_channel", True) for scale in ACTIVATION_SCALES if scale not in ONE_SCALE),
    *((False, scale, "per_tensor", False) for scale in ("static", "ema", "lsq", "range")),
]


def make(scale, weights=False, signed=True, axis_name=None, **fields):
    if scale == "constant":
        fields.setdefault("scale_value", 0.5)
    spec = Uniform(**{"bits": 4, "scale": scale, **fields})
    return quantizer_of(spec, weights=weights, signed=signed, axis_name=axis_name)


def calibrated(model, *batches):
    return calibrate(model, model.init(jax.random.key(0), batches[0]), batches)


def codes_of(q):
    return np.float64(q.value) / np.float64(q.scale) + np.float64(q.zero_point)


def gradients(model, variables, x=X, gy=GY):
    """Of `sum(gy * y)` for the quantizer's parameters and for x."""
    rest = {name: value for name, value in variables.items() if name != PARAMETERS}

    def loss(params, x):
        return jnp.sum(gy * model.apply({**rest, PARAMETERS: params}, x).value)

    return jax.grad(loss, argnums=(0, 1))(variables.get(PARAMETERS, {}), jnp.asarray(x))


@pytest.mark.thorough
@pytest.mark.parametrize(("weights", "scale", "granularity", "symmetric"), COMBINATIONS)
def test_calibrated_quantizer_is_on_its_grid_with_finite_gradients(weights, scale, granularity, symmetric):
    # One shape of fast statistic for all: the others have tests of their own.
    model = make(
        scale, weights, granularity=granularity, symmetric=symmetric, statistic="percentile", percentile=98.0
    )
    variables = calibrated(model, X)
    q = jax.jit(model.apply)(variables, X)
    assert q.value.dtype == q.scale.dtype == q.zero_point.dtype == jnp.float32
    assert q.value.shape == X.shape
    codes = codes_of(q)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert np.min(codes) > q.format.lowest - 0.5 and np.max(codes) < q.format.highest + 0.5
    assert len(np.unique(np.round(codes))) > 8
    assert q.scale.shape == ((8,) if granularity == "per_channel" else ())
    assert (q.zero_point != 0) == (not symmetric)
    if scale != "dorefa":
        # At 4 bits, and with 2 percent clipped.
        assert np.mean((q.value - X) ** 2) < 0.1 * np.mean(X**2)
    for leaf in jax.tree.leaves(gradients(model, variables)):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)


@pytest.mark.parametrize(
    ("scale", "symmetric", "parameters", "statistics"),
    [
        ("constant", True, set(), set()),
        ("statistic", True, set(), set()),
        ("dorefa", True, set(), set()),
        ("static", True, set(), {"count", "x_max"}),
        ("ema", True, set(), {"count", "x_max"}),
        ("lsq", True, {"scale"}, {"count", "x_max"}),
        ("log2", True, {"log2_scale"}, {"count", "x_max"}),
        ("range", True, {"x_max"}, {"count", "x_max"}),
        ("pact", True, {"x_max"}, {"count", "x_max"}),
        ("lsq", False, {"scale", "x_min"}, {"count", "x_min", "x_max"}),
        ("range", False, {"width", "x_min"}, {"count", "x_min", "x_max"}),
        ("static", False, set(), {"count", "x_min", "x_max"}),
        ("ema", False, set(), {"count", "x_min", "x_max"}),
    ],
)
def test_variables_are_the_documented_ones_and_fresh_ones_are_uncalibrated(
    scale, symmetric, parameters, statistics
):
    weights = scale in ("statistic", "dorefa")
    variables = make(scale, weights, symmetric=symmetric).init(jax.random.key(0), X)
    assert set(variables.get(PARAMETERS, {})) == parameters
    assert set(variables.get(STATISTICS, {})) == statistics
    if statistics:
        assert variables[STATISTICS]["count"] == 0


@pytest.mark.parametrize("scale", ["statistic", "dorefa"])
def test_scales_of_weights_are_refused_for_activations(scale):
    with pytest.raises(UserError, match=f"scale='{scale}' is for weights"):
        make(scale).init(jax.random.key(0), X)


def test_asymmetric_weights_are_refused():
    with pytest.raises(UserError, match="symmetric=False is for activations"):
        make("lsq", weights=True, symmetric=False).init(jax.random.key(0), X)


def test_the_tanh_staircase_is_refused_for_a_signed_bit():
    with pytest.raises(UserError, match="surrogate='tanh': .* from -1 to 1"):
        make("lsq", bits=1, surrogate="tanh").init(jax.random.key(0), X)
    make("lsq", bits=1, surrogate="tanh", signed=False).init(jax.random.key(0), X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_gives_float32_values(dtype):
    x = jnp.asarray(X, dtype)
    q = make("constant").apply({}, x)
    assert q.value.dtype == jnp.float32
    np.testing.assert_array_equal(q.value, make("constant").apply({}, x.astype(jnp.float32)).value)


@pytest.mark.parametrize("scale", ["static", "lsq", "log2", "range"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_scales_and_values_are_the_same_with_and_without_jit(scale, granularity):
    model = make(scale, granularity=granularity, statistic="absmax")
    variables = calibrated(model, X)
    eager, jitted = model.apply(variables, X), jax.jit(model.apply)(variables, X)
    np.testing.assert_array_equal(eager.scale, jitted.scale)
    np.testing.assert_array_equal(eager.value, jitted.value)


# PACT, DoReFa, LSQ, log2.


@pytest.mark.parametrize("signed", [False, True])
def test_pact_trains_its_level_by_clipped_elements_only(signed):
    model = make("pact", signed=signed, narrow=True)
    variables = {PARAMETERS: {"x_max": jnp.float32(1.5)}, STATISTICS: {"count": jnp.int32(1)}}
    params, grad_x = gradients(model, variables)
    level = np.float32(1.5)
    above, below = level <= X, (-level >= X) if signed else np.zeros_like(X, bool)
    inside = ~above & ~below & ((X >= 0) | signed)
    np.testing.assert_allclose(grad_x, np.where(inside, GY, 0), rtol=1e-6)
    expected = np.sum(GY * above, dtype=np.float64) - np.sum(GY * below, dtype=np.float64)
    assert params["x_max"] == pytest.approx(expected, abs=float(1e-6 * (1 + np.sum(np.abs(GY)))))


def test_dorefa_squashes_weights_onto_the_odd_symmetric_grid():
    model = make("dorefa", weights=True)
    q, negated = model.apply({}, X), model.apply({}, -X)
    squashed = np.tanh(np.float64(X)) / np.max(np.abs(np.tanh(np.float64(X))))
    np.testing.assert_allclose(q.value, np.round(squashed * 7) / 7, atol=1e-6)
    np.testing.assert_array_equal(q.value, -negated.value)
    assert q.scale == np.float32(1 / 7) and jnp.max(jnp.abs(q.value)) == pytest.approx(1)


def test_dorefa_gradient_is_that_of_the_squashed_weights():
    def squash(x):
        return jnp.sum(GY * jnp.tanh(x) / jnp.max(jnp.abs(jnp.tanh(x))))

    got = gradients(make("dorefa", weights=True), {})[1]
    np.testing.assert_allclose(got, jax.grad(squash)(jnp.asarray(X)), rtol=1e-4, atol=1e-5)


def test_dorefa_weights_can_leave_zeros():
    model = make("dorefa", weights=True)
    assert not model.apply({}, 0 * X).value.any()
    np.testing.assert_allclose(gradients(model, {}, 0 * X)[1], GY, rtol=1e-6)


def test_gradient_scale_of_lsq_counts_one_example_of_activations():
    model = make("lsq", signed=True)
    variables = {PARAMETERS: {"scale": jnp.float32(0.3)}, STATISTICS: {"count": jnp.int32(1)}}
    once = gradients(model, variables)[0]["scale"]
    # The mean loss over a batch that holds every example twice has the same gradient.
    twice = gradients(model, variables, np.concatenate([X, X]), np.concatenate([GY, GY]) / 2)[0]["scale"]
    assert twice == pytest.approx(float(once), rel=1e-5)
    plain = jax.grad(lambda s: jnp.sum(GY * model.format.fake_quant(X, s, estimator=model.spec.estimator)))(
        0.3
    )
    assert once == pytest.approx(float(plain) / np.sqrt(X[0].size * 7), rel=1e-5)


def test_lsq_takes_a_batch_of_nothing():
    model = make("lsq")
    variables = calibrated(model, X)
    assert not gradients(model, variables, X[:0], GY[:0])[0]["scale"]


@pytest.mark.parametrize(("granularity", "count"), [("per_tensor", X.size), ("per_channel", X.size // 8)])
def test_gradient_scale_of_lsq_counts_the_weights_of_one_scale(granularity, count):
    model = make("lsq", weights=True, granularity=granularity)
    scale = jnp.full((8,) if granularity == "per_channel" else (), 0.3)
    got = gradients(model, {PARAMETERS: {"scale": scale}, STATISTICS: {"count": jnp.int32(1)}})[0]["scale"]
    plain = jax.grad(lambda s: jnp.sum(GY * model.format.fake_quant(X, s, estimator=model.spec.estimator)))(
        scale
    )
    np.testing.assert_allclose(got, plain / np.sqrt(count * 7), rtol=1e-5)


def test_lsq_plus_scales_the_gradient_of_its_offset_too():
    model = make("lsq", symmetric=False)
    params = {"scale": jnp.float32(0.2), "x_min": jnp.float32(-1.2)}
    variables = {PARAMETERS: params, STATISTICS: {"count": jnp.int32(1)}}
    got = gradients(model, variables)[0]["x_min"]
    # The zero point is 6; elements count as clipped before rounding.
    u = X / np.float32(0.2) + 6
    outside = (u <= 0) | (u >= 15)
    expected = np.sum(GY * outside, dtype=np.float64) / np.sqrt(X[0].size * 15)
    assert got == pytest.approx(expected, rel=1e-4)


def test_log2_gradient_is_that_of_the_scale_times_its_derivative():
    model = make("log2", statistic="absmax")
    variables = calibrated(model, X)
    scale = model.apply(variables, X).scale
    assert scale == pytest.approx(float(jnp.exp2(variables[PARAMETERS]["log2_scale"])))
    got = gradients(model, variables)[0]["log2_scale"]
    plain = jax.grad(lambda s: jnp.sum(GY * model.format.fake_quant(X, s)))(scale)
    assert got == pytest.approx(float(plain * scale) * np.log(2), rel=1e-4)


@pytest.mark.parametrize("scale", WEIGHT_SCALES)
def test_power_of_two_scales_are_powers_of_two(scale):
    granularity = "per_tensor" if scale in ONE_SCALE else "per_channel"
    model = make(scale, weights=True, power_of_two=True, granularity=granularity, statistic="absmax")
    q = model.apply(calibrated(model, X), X)
    mantissa, _ = np.frexp(q.scale)
    np.testing.assert_array_equal(mantissa, 0.5)


# Running averages, calibration state, stochastic rounding.


def test_running_average_moves_in_training_and_rests_in_evaluation():
    model = make("ema", statistic="absmax", momentum=0.25)
    state = model.init(jax.random.key(0), X)
    expected = None
    for factor in (1.0, 2.0, 0.5):
        q, state = model.apply(state, factor * X, mutable=[STATISTICS])
        own = factor * np.max(np.abs(X))
        expected = own if expected is None else 0.75 * expected + 0.25 * own
        assert q.scale == pytest.approx(own / 8, rel=1e-6)  # Training quantizes by the batch's own range.
        assert state[STATISTICS]["x_max"] == pytest.approx(expected, rel=1e-6)
    assert state[STATISTICS]["count"] == 3
    for factor in (1.0, 100.0):
        assert model.apply(state, factor * X).scale == pytest.approx(expected / 8, rel=1e-6)


@pytest.mark.parametrize("scale", ["static", "lsq", "range"])
def test_other_scales_do_not_move_in_training(scale):
    model = make(scale)
    variables = calibrated(model, X)
    _, state = model.apply(variables, 5 * X, mutable=[STATISTICS])
    jax.tree.map(np.testing.assert_array_equal, state[STATISTICS], variables[STATISTICS])


@pytest.mark.skipif(jax.local_device_count() < 2, reason="needs two devices")
def test_running_average_is_that_of_all_devices():
    model = make("ema", statistic="absmax", axis_name="batch")
    state = model.init(jax.random.key(0), X[:8])
    halves = np.stack([X[:8], 3 * X[8:]])

    def step(state, x):
        return model.apply(state, x, mutable=[STATISTICS])[1][STATISTICS]["x_max"]

    ranges = jax.pmap(step, axis_name="batch", in_axes=(None, 0))(state, halves)
    expected = np.max(np.abs(halves))
    np.testing.assert_allclose(ranges, [expected, expected], rtol=1e-6)


@pytest.mark.parametrize(("statistic", "reduce"), [("absmax", None), ("percentile", np.mean)])
def test_devices_share_extremes_and_the_mean_of_other_statistics(statistic, reduce):
    model = make("ema", statistic=statistic, percentile=100, axis_name="batch", symmetric=False)
    state = model.init(jax.random.key(0), X[:8])
    halves = np.stack([X[:8], 3 * X[8:]])
    step = jax.vmap(lambda x: model.apply(state, x, mutable=[STATISTICS])[1][STATISTICS], axis_name="batch")
    new = step(halves)
    low, high = np.minimum(halves.min(axis=(1, 2, 3)), 0), np.maximum(halves.max(axis=(1, 2, 3)), 0)
    np.testing.assert_allclose(new["x_min"], [(reduce or np.min)(low)] * 2, rtol=1e-6)
    np.testing.assert_allclose(new["x_max"], [(reduce or np.max)(high)] * 2, rtol=1e-6)


def test_stochastic_rounding_is_unbiased_with_a_key_and_repeatable_without():
    model = make("constant", rounding="stochastic")
    nearest = make("constant").apply({}, X).value
    np.testing.assert_array_equal(model.apply({}, X).value, nearest)

    @jax.jit
    def mean(keys):
        def draw(key):
            return model.apply({}, X, rngs={"quantization": key}).value

        return jnp.mean(jax.lax.map(draw, keys), axis=0)

    inside = np.abs(X) < 0.5 * 7
    # Five standard deviations, with at most half a step each.
    bound = 5 * 0.25 / np.sqrt(2000)
    np.testing.assert_array_less(np.abs(mean(jax.random.split(jax.random.key(0), 2000)) - X)[inside], bound)


@pytest.mark.parametrize("scale", ["lsq", "pact"])
def test_activations_pass_unquantized_while_calibrating_and_weights_do_not(scale):
    for weights in (False, True):
        model = make(scale, weights=weights, statistic="percentile", percentile=90.0)
        state = model.init(jax.random.key(0), X)
        marked = [PARAMETERS, STATISTICS, *CALIBRATION.values()]
        for given in ({}, {GIVEN: {"x_max": jnp.float32(0.5)}}):  # Of a batch, or of a whole set.
            q, _ = model.apply({**state, **given}, X, mutable=marked)
            assert np.array_equal(q.value, X) == (not weights)
