"""Ranges of a set that comes in parts are those of the set in one piece, and calibration uses them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, Conv
from qflax.numerics import IntegerFormat, MinifloatFormat
from qflax.quantizers import (
    PARAMETERS,
    STATISTICS,
    Minifloat,
    MixedPrecision,
    Quantization,
    Truncation,
    Uniform,
    calibrate,
    quantizer_of,
    value_of,
)
from qflax.quantizers.observers import observer_of
from qflax.quantizers.statistics import STATISTICS_KINDS, Statistic

RNG = np.random.default_rng(0)
SHAPE = (32, 6, 5)  # The middle channel of `sparse` is all zero.
NORMAL = RNG.normal(size=SHAPE).astype(np.float32)
DATA = {
    "normal": NORMAL * np.float32([1, 2, 3, 4, 5]),
    "tied": np.round(3 * NORMAL) / 3,
    "sparse": np.maximum(NORMAL, 0) * np.float32([1, 0.1, 0, 3, 1]),
    "outlier": np.where(np.arange(NORMAL.size).reshape(SHAPE) == 77, np.float32(-50), NORMAL),
    "positive": np.abs(NORMAL) + 1,
}
EXACT = ("absmax", "percentile")


def statistic_of(kind, *, bits=4, signed=True, symmetric=True, per_channel=False, percentile=97.0):
    fmt = IntegerFormat(bits=bits, signed=signed and symmetric)
    return Statistic(
        kind=kind, format=fmt, symmetric=symmetric, per_channel=per_channel, percentile=percentile
    )


def observed(statistic, parts):
    observer = observer_of(statistic)
    while not observer.done:
        for part in parts:
            observer.update(part)
        observer.end_pass()
    return observer.ends()


def check(statistic, parts, x):
    got, (low, high) = observed(statistic, parts), jax.jit(statistic.range_of)(x)
    expected = {"x_max": high} if low is None else {"x_min": low, "x_max": high}
    assert got.keys() == expected.keys()
    for name, end in got.items():
        assert (end.dtype, end.shape) == (jnp.float32, expected[name].shape)
        if statistic.kind in EXACT:
            np.testing.assert_array_equal(end, expected[name])
        else:
            # Sums of parts are rounded otherwise than sums of all; ranges up to 1e-10 count as none.
            np.testing.assert_allclose(end, expected[name], rtol=1e-6, atol=1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", STATISTICS_KINDS)
@pytest.mark.parametrize(("per_channel", "signed"), [(False, False), (True, True)])
def test_symmetric_range_of_parts_is_that_of_the_whole(kind, per_channel, signed):
    statistic = statistic_of(kind, signed=signed, per_channel=per_channel)
    for x in DATA.values():
        check(statistic, np.split(x, 4), x)
        check(statistic, [x], x)


@pytest.mark.parametrize("kind", ["absmax", "percentile", "mse"])
def test_asymmetric_range_of_parts_is_that_of_the_whole(kind):
    statistic = statistic_of(kind, symmetric=False)
    for x in [*DATA.values(), -DATA["positive"]]:
        check(statistic, np.split(x, 4), x)
        check(statistic, [x], x)


@pytest.mark.parametrize("kind", ["absmax", "percentile", "mse"])
def test_minifloats_are_observed_too(kind):
    fmt = MinifloatFormat(exponent_bits=4, mantissa_bits=3)
    statistic = Statistic(kind=kind, format=fmt, symmetric=True, per_channel=False, percentile=90.0)
    check(statistic, np.split(DATA["normal"], 4), DATA["normal"])


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"symmetric": False}])
def test_a_percentile_is_at_least_the_smallest_element(options):
    for x in DATA.values():
        check(statistic_of("percentile", percentile=0.01, **options), np.split(x, 4), x)


@pytest.mark.parametrize("options", [{"per_channel": True}, {"symmetric": False}])
@pytest.mark.parametrize("kind", EXACT)
def test_exact_ranges_do_not_depend_on_the_parts(kind, options):
    for x in DATA.values():
        eights, halves, uneven = (
            observed(statistic_of(kind, **options), np.split(x, at)) for at in (4, 2, [8])
        )
        jax.tree.map(np.testing.assert_array_equal, eights, halves)
        jax.tree.map(np.testing.assert_array_equal, eights, uneven)


def test_percentile_takes_every_float_for_what_it_is():
    # Neighbours, and powers of two from the smallest normal number to the largest.
    steps = np.float32(1) + np.arange(60, dtype=np.float32) * np.finfo(np.float32).eps
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    ordered = np.unique(np.concatenate([-powers, -steps, steps, powers]).astype(np.float32))
    statistic = statistic_of("percentile", symmetric=False, percentile=100.0)
    for low, high in RNG.integers([0, len(ordered) // 2], [len(ordered) // 2, len(ordered)], (60, 2)):
        x = RNG.permuted(RNG.choice(ordered[low : high + 1], 98))
        x = np.append(x, ordered[[low, high]])
        ends = observed(statistic, np.split(RNG.permutation(x)[:, None], 2))
        assert (ends["x_min"], ends["x_max"]) == (ordered[low], ordered[high])


@pytest.mark.parametrize("kind", STATISTICS_KINDS)
def test_memory_does_not_grow_with_the_parts(kind):
    def sizes(parts):
        observer, seen = observer_of(statistic_of(kind, per_channel=True)), []
        while not observer.done:
            for part in parts:
                observer.update(part)
            seen.append(sorted(value.nbytes for value in vars(observer).values() if hasattr(value, "nbytes")))
            observer.end_pass()
        return seen

    assert sizes([DATA["normal"][:8]]) == sizes([*np.split(DATA["normal"], 4)] * 3)


class Reiterable:
    """Batches that count the passes over them."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        yield from self.batches
        self.passes += 1


def numbers(variables):
    """All numbers of quantizers but the counts of batches."""
    leaves = jax.tree.leaves_with_path({name: variables.get(name, {}) for name in (PARAMETERS, STATISTICS)})
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if path[-1].key != "count"}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "spec",
    [
        Uniform(bits=4, scale="lsq"),
        Uniform(bits=4, scale="static", statistic="percentile", percentile=95, granularity="per_channel"),
        Uniform(bits=4, scale="range", symmetric=False, statistic="mse"),
        Uniform(bits=4, scale="lsq", symmetric=False, statistic="absmax"),
        Uniform(bits=4, scale="log2", statistic="mean"),
        Minifloat(exponent_bits=4, mantissa_bits=3, scale="static", statistic="mse"),
        MixedPrecision(bits=4, statistic="percentile", granularity="per_channel"),
    ],
)
def test_over_the_set_is_over_one_batch_of_all(spec):
    model, x = quantizer_of(spec, weights=False), DATA["sparse"] - 0.1 * DATA["positive"]
    variables = model.init(jax.random.key(0), x)
    got = calibrate(model, variables, np.split(x, 4), over="set")
    assert_close(numbers(got), numbers(calibrate(model, variables, [x])))
    assert numbers(got).keys() == numbers(variables).keys()
    assert got[STATISTICS]["count"] == 1


class Net(nn.Module):
    """Two convolutions and one quantizer for the outputs of both."""

    quantization: Quantization

    @nn.compact
    def __call__(self, x):
        shared = Activation(quantization=self.quantization, name="act")
        x = shared(Conv(4, (3, 3), quantization=self.quantization, name="conv0")(x))
        x = shared(Conv(4, (3, 3), quantization=self.quantization, name="conv1")(x))
        return value_of(Activation(nn.tanh, quantization=self.quantization, name="last")(value_of(x)))


IMAGES = RNG.normal(size=(8, 6, 6, 3)).astype(np.float32)


def net(statistic):
    spec = Uniform(bits=4, scale="range", statistic=statistic, percentile=99)
    model = Net(Quantization(weights=Uniform(bits=4), activations=spec))
    return model, model.init(jax.random.key(0), IMAGES)


@pytest.mark.thorough
def test_all_calls_of_a_shared_quantizer_count():
    model, variables = net("percentile")
    got = calibrate(model, variables, np.split(IMAGES, 4), over="set")
    once = calibrate(model, variables, [IMAGES], over="batches")
    for name in ("conv0", "conv1", "last"):
        assert_close(
            numbers({PARAMETERS: got[PARAMETERS][name]}), numbers({PARAMETERS: once[PARAMETERS][name]})
        )
    # What the shared one saw in both of its calls, of float activations behind quantized weights.
    floats = Net(Quantization(weights=Uniform(bits=4)))
    weights = {**got, PARAMETERS: {name: got[PARAMETERS][name] for name in ("conv0", "conv1")}}
    outputs = floats.apply(weights, IMAGES, capture_intermediates=True, mutable=["intermediates"])[1]
    calls = outputs["intermediates"]["act"]["__call__"]
    assert len(calls) == 2
    expected = statistic_of("percentile", signed=False, percentile=99).range_of(jnp.concatenate(calls))[1]
    assert got[PARAMETERS]["act"]["activations"]["x_max"] == pytest.approx(float(expected), rel=1e-5)


def test_weights_and_their_ranges_are_the_same_however_activations_are_calibrated():
    model, variables = net("absmax")
    results = [calibrate(model, variables, [IMAGES] * 3, over=over) for over in ("batches", "ema", "set")]
    for got in results:
        assert got.keys() == variables.keys()
        jax.tree.map(np.testing.assert_array_equal, got["params"], variables["params"])
        for name in ("conv0", "conv1"):
            jax.tree.map(np.testing.assert_array_equal, got[PARAMETERS][name], results[0][PARAMETERS][name])


@pytest.mark.parametrize("over", ["ema", "set"])
def test_roles_left_out_keep_their_ranges(over):
    model, variables = net("absmax")
    got = calibrate(model, variables, [IMAGES], over=over, roles=("weights",))
    for name in ("act", "last"):
        jax.tree.map(np.testing.assert_array_equal, got[STATISTICS][name], variables[STATISTICS][name])
    assert got[STATISTICS]["conv0"]["weights"]["count"] == 1


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({"statistic": "absmax"}, 1),
        ({"statistic": "mse"}, 2),
        ({"statistic": "kl"}, 2),
        ({"statistic": "percentile"}, 3),
        ({"scale": "constant", "scale_value": 0.1}, 0),
    ],
)
def test_passes_are_those_that_the_statistics_need(fields, passes):
    class Truncated(nn.Module):
        @nn.compact
        def __call__(self, x):
            spec = Uniform(**{"bits": 8, "scale": "static", **fields})
            y = quantizer_of(spec, weights=False, name="activations")(x)
            return quantizer_of(Truncation(bits=4), weights=False, name="truncated")(y.value, y).value

    batches = Reiterable(np.split(NORMAL, 4))
    variables = {STATISTICS: {}, **Truncated().init(jax.random.key(0), NORMAL)}
    calibrate(Truncated(), variables, batches, over="set")
    assert batches.passes == passes * bool(variables[STATISTICS])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("statistic", ["absmax", "percentile"])
def test_ema_starts_at_the_first_batch_and_moves_by_its_momentum(symmetric, statistic):
    spec = Uniform(bits=8, scale="static", statistic=statistic, percentile=90, symmetric=symmetric)
    model, batches = quantizer_of(spec, weights=False), [NORMAL, 3 * NORMAL, 0 * NORMAL, 2 * NORMAL]
    variables = model.init(jax.random.key(0), NORMAL)
    got = calibrate(model, variables, iter(batches), over="ema", momentum=0.25)[STATISTICS]
    each = [calibrate(model, variables, [batch])[STATISTICS] for batch in batches]
    for name in set(got) - {"count"}:
        expected = float(each[0][name])
        for batch in (each[1], each[3]):  # That of zeros has no say.
            expected = 0.75 * expected + 0.25 * float(batch[name])
        assert got[name] == pytest.approx(expected, rel=1e-5)
    assert got["count"] == 4


@pytest.mark.parametrize(
    ("options", "batches", "message"),
    [
        ({"over": "sets"}, [NORMAL], "over='sets'.*batches, ema, set"),
        ({"over": "ema", "momentum": 0}, [NORMAL], "momentum=0"),
        ({"over": "set"}, iter([NORMAL]), "over='set'.*only once.*list"),
        ({"over": "set"}, [], "over='set'.*empty"),
        ({}, [], "over='batches': batches is empty"),
        ({"over": "ema"}, iter([]), "over='ema': batches is empty, or used up"),
    ],
)
def test_impossible_calls_say_so(options, batches, message):
    model = quantizer_of(Uniform(bits=8), weights=False)
    with pytest.raises(UserError, match=message):
        calibrate(model, model.init(jax.random.key(0), NORMAL), batches, **options)
