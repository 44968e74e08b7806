"""Products, quotients and sums that are the same bits in every program.

Compilers rewrite float arithmetic: a product is fused with the sum that follows, a division by a constant
becomes a product, factors are multiplied with each other first, a reduction adds in any order. The last bit
then depends on what else was compiled, and a code close to a rounding boundary on the last bit. Exports could
not agree with the network that was trained.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from qflax.numerics.operation import Operation


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it JAX computes and traces convolutions and matrix products in full float32.

    Unless told so, accelerators round float32 operands: GPUs to 11 bits (TF32), TPUs to 8 (bfloat16). That
    suits training; but codes beyond 11 or 8 bits, and what is not quantized, would come out differently in
    an export.
    """
    with jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within it JAX computes on the CPU, where it has one, in full float32: as what is deployed is computed.

    Accelerators do not round quotients correctly, so that a code next to a rounding boundary may be another
    one there.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out.
        cpu = jax.config.jax_default_device
    with full_precision(), jax.default_device(cpu):
        yield


@Operation
def quotient(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """`x / divisor`, correctly rounded on a CPU in every program; `divisor` broadcasts against `x`.

    XLA turns a division by a constant or by a broadcast scalar into `x * (1 / divisor)`, in some programs
    and not in others. It leaves a divisor alone that depends on `x`, as this one does, if in name only.
    """
    return x / jnp.where(jnp.isnan(x), x, divisor)


@Operation
def product(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """`x * y`, rounded before anything is added to it or multiplied with it, in every program.

    XLA's CPU backend fuses `x * y + z`, which rounds once instead of twice, where the two end up in one loop.
    Magnitudes beyond 3e38 become NaN.
    """
    return _product(x, y)


@jax.custom_jvp
def _product(x, y):
    xy = x * y
    # A choice stands between this product and what follows, if in name only. Compilers know which products
    # are never infinite or NaN, but not how large one is.
    return jnp.where(jnp.abs(xy) > 3e38, jnp.nan, xy)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    xy = _product(x, y)
    terms = [d * other for d, other in ((dx, y), (dy, x)) if not isinstance(d, SymbolicZero)]
    return xy, jnp.broadcast_to(sum(terms[1:], terms[0]), xy.shape) if terms else jnp.zeros_like(xy)


@jax.custom_jvp
@jax.jit  # Traced once for all arrays of a shape: a kernel's sum has up to a dozen levels.
def total(x: jax.Array) -> jax.Array:
    """The sum over all axes but the last: of float32 [..., channels] float32 [channels].

    Pairwise summation (Higham 1993, "The Accuracy of Floating Point Summation"), written out as sums of two
    halves: unlike a reduction's, their order is the program's.
    """
    x = x.reshape(-1, x.shape[-1])
    while (n := len(x)) > 1:
        half = (n + 1) // 2
        x = x[:half] + jnp.pad(x[half:], ((0, 2 * half - n), (0, 0)))
    return x[0]


@total.defjvp
def _total_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return total(x), jnp.sum(dx, tuple(range(dx.ndim - 1)))
