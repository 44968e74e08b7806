"""Convolution of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import convolve

pytestmark = pytest.mark.exact

CASES = [
    dict(),
    dict(stride=2),
    dict(padding="VALID"),
    dict(stride=2, padding=((3, 3), (3, 3)), kernel=7),
    dict(stride=3, padding=((0, 2), (1, 0)), kernel=4),
    dict(stride=2, padding=((0, 0), (0, 0)), kernel=1),
    dict(groups=2),
]


def arrays(kernel=3, groups=1, seed=0, **_):
    # Small integers, so that no order of summation rounds.
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (5, 12, 9, 4)).astype(np.float32)
    return x, rng.integers(-8, 9, (kernel, kernel, 4 // groups, 6)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_is_the_convolution_of_lax_with_its_gradients(case):
    options = {name: value for name, value in case.items() if name != "kernel"}
    x, kernel = arrays(**case)
    padding, stride = options.get("padding", "SAME"), options.get("stride", 1)
    expected, pull = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=options.get("groups", 1),
        ),
        x,
        kernel,
    )
    y, own_pull = jax.vjp(functools.partial(convolve, **options), x, kernel)
    np.testing.assert_array_equal(y, expected)
    dy = np.random.default_rng(1).integers(-8, 9, y.shape).astype(np.float32)
    for own, its in zip(own_pull(dy), pull(dy), strict=True):
        np.testing.assert_array_equal(own, its)


def test_takes_other_dtypes_and_vmap():
    x, kernel = arrays()
    low = convolve(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    several = jax.vmap(jax.grad(lambda x, k: convolve(x, k).sum(), argnums=1), in_axes=(0, None))(
        jnp.stack([x, 2 * x]), kernel
    )
    np.testing.assert_array_equal(several[1], 2 * several[0])
    gradient = jax.grad(lambda k: convolve(x.astype(jnp.bfloat16), k).astype(jnp.float32).sum())
    assert gradient(kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_only_a_cpu_gets_the_other_gradient():
    x, kernel = arrays()
    gradient = jax.jit(jax.grad(lambda k: convolve(x, k).sum()))
    for platform in ("cuda", "tpu", "cpu"):
        text = gradient.trace(kernel).lower(lowering_platforms=(platform,)).as_text()
        assert ("0x7FC00000" in text) == (platform == "cpu")  # What stands for a kernel that is NaN.


def test_nothing_hides_nan():
    x, kernel = arrays()
    gradient = jax.jit(jax.grad(lambda x, k: convolve(x, k).sum(), argnums=1))
    kernel[0, 0, 0, 0] = np.nan
    assert np.isnan(gradient(x, kernel)).any()
    x[0, 0, 0, 0] = np.nan
    assert np.isnan(gradient(x, arrays()[1])).any()
