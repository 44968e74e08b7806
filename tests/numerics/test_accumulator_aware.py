"""Sums of products of accumulator-aware weights never leave the accumulator, for any weights and inputs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import (
    AccumulatorBudget,
    IntegerFormat,
    accumulator_aware_codes,
    accumulator_extremes,
    code_sums,
)

pytestmark = pytest.mark.exact

SHAPES = [(3, 3, 16, 8), (1, 1, 64, 8), (3, 3, 1, 32), (72, 10), (5, 3), (1, 4), (1500, 4)]
WEIGHT_BITS = (2, 4, 8, 16)
TENSORS = 10_000
PER_CASE = -(-TENSORS // (len(SHAPES) * len(WEIGHT_BITS) * 4))


def draw(rng, shape):
    """One weight tensor: an ordinary or an adversarial one, then a few spoilt channels."""
    family = rng.integers(9)
    v = rng.normal(size=shape)
    if family == 1:
        v = rng.standard_cauchy(shape)
    elif family == 2:  # One huge weight in each channel.
        v = v * 1e-3
        v.reshape(-1, shape[-1])[rng.integers(v.size // shape[-1])] = 1e3
    elif family == 3:  # All equal.
        v = np.full(shape, rng.normal())
    elif family == 4:  # A little around a large mean.
        v = 1 + 1e-6 * v
    elif family == 5:  # Denormal.
        v = v * 1e-41
    elif family == 6:  # Two values.
        v = np.sign(v)
    elif family == 7:  # One sign.
        v = np.abs(v)
    elif family == 8:  # Integers, for which quotients are exact.
        v = np.round(8 * v)
    v = np.float32(v * 2.0 ** rng.uniform(-12, 6))
    columns = v.reshape(-1, shape[-1])
    columns[:, 0] = 0.0
    if shape[-1] > 3:
        columns[1:, 1] = 0.0
        columns[:, 2] *= np.float32(1e-30)
    return v


@functools.cache
def codes_of(bits, signed, zero_centered):
    fmt = IntegerFormat(bits=bits, signed=True, narrow=True)

    def codes(v, scale, norm, accumulator_bits, input_bits):
        budget = AccumulatorBudget(
            accumulator_bits=accumulator_bits,
            input_bits=input_bits,
            input_signed=signed,
            zero_centered=zero_centered,
        )
        return accumulator_aware_codes(v, scale, norm, budget, fmt)

    return codes


def numbers(rng, count, shape):
    """Scales, norms, accumulator and input widths, from the reasonable to the absurd."""
    scale = np.float32(2.0 ** rng.uniform(-20, 4, (count, shape[-1])))
    norm = np.float32(2.0 ** rng.uniform(-20, 20, (count, shape[-1])))
    norm[::3] = np.inf  # The budget decides.
    return scale, norm, np.int32(rng.integers(2, 33, count)), np.int32(rng.integers(1, 17, count))


def limits(input_bits, signed):
    fmt = IntegerFormat(bits=int(input_bits), signed=signed)
    # The smallest signed format here is two bits wide: one bit is bipolar.
    return (0, 2 ** int(input_bits) - 1) if not signed else (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_extremes_never_leave_the_accumulator(shape):
    tried = 0
    for bits, signed, zero_centered in itertools.product(WEIGHT_BITS, (False, True), (False, True)):
        rng = np.random.default_rng([bits, signed, zero_centered, *shape])
        v = np.stack([draw(rng, shape) for _ in range(PER_CASE)])
        rest = numbers(rng, PER_CASE, shape)
        codes = np.asarray(jax.jit(jax.vmap(codes_of(bits, signed, zero_centered)))(v, *rest))
        highest = 2 ** (bits - 1) - 1
        assert np.all(np.abs(codes) <= highest) and np.all(codes == np.round(codes))
        assert not codes[..., 0].any()  # The zero channel.
        columns = codes.astype(np.int64).reshape(PER_CASE, -1, shape[-1])
        positive, negative = np.maximum(columns, 0).sum(1), np.maximum(-columns, 0).sum(1)
        for i, (accumulator_bits, input_bits) in enumerate(zip(*rest[2:], strict=True)):
            low, high = limits(input_bits, signed)
            extremes = accumulator_extremes(positive[i], negative[i], low, high)
            assert np.min(extremes[0]) >= -(2 ** (int(accumulator_bits) - 1))
            assert np.max(extremes[1]) <= 2 ** (int(accumulator_bits) - 1) - 1
            tried += 1
    assert tried == PER_CASE * len(WEIGHT_BITS) * 4


def test_the_property_covers_ten_thousand_tensors():
    assert PER_CASE * len(SHAPES) * len(WEIGHT_BITS) * 4 >= TENSORS


@pytest.mark.parametrize("zero_centered", [False, True])
def test_codes_are_the_same_in_every_program(zero_centered):
    # Of multiples of the step the last bit of the channel's norm decides which code they are truncated to.
    rng = np.random.default_rng(0)
    scale = np.float32(rng.uniform(0.05, 0.2, 64))
    v = np.float32(rng.integers(-7, 8, (3, 3, 64, 64))) * scale
    v = np.concatenate([v, -v])  # The mean is zero.
    rest = scale, np.float32(np.abs(v).astype(np.float64).sum((0, 1, 2))), np.int32(32), np.int32(1)
    codes = codes_of(4, False, zero_centered)
    eager = np.asarray(codes(jnp.asarray(v), *map(jnp.asarray, rest)))
    np.testing.assert_array_equal(jax.jit(codes)(v, *rest), eager)
    # A compiler changes the order of a reduction with the layout of what is reduced.
    columns = np.ascontiguousarray(v.transpose(3, 0, 1, 2))
    turned = jax.jit(lambda columns, *rest: codes(columns.transpose(1, 2, 3, 0), *rest))
    np.testing.assert_array_equal(turned(columns, *rest), eager)
    assert 0.1 < np.mean(eager != np.round(v / scale)) < 0.9  # Both happen.


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(
    "bits,accumulator_bits,input_bits", [(4, 12, 4), (8, 16, 8), (8, 18, 4), (16, 28, 8)]
)
def test_the_budget_is_used(bits, accumulator_bits, input_bits, zero_centered):
    # Safety alone would be easy: all weights zero. From L1 norms above the budget nearly all of it is spent.
    v = np.random.default_rng(0).normal(size=(3, 3, 64, 16)).astype(np.float32)
    codes = codes_of(bits, False, zero_centered)(
        v, np.float32(np.full(16, 1e-3)), np.float32(np.full(16, np.inf)), accumulator_bits, input_bits
    )
    budget = AccumulatorBudget(
        accumulator_bits=accumulator_bits,
        input_bits=input_bits,
        input_signed=False,
        zero_centered=zero_centered,
    )
    positive, negative = (np.float64(total) for total in code_sums(codes))
    spent = (2 * np.maximum(positive, negative) if zero_centered else positive + negative) / budget.norm
    # Truncation loses half a unit of each of the 576 weights on average.
    assert np.all(spent <= 1.001) and np.all(spent >= 1 - 576 / float(budget.norm))


def attained(codes, x_min, x_max):
    """The largest and the smallest sum over the positions of an int64 convolution, at the extreme inputs."""
    codes = codes.astype(np.int64)
    kh, kw, channels, features = codes.shape
    found = np.empty((2, features), np.int64)
    for i in range(features):
        for j, positive in enumerate((x_max, x_min)):
            negative = x_min + x_max - positive
            image = np.full((kh + 2, kw + 2, channels), positive, np.int64)
            image[1:-1, 1:-1] = np.where(codes[..., i] > 0, positive, negative)
            windows = np.lib.stride_tricks.sliding_window_view(image, (kh, kw), axis=(0, 1))
            sums = np.einsum("hwcij,ijc->hw", windows, codes[..., i])
            found[j, i] = sums.max() if j == 0 else sums.min()
            assert sums[1, 1] == found[j, i]
    return found


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_extreme_input_attains_the_bound_in_an_integer_convolution(zero_centered, signed):
    rng = np.random.default_rng(1)
    v = rng.normal(size=(3, 3, 8, 6)).astype(np.float32)
    infinite = np.float32(np.full(6, np.inf))
    codes = np.asarray(codes_of(4, signed, zero_centered)(v, np.float32(np.ones(6)), infinite, 14, 6))
    x_min, x_max = limits(6, signed)
    high, low = attained(codes, x_min, x_max)
    columns = codes.astype(np.int64).reshape(-1, 6)
    positive, negative = np.maximum(columns, 0).sum(0), np.maximum(-columns, 0).sum(0)
    np.testing.assert_array_equal((low, high), accumulator_extremes(positive, negative, x_min, x_max))
    assert np.max(np.abs([low, high])) > 2**11  # Three quarters of what 14 bits hold, or near.


@pytest.mark.parametrize("zero_centered", [False, True])
def test_channels_without_extent_give_zeros_and_can_leave_them(zero_centered):
    rng = np.random.default_rng(2)
    v, weights = rng.normal(size=(2, 3, 3, 4, 3)).astype(np.float32)
    v[..., 1], v[..., 2] = 0.0, 1e-40

    def loss(v, scale, norm):
        codes = codes_of(4, False, zero_centered)(v, scale, norm, 12, 4)
        return jnp.sum(weights * codes * scale), codes

    function = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, codes), gradients = function(v, jnp.full(3, 0.1), jnp.full(3, 3.0))
    assert not codes[..., 1:].any() and codes[..., 0].any()
    assert all(np.isfinite(g).all() for g in gradients) and np.any(gradients[0][..., 0])
    straight = weights - weights.mean((0, 1, 2)) if zero_centered else weights
    np.testing.assert_allclose(gradients[0][..., 1:], straight[..., 1:], rtol=1e-5, atol=1e-6)
    assert not any(np.any(g[1:]) for g in gradients[1:])


def test_one_program_serves_all_widths():
    traces = []

    @jax.jit
    def codes(*arguments):
        traces.append(1)
        return codes_of(4, False, True)(*arguments)

    v = np.random.default_rng(3).normal(size=(3, 3, 16, 8)).astype(np.float32)
    ones = np.ones(8, np.float32)
    norms = [
        float(jnp.sum(jnp.abs(codes(v, ones * 0.01, ones * 100, np.int32(p), np.int32(4)))))
        for p in (16, 15, 14, 13, 12)
    ]
    assert norms == sorted(norms, reverse=True) and norms[-1] < norms[0] / 4
    assert len(traces) == 1


@pytest.mark.parametrize("depth", [9, 27, 576])
def test_equal_weights_have_nothing_around_their_mean(depth):
    """What rounding of the mean leaves of them is not made large."""
    values = np.random.default_rng(0).uniform(0.01, 5, 256).astype(np.float32)
    v = jnp.broadcast_to(values, (depth, 256))
    budget = AccumulatorBudget(
        accumulator_bits=jnp.int32(16), input_bits=jnp.int32(4), input_signed=False, zero_centered=True
    )
    fmt = IntegerFormat(bits=4, signed=True, narrow=True)
    codes = jax.jit(lambda v: accumulator_aware_codes(v, v[0] / 7, jnp.sum(v, 0), budget, fmt))
    assert not np.any(codes(v)) and np.any(codes(v.at[0].mul(1.1)))
