"""Range statistics against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import IntegerFormat
from qflax.quantizers.statistics import STATISTICS_KINDS, asymmetric_range, symmetric_range

SIGNED = IntegerFormat(bits=4, narrow=True)
UNSIGNED = IntegerFormat(bits=4, signed=False)
X = np.random.default_rng(0).normal(size=(3, 5, 40, 6)).astype(np.float32) * np.float32([1, 2, 3, 4, 5, 6])


def error(x, x_max, fmt):
    q = np.clip(np.round(x / (x_max / fmt.threshold)), fmt.lowest, fmt.highest)
    return np.sum((q * (x_max / fmt.threshold) - x) ** 2)


@pytest.mark.parametrize("kind", STATISTICS_KINDS)
@pytest.mark.parametrize("fmt", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_per_channel_is_per_tensor_of_each_channel(kind, fmt):
    together = symmetric_range(jnp.asarray(X), kind, fmt, per_channel=True, percentile=97)
    each = [symmetric_range(jnp.asarray(X[..., c]), kind, fmt, percentile=97) for c in range(6)]
    assert together.shape == (6,) and each[0].shape == () and together.dtype == jnp.float32
    np.testing.assert_allclose(together, each, rtol=1e-6)


def test_absmax_of_unsigned_data_ignores_negative_elements():
    x = jnp.asarray([-9.0, 2.0, 1.0])
    assert symmetric_range(x, "absmax", SIGNED, percentile=100) == 9
    assert symmetric_range(x, "absmax", UNSIGNED, percentile=100) == 2


@pytest.mark.parametrize(
    ("percentile", "expected"), [(100, 10), (99, 10), (94.9, 9), (50, 5), (25, 3), (24, 2), (0.1, 1)]
)
def test_percentile_is_the_rank_rounded_half_up(percentile, expected):
    x = jnp.asarray(
        np.random.default_rng(0).permutation(np.arange(1, 11) * np.array([1, -1] * 5)), jnp.float32
    )
    assert symmetric_range(x, "percentile", SIGNED, percentile=percentile) == expected


def test_mean_is_lsq_s_initial_scale():
    x_max = symmetric_range(jnp.asarray(X), "mean", SIGNED, percentile=100)
    assert x_max / SIGNED.threshold == pytest.approx(2 * np.mean(np.abs(X)) / np.sqrt(7), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_the_best_of_a_hundred_fractions(bits):
    fmt, x = IntegerFormat(bits=bits, narrow=True), np.float64(X[0, 0, :, 0])
    candidates = np.max(np.abs(x)) * np.arange(1, 101) / 100
    best = candidates[np.argmin([error(x, c, fmt) for c in candidates])]
    assert symmetric_range(jnp.asarray(x, jnp.float32), "mse", fmt, percentile=100) == pytest.approx(
        best, rel=1e-5
    )


def test_mse_clips_an_outlier_at_few_bits():
    x = jnp.asarray([*np.random.default_rng(0).normal(size=2000), 40.0], jnp.float32)
    assert symmetric_range(x, "mse", IntegerFormat(bits=3), percentile=100) < 35
    assert symmetric_range(x, "kl", IntegerFormat(bits=6), percentile=100) < 20


def test_mse_of_a_bipolar_format_is_the_mean_magnitude():
    x = jnp.asarray(X[0, 0, :, 0])
    x_max = symmetric_range(x, "mse", IntegerFormat(bits=1), percentile=100)
    assert float(x_max) == pytest.approx(float(jnp.mean(jnp.abs(x))), abs=0.01 * float(jnp.max(jnp.abs(x))))


def test_kl_keeps_the_range_of_uniform_data():
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 3, 20_000), jnp.float32)
    assert symmetric_range(x, "kl", IntegerFormat(bits=8, signed=False), percentile=100) > 2.8


@pytest.mark.parametrize("bits", [4, 8])
def test_kl_is_not_about_the_zeros_of_a_relu(bits):
    x = jnp.maximum(np.random.default_rng(0).normal(size=100_000).astype(np.float32), 0)
    assert 3 < symmetric_range(x, "kl", IntegerFormat(bits=bits, signed=False), percentile=100) < 4.6


@pytest.mark.parametrize("kind", STATISTICS_KINDS)
def test_only_absmax_passes_a_gradient(kind):
    gradient = jax.grad(lambda x: symmetric_range(x, kind, SIGNED, percentile=90))(jnp.asarray(X[0, 0, :, 0]))
    assert np.count_nonzero(gradient) == (1 if kind == "absmax" else 0)


@pytest.mark.parametrize("kind", STATISTICS_KINDS)
def test_data_without_extent_has_a_finite_range(kind):
    ranges = symmetric_range(jnp.zeros((10, 3)), kind, SIGNED, per_channel=True, percentile=99)
    assert np.all(np.isfinite(ranges)) and np.all(ranges >= 0)


@pytest.mark.parametrize("kind", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_range_contains_zero(kind, sign):
    x = jnp.asarray(sign * np.random.default_rng(0).uniform(1, 2, 100), jnp.float32)
    low, high = asymmetric_range(x, kind, UNSIGNED, percentile=99)
    assert (low == 0 and high > 1) if sign > 0 else (high == 0 and low < -1)


def test_asymmetric_percentile_clips_half_on_either_side():
    x = jnp.asarray(np.random.default_rng(0).permutation(np.arange(-50, 50)), jnp.float32)
    assert asymmetric_range(x, "percentile", UNSIGNED, percentile=90) == (-46, 44)
    assert asymmetric_range(x, "percentile", UNSIGNED, percentile=100) == (-50, 49)
    assert asymmetric_range(x, "absmax", UNSIGNED, percentile=90) == (-50, 49)


def test_asymmetric_mse_is_better_than_absmax_with_an_outlier():
    x = np.float32([*np.random.default_rng(0).normal(size=1000), 9.0])

    def cost(low, high):
        scale = jnp.float32((high - low) / 15)
        return jnp.sum((UNSIGNED.fake_quant(x, scale, jnp.round(-low / scale)) - x) ** 2)

    low, high = asymmetric_range(jnp.asarray(x), "mse", UNSIGNED, percentile=100)
    assert cost(low, high) < 0.7 * cost(x.min(), x.max())


def test_each_device_finds_the_ranges_of_its_own_data():
    def ranges(x):
        symmetric = [symmetric_range(x, kind, SIGNED, percentile=97) for kind in STATISTICS_KINDS]
        return jnp.stack([*symmetric, *asymmetric_range(x, "mse", UNSIGNED, percentile=97)])

    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("batch",)), jax.sharding.PartitionSpec("batch")
    mapped = jax.shard_map(lambda x: ranges(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec)
    expected = jax.jit(lambda x: jnp.stack([ranges(x[0]), ranges(x[1])]))(X[:2])
    np.testing.assert_allclose(jax.jit(mapped)(X[:2]), expected, rtol=1e-6)
