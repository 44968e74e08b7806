"""Properties of integer formats over random formats, scales and data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflax.errors import UserError
from qflax.numerics import CLIP_GRADIENTS, ROUNDING_MODES, SURROGATES, Estimator, IntegerFormat

pytestmark = pytest.mark.exact

DETERMINISTIC = [mode for mode in ROUNDING_MODES if mode != "stochastic"]
CHANNELS = 8
ROWS = 64

formats = st.builds(
    IntegerFormat, bits=st.integers(1, 16), signed=st.booleans(), narrow=st.booleans()
).filter(lambda fmt: not (fmt.signed and fmt.narrow and fmt.bits == 1))


@st.composite
def grids(draw, formats=formats, zero_points=True):
    """A format, a scale, an integer zero point and data that reaches beyond the range on both sides."""
    fmt = draw(formats)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(), (CHANNELS,)]))
    scale = np.exp2(rng.uniform(-12, 6, shape)).astype(np.float32)
    zero_point = np.float32(0)
    if zero_points and not fmt.bipolar and draw(st.booleans()):
        zero_point = rng.integers(fmt.lowest, fmt.highest + 1, shape).astype(np.float32)
    codes = rng.uniform(1.5 * fmt.lowest - 2, 1.5 * fmt.highest + 2, (ROWS, CHANNELS))
    return (
        fmt,
        jnp.asarray(scale),
        jnp.asarray(zero_point),
        jnp.asarray((codes - zero_point) * scale, jnp.float32),
    )


# One compiled program for each format and mode, not for each example.
@functools.partial(jax.jit, static_argnums=(0, 1))
def fake_quant(fmt, rounding, x, scale, zero_point, key=None):
    return fmt.fake_quant(x, scale, zero_point, estimator=Estimator(rounding=rounding), key=key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def through_codes(fmt, rounding, x, scale, zero_point, key=None):
    return fmt.decode(fmt.encode(x, scale, zero_point, rounding=rounding, key=key), scale, zero_point)


def all_codes(fmt):
    return np.array([-1, 1]) if fmt.bipolar else np.arange(fmt.lowest, fmt.highest + 1)


@pytest.mark.parametrize(
    ("fields", "lowest", "highest", "threshold", "num_codes"),
    [
        ({"bits": 8}, -128, 127, 128, 256),
        ({"bits": 8, "narrow": True}, -127, 127, 127, 255),
        ({"bits": 8, "signed": False}, 0, 255, 255, 256),
        ({"bits": 2, "narrow": True}, -1, 1, 1, 3),
        ({"bits": 2}, -2, 1, 2, 4),
        ({"bits": 1}, -1, 1, 1, 2),
        ({"bits": 1, "narrow": True}, -1, 1, 1, 2),
        ({"bits": 1, "signed": False}, 0, 1, 1, 2),
        ({"bits": 16}, -32768, 32767, 32768, 65536),
    ],
)
def test_ranges_of_codes(fields, lowest, highest, threshold, num_codes):
    fmt = IntegerFormat(**fields)
    assert (fmt.lowest, fmt.highest, fmt.threshold, fmt.num_codes) == (lowest, highest, threshold, num_codes)


@pytest.mark.parametrize("bits", [0, 33, 4.0, "8", None])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(UserError, match="an integer format has 1 to 32 bits"):
        IntegerFormat(bits=bits)
    with pytest.raises(UserError, match="an unsigned format has 1 to 31"):
        IntegerFormat(bits=32, signed=False)


def assert_fake_quant_is_decode_of_encode(fmt, rounding, x, scale, zero_point, key=None):
    codes = fmt.encode(x, scale, zero_point, rounding=rounding, key=key)
    values = fmt.decode(codes, scale, zero_point)
    assert codes.dtype == jnp.int32 and values.dtype == jnp.float32
    for function in (fake_quant, through_codes):
        np.testing.assert_array_equal(function(fmt, rounding, x, scale, zero_point, key), values, strict=True)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@given(grid=grids())
def test_fake_quant_is_decode_of_encode_bit_for_bit(rounding, grid):
    fmt, scale, zero_point, x = grid
    assert_fake_quant_is_decode_of_encode(fmt, rounding, x, scale, zero_point)


@pytest.mark.parametrize(
    "fmt",
    [IntegerFormat(bits=1), IntegerFormat(bits=4, signed=False), IntegerFormat(bits=16, narrow=True)],
    ids=["bipolar", "u4", "s16"],
)
def test_fake_quant_is_decode_of_encode_for_stochastic_rounding_with_one_key(fmt):
    scale = jnp.asarray(np.linspace(0.1, 0.3, CHANNELS), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, CHANNELS)) * fmt.threshold * 0.2, jnp.float32)
    zero_point = jnp.float32(0 if fmt.bipolar else 3)
    assert_fake_quant_is_decode_of_encode(fmt, "stochastic", x, scale, zero_point, jax.random.key(7))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="accelerators may divide less exactly")
@pytest.mark.parametrize("zero_point", [0.0, 30001.0])
def test_codes_are_those_of_float32_arithmetic_in_every_program(zero_point):
    # At 16 bits some of so many elements lie within the rounding error of a boundary.
    x = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    fmt, scale = IntegerFormat(bits=16, signed=zero_point == 0), np.float32(1e-4)
    expected = np.clip(np.round(x / scale + np.float32(zero_point)), fmt.lowest, fmt.highest)
    values = (expected - np.float32(zero_point)) * scale
    np.testing.assert_array_equal(fmt.encode(x, scale, zero_point), expected)
    np.testing.assert_array_equal(jax.jit(fmt.encode)(x, scale, zero_point), expected)
    np.testing.assert_array_equal(fake_quant(fmt, "half_even", x, scale, zero_point), values)
    np.testing.assert_array_equal(jax.jit(lambda x: fmt.fake_quant(x, scale, zero_point))(x), values)


@given(grid=grids())
def test_quantizing_twice_changes_nothing(grid):
    fmt, scale, zero_point, x = grid
    once = fake_quant(fmt, "half_even", x, scale, zero_point)
    np.testing.assert_array_equal(fake_quant(fmt, "half_even", once, scale, zero_point), once)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@given(grid=grids())
def test_order_is_kept(rounding, grid):
    fmt, scale, zero_point, x = grid
    y = fake_quant(fmt, rounding, jnp.sort(x, axis=0), scale, zero_point)
    assert np.all(np.diff(y, axis=0) >= 0)


narrow_formats = st.builds(IntegerFormat, bits=st.integers(2, 16), signed=st.just(True), narrow=st.just(True))


@given(grid=grids(formats=narrow_formats, zero_points=False))
def test_narrow_formats_are_odd_symmetric(grid):
    fmt, scale, zero_point, x = grid
    y = fake_quant(fmt, "half_even", x, scale, zero_point)
    np.testing.assert_array_equal(fake_quant(fmt, "half_even", -x, scale, zero_point), -y)


@given(grid=grids())
def test_codes_lie_on_the_grid_and_are_the_nearest(grid):
    fmt, scale, zero_point, x = grid
    codes = np.asarray(fmt.encode(x, scale, zero_point))
    assert codes.min() >= fmt.lowest and codes.max() <= fmt.highest
    u = np.float64(x) / np.float64(scale) + np.float64(zero_point)
    if fmt.bipolar:
        assert set(np.unique(codes)) <= {-1, 1}
        nearest = np.where(u >= 0, 1, -1)
    else:
        nearest = np.clip(np.round(u), fmt.lowest, fmt.highest)
    # Two grid points are equally near, within the float32 rounding of `u`, or the code is the nearest.
    distance, best = np.abs(u - codes), np.abs(u - nearest)
    np.testing.assert_array_less(distance, best + 1e-6 * (1 + np.abs(u)))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("signed", "narrow"), [(False, False), (True, False), (True, True)])
def test_every_code_is_reached_and_no_other(bits, signed, narrow):
    fmt = IntegerFormat(bits=bits, signed=signed, narrow=narrow)
    x = jnp.linspace(fmt.lowest - 3, fmt.highest + 3, 20_001, dtype=jnp.float32) * 0.25
    reached = np.unique(fmt.encode(x, jnp.float32(0.25)))
    np.testing.assert_array_equal(reached, all_codes(fmt))
    assert len(reached) == fmt.num_codes


def test_ties_go_to_the_even_code_after_the_zero_point_is_added():
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5], jnp.float32)
    fmt = IntegerFormat(bits=4, signed=False)
    np.testing.assert_array_equal(fmt.encode(x, 1.0, 5.0), [6, 6, 8, 4])
    np.testing.assert_array_equal(fmt.encode(x, 1.0, 4.0), [4, 6, 6, 4])


@pytest.mark.parametrize("rounding", ROUNDING_MODES)
@pytest.mark.parametrize(
    "fmt", [IntegerFormat(bits=4), IntegerFormat(bits=1), IntegerFormat(bits=3, signed=False)]
)
def test_infinite_values_saturate_and_nan_stays_nan(fmt, rounding):
    x = jnp.asarray([jnp.inf, -jnp.inf, 1e30, -1e30, jnp.nan], jnp.float32)
    y = fmt.fake_quant(x, jnp.float32(0.5), estimator=Estimator(rounding=rounding), key=jax.random.key(0))
    high, low = fmt.highest * 0.5, fmt.lowest * 0.5
    np.testing.assert_array_equal(y, np.float32([high, low, high, low, np.nan]))


def test_stochastic_rounding_is_unbiased_inside_the_range():
    x = jnp.broadcast_to(jnp.asarray([0.13, -0.4, 1.27], jnp.float32), (40_000, 3))
    y = fake_quant(
        IntegerFormat(bits=4), "stochastic", x, jnp.float32(0.25), jnp.float32(0), jax.random.key(0)
    )
    np.testing.assert_allclose(jnp.mean(y, axis=0), x[0], atol=5 * 0.125 / np.sqrt(40_000))


def reference_gradients(fmt, estimator, x, scale, zero_point, g):
    """Gradients of `sum(g * y)` for x, scale and zero point, element by element, in float64."""
    x, g = np.float64(x), np.float64(g)
    u = x / np.float64(scale)
    shifted = u + zero_point
    unclipped = 2 * np.floor(shifted / 2) + 1 if fmt.bipolar else np.round(shifted)
    codes = np.clip(unclipped, fmt.lowest, fmt.highest)
    inside = {
        "after_rounding": (unclipped >= fmt.lowest) & (unclipped <= fmt.highest),
        "before_rounding": (shifted > fmt.lowest) & (shifted < fmt.highest),
        "straight_through": np.full(x.shape, True),
    }[estimator.clip]
    offset = shifted - unclipped
    strength = SURROGATES[estimator.surrogate][1] if estimator.strength is None else estimator.strength
    k = strength
    slope = {
        "identity": lambda: 1.0,
        "ewgs": lambda: 1 + k * np.sign(g) * offset,
        "psgd": lambda: np.abs(offset) + k,
        "tanh": lambda: k / np.cosh(k * (np.abs(offset) - 0.5)) ** 2 / (2 * np.tanh(k / 2)),
    }[estimator.surrogate]()
    slope = np.where(inside, slope, 0.0)
    return g * slope, g * (codes - zero_point - slope * u), g * (slope - 1) * np.float64(scale)


FORMATS = {
    "u3": IntegerFormat(bits=3, signed=False),
    "s4": IntegerFormat(bits=4),
    "ternary": IntegerFormat(bits=2, narrow=True),
    "bipolar": IntegerFormat(bits=1),
}


@pytest.mark.parametrize(
    ("name", "surrogate"),
    [(name, rule) for name in FORMATS for rule in SURROGATES if (name, rule) != ("bipolar", "tanh")],
)
@pytest.mark.parametrize("clip", CLIP_GRADIENTS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_match_their_formula(name, clip, surrogate, per_channel):
    fmt = FORMATS[name]
    rng = np.random.default_rng(fmt.bits)
    estimator = Estimator(surrogate=surrogate, clip=clip, strength=None if surrogate != "ewgs" else 0.3)
    shape = (CHANNELS,) if per_channel else ()
    scale = rng.uniform(0.1, 0.7, shape).astype(np.float32)
    zero_point = np.float32(0)
    if not fmt.bipolar:
        zero_point = rng.integers(fmt.lowest, fmt.highest + 1, shape).astype(np.float32)
    u = rng.uniform(1.5 * fmt.lowest - 2, 1.5 * fmt.highest + 2, (ROWS, CHANNELS))
    # Away from every boundary, so that float32 and float64 see the same code and the same side.
    u = np.where(np.abs(2 * u - np.round(2 * u)) < 0.01, u + 0.02, u)
    x = ((u - zero_point) * scale).astype(np.float32)
    g = rng.normal(size=x.shape).astype(np.float32)

    def loss(x, scale, zero_point):
        return jnp.sum(g * fmt.fake_quant(x, scale, zero_point, estimator=estimator))

    got = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(x), scale, zero_point)
    terms = reference_gradients(fmt, estimator, x, scale, zero_point, g)
    np.testing.assert_allclose(got[0], terms[0], rtol=1e-5, atol=1e-6)
    axes = 0 if per_channel else None
    for gradient, term in zip(got[1:], terms[1:], strict=True):
        assert gradient.shape == shape or fmt.bipolar
        # Float32 sums: relative to the sum of the terms' magnitudes.
        total, magnitude = np.sum(term, axis=axes), 1 + np.sum(np.abs(term) + np.abs(g), axis=axes)
        if gradient.shape != total.shape:  # The bipolar format's zero point is a scalar.
            total, magnitude = np.sum(total), np.sum(magnitude)
        np.testing.assert_array_less(np.abs(gradient - total), 1e-6 * magnitude)


def test_gradient_of_a_scale_has_its_shape():
    fmt, x = IntegerFormat(bits=4), jnp.ones((2, 3, 4))
    for shape in [(), (1,), (4,), (3, 1), (1, 3, 1), (2, 1, 4)]:
        gradient = jax.grad(lambda s: jnp.sum(fmt.fake_quant(x, s)))(jnp.full(shape, 0.3))
        assert gradient.shape == shape
        assert float(jnp.sum(gradient)) == pytest.approx(x.size * (3 - 1 / 0.3), rel=1e-4)


def test_a_value_outside_moves_the_scale_and_the_zero_point_but_gets_no_gradient():
    fmt = IntegerFormat(bits=4, signed=False)
    gradients = jax.grad(fmt.fake_quant, argnums=(0, 1, 2))(jnp.float32(10), jnp.float32(0.5), jnp.float32(3))
    np.testing.assert_allclose(gradients, [0, 15 - 3, -0.5])


def test_an_infinite_value_moves_the_scale_as_any_outside():
    x, fmt = jnp.float32([1, 2, jnp.inf]), IntegerFormat(bits=4, signed=False)
    gradient = jax.grad(lambda s: jnp.sum(fmt.fake_quant(x, s)))(jnp.float32(0.5))
    assert float(gradient) == 15
