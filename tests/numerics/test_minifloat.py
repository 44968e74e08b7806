"""Minifloats are bit-exact against ml_dtypes and against their own table of values."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflax.errors import UserError
from qflax.numerics import MinifloatEstimator, MinifloatFormat

pytestmark = pytest.mark.exact


def fmt(e, m, specials="none", **fields):
    return MinifloatFormat(exponent_bits=e, mantissa_bits=m, specials=specials, **fields)


PEERS = {
    "float4_e2m1fn": fmt(2, 1),
    "float6_e2m3fn": fmt(2, 3),
    "float6_e3m2fn": fmt(3, 2),
    "float8_e3m4": fmt(3, 4, "ieee"),
    "float8_e4m3": fmt(4, 3, "ieee"),
    "float8_e4m3b11fnuz": fmt(4, 3, "fnuz", bias=11),
    "float8_e4m3fn": fmt(4, 3, "nan"),
    "float8_e4m3fnuz": fmt(4, 3, "fnuz", bias=8),
    "float8_e5m2": fmt(5, 2, "ieee"),
    "float8_e5m2fnuz": fmt(5, 2, "fnuz", bias=16),
    "float8_e8m0fnu": fmt(8, 0, "nan", signed=False, subnormals=False),
    "float16": fmt(5, 10, "ieee"),
    "bfloat16": fmt(8, 7, "ieee"),
}
OWN = {
    "e3m1": fmt(3, 1),
    "e1m3": fmt(1, 3),
    "e1m0": fmt(1, 0),
    "e4m0": fmt(4, 0),
    "e5m3 of small values": fmt(5, 3, bias=30),
    "e5m3 of large values": fmt(5, 3, bias=-90),
    "unsigned e3m2": fmt(3, 2, signed=False),
    "e4m3 without subnormals": fmt(4, 3, subnormals=False),
    "e8m5": fmt(8, 5),
}


def peer(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def bits_of(values):
    return values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[values.itemsize])


def neighbours(x):
    """float32 values on both sides of `x`, and `x`, with both signs."""
    x = np.float32(x)
    # On patterns: nextafter may take subnormals for zero.
    bits = np.unique(np.concatenate([np.int64(x.view(np.uint32)) + d for d in (-1, 0, 1)]))
    bits = bits[(bits >= 0) & (bits <= 0x7F800000)]
    return np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)


def interesting(form):
    """Every value, every boundary between two, their neighbours, and 10^6 random values."""
    values = form.values[form.values <= np.finfo(np.float32).max]
    halves = (values[:-1] + values[1:]) / 2
    top = form.max * np.array([1, 1 + 2.0 ** -(form.mantissa_bits + 2), 1.2, 1.5, 1.75, 2, 2.5, 16])
    top = np.minimum(top, float(np.finfo(np.float32).max))
    tiny = form.min_subnormal * np.array([0, 1e-3, 0.25, 0.49, 0.5, 0.51, 0.75])
    listed = np.concatenate([values, halves, top, tiny, [1e-45, 1e-40, 1.2e-38, np.inf]])
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    near = rng.normal(size=500_000) * np.exp(rng.uniform(-8, 8, 500_000)) * form.min_normal
    x = np.concatenate([neighbours(listed), anything, np.float32(np.clip(near, -3e38, 3e38))])
    return x[~np.isnan(x)]


@pytest.mark.parametrize("name", PEERS)
def test_rounds_like_ml_dtypes_bit_for_bit(name):
    form = PEERS[name]
    x = interesting(form)
    if not form.signed:
        x = x[x > 0]
    clipped = np.clip(x, -form.max, form.max).astype(np.float32)
    expected = clipped.astype(peer(name))
    codes = np.asarray(jax.jit(form.encode)(x))
    np.testing.assert_array_equal(codes, bits_of(expected))
    values = np.asarray(jax.jit(form.fake_quant)(x)).view(np.uint32)
    np.testing.assert_array_equal(values, expected.astype(np.float32).view(np.uint32))


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name, form in PEERS.items() if form.specials != "none"])
def test_overflows_like_ml_dtypes_if_it_may(name):
    form = dataclasses.replace(PEERS[name], saturate=False)
    x = interesting(form)
    if not form.signed:
        x = x[x > 0]
    with np.errstate(over="ignore"):  # NumPy's own float16 tells of every overflow.
        expected = x.astype(peer(name))
    values = np.asarray(form.fake_quant(x))
    np.testing.assert_array_equal(values, expected.astype(np.float32))
    np.testing.assert_array_equal(form.decode(form.encode(x)), values)
    if form.specials == "ieee":
        np.testing.assert_array_equal(form.encode(x), bits_of(expected))


@pytest.mark.parametrize("name", PEERS)
def test_decodes_every_code_like_ml_dtypes(name):
    form = PEERS[name]
    codes = np.arange(2**form.bits, dtype=np.uint32)
    dtype = {1: np.uint8, 2: np.uint16}[peer(name).itemsize]
    expected = codes.astype(dtype).view(peer(name)).astype(np.float32)
    values = np.asarray(jax.jit(form.decode)(codes))
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(values.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(form.encode(values)[finite], codes[finite])
    info = ml_dtypes.finfo(peer(name))
    assert (form.bits, form.max) == (info.bits, float(info.max))
    if form.subnormals:
        assert form.min_normal == float(info.smallest_normal)
        assert form.min_subnormal == float(info.smallest_subnormal)


def nearest(form, x):
    """The nearest value, ties to the even pattern but without mantissa to the larger; in float64."""
    values = form.values
    magnitude = np.float64(np.abs(x)) if form.signed else np.maximum(np.float64(x), 0)
    magnitude = np.minimum(magnitude, form.max)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    down, up = magnitude - values[above - 1], values[above] - magnitude
    even = above % 2 == 0 if form.mantissa_bits else above > 1
    chosen = np.where((up < down) | ((up == down) & even), above, above - 1)
    return np.copysign(values[chosen], x) if form.signed else values[chosen]


@pytest.mark.parametrize("name", OWN)
def test_rounds_to_the_nearest_value(name):
    form = OWN[name]
    x = interesting(form)
    expected = nearest(form, x)
    values = jax.jit(form.fake_quant)(x)
    np.testing.assert_array_equal(values, expected.astype(np.float32))
    np.testing.assert_array_equal(jax.jit(form.decode)(jax.jit(form.encode)(x)), values)


@pytest.mark.parametrize("mantissa_bits", [22, 23])
def test_the_widest_formats_keep_float32_itself(mantissa_bits):
    x = interesting(fmt(8, 5))
    x = x[np.isfinite(x)]
    form = fmt(8, mantissa_bits)
    assert form.max == (2 - 2.0**-mantissa_bits) * 2.0**127
    if mantissa_bits == 23:
        np.testing.assert_array_equal(np.asarray(form.fake_quant(x)).view(np.uint32), x.view(np.uint32))
    np.testing.assert_array_equal(form.decode(form.encode(x)), form.fake_quant(x))


def test_lists_of_values():
    e3m1 = [0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]
    np.testing.assert_array_equal(fmt(3, 1).values, e3m1)
    maxima = {(4, 3, "nan"): 448, (4, 3, "none"): 480, (5, 2, "ieee"): 57344, (3, 2, "none"): 28}
    assert {key: fmt(*key).max for key in maxima} == maxima


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float4_e2m1fn", "float16"])
def test_nan_stays_nan(name):
    form = PEERS[name]
    x = jnp.array([jnp.nan, 1.0])
    np.testing.assert_array_equal(np.isnan(form.fake_quant(x)), [True, False])
    if form.specials == "none":
        assert form.encode(x)[0] == 0
    else:
        np.testing.assert_array_equal(np.isnan(form.decode(form.encode(x))), [True, False])


@given(
    e=st.integers(1, 8),
    m=st.integers(0, 10),
    seed=st.integers(0, 2**31),
    log2_scale=st.floats(-20, 20),
)
def test_decoded_codes_are_the_fake_quantized_values(e, m, seed, log2_scale):
    form, scale = fmt(e, m), np.float32(2**log2_scale)
    x = np.random.default_rng(seed).normal(size=500).astype(np.float32) * scale * 4
    values = jax.jit(form.fake_quant)(x, scale)
    np.testing.assert_array_equal(form.decode(form.encode(x, scale), scale), values)


DIRECTED = {"floor": np.floor, "ceil": np.ceil, "toward_zero": np.trunc}


@pytest.mark.parametrize("mode", DIRECTED)
def test_directed_rounding(mode):
    form = fmt(3, 2)
    x = interesting(form)
    x = x[np.abs(x) < form.max]
    step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(np.float64(x)), 1e-50))) - 2, -4)
    expected = DIRECTED[mode](x / step) * step
    values = form.fake_quant(x, estimator=MinifloatEstimator(rounding=mode))
    np.testing.assert_array_equal(values, expected.astype(np.float32))


@pytest.mark.parametrize("x", [0.3, 1.3, -2.2, 0.01, 0.0004])
def test_stochastic_rounding_has_the_right_mean(x):
    form, n = fmt(3, 1), 400_000
    estimator = MinifloatEstimator(rounding="stochastic")
    values = np.asarray(
        form.fake_quant(jnp.full(n, x, jnp.float32), estimator=estimator, key=jax.random.key(0))
    )
    assert len(np.unique(values)) == 2
    assert abs(values.mean() - x) < 4 * values.std() / np.sqrt(n)
    assert form.fake_quant(jnp.float32(1.0), estimator=estimator, key=jax.random.key(1)) == 1.0


def test_gradients_of_unsigned_values_stop_below_zero():
    gradient = jax.grad(lambda x: jnp.sum(fmt(3, 2, signed=False).fake_quant(x)))
    np.testing.assert_array_equal(gradient(jnp.array([-1.0, 0.0, 1.0, 100.0])), [0, 1, 1, 0])


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(exponent_bits=0, mantissa_bits=3), "exponent_bits=0: a minifloat has 1 to 8"),
        (dict(exponent_bits=4, mantissa_bits=24), "mantissa_bits=24: a minifloat has 0 to 23"),
        (dict(exponent_bits=4, mantissa_bits=3, specials="inf"), "specials='inf': unknown"),
        (dict(exponent_bits=8, mantissa_bits=3, bias=128), "bias=128: the smallest normal value, 2\\^-127"),
        (dict(exponent_bits=1, mantissa_bits=3, specials="ieee"), "needs exponent_bits of at least 2"),
        (dict(exponent_bits=4, mantissa_bits=3, saturate=False), "saturate=False: needs specials"),
        (dict(exponent_bits=4, mantissa_bits=3, specials="fnuz", signed=False), "needs signed=True"),
        (dict(exponent_bits=4, mantissa_bits=3, specials="fnuz", subnormals=False), "subnormals=True"),
    ],
)
def test_impossible_formats(fields, message):
    with pytest.raises(UserError, match=message):
        MinifloatFormat(**fields)


def test_an_infinite_value_moves_the_scale_as_any_outside():
    x, e4m3 = jnp.float32([1, 2, jnp.inf]), MinifloatFormat(exponent_bits=4, mantissa_bits=3)
    gradient = jax.grad(lambda s: jnp.sum(e4m3.fake_quant(x, s)))(jnp.float32(0.5))
    assert float(gradient) == e4m3.max
