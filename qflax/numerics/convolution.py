"""Convolution of images."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qflax.numerics.varying import vary_alike

_NAMES = ("NHWC", "HWIO", "NHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    groups: int = 1,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`; on a CPU the gradient of the kernel is written in another way.

    Args:
      x: [batch, height, width, in].
      kernel: [height, width, in / groups, out].
      stride: of both dimensions.
      padding: `SAME`, `VALID`, or (before, after) for height and width.
      groups: of channels.

    Returns:
      [batch, height', width', out], in the dtype of `x`. Gradients of both, in reverse mode.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(*vary_alike(x, kernel), stride, padding, groups)


def _plain(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_NAMES, feature_group_count=groups
    )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _forward(x, kernel, stride, padding, groups):
    return _plain(x, kernel, stride, padding, groups), (x, kernel)


def _backward(stride, padding, groups, residuals, dy):
    x, kernel = residuals
    _, pull = jax.vjp(lambda x: _plain(x, kernel, stride, padding, groups), x)
    of_kernel = functools.partial(_kernel_gradient, x, kernel, dy, stride, padding, groups)
    if groups > 1:
        return *pull(dy), of_kernel()
    transposed = functools.partial(_kernel_gradient_of_transposed, x, kernel, dy, stride, padding)
    return *pull(dy), jax.lax.platform_dependent(cpu=transposed, default=of_kernel)


_convolve.defvjp(_forward, _backward)


def _kernel_gradient(x, kernel, dy, stride, padding, groups):
    _, pull = jax.vjp(lambda kernel: _plain(x, kernel, stride, padding, groups), kernel)
    return pull(dy)[0]


def _kernel_gradient_of_transposed(x, kernel, dy, stride, padding):
    """The convolution of x and dy, channels of x in the place of the batch and the batch in that of channels.

    XLA's CPU backend would write it like this itself, but fuses the transposition of x with all that x is
    made of, which it then computes again, across memory. A branch is a program of its own, whose operands
    are in memory.
    """
    some = kernel[0, 0, 0, 0]
    x = jax.lax.cond(some == some, _swap_batch_and_channels, _nan_instead, x)  # False for NaN.
    # As much after x as makes the result as large as the kernel.
    ends = [
        (low, size + stride * (steps - 1) - width - low)
        for (low, _), size, steps, width in zip(
            padding, kernel.shape, dy.shape[1:], x.shape[1:], strict=False
        )
    ]
    # On a mesh with explicit axes JAX must be told where the result lies.
    sharding = jax.typeof(kernel.transpose(2, 0, 1, 3)).sharding
    gradient = jax.lax.conv_general_dilated(
        x,
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        ends,
        rhs_dilation=(stride, stride),
        dimension_numbers=_NAMES,
        out_sharding=sharding,
    )
    return gradient.transpose(1, 2, 0, 3)


def _swap_batch_and_channels(x):
    return x.transpose(3, 1, 2, 0)


def _nan_instead(x):
    return jnp.full_like(_swap_batch_and_channels(x), jnp.nan)
