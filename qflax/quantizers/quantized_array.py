"""An array on a quantizer's grid, together with the grid."""

import flax.struct
import jax
import jax.numpy as jnp

from qflax.numerics import IntegerFormat, LearnedInteger, MinifloatFormat


@flax.struct.dataclass
class QuantizedArray:
    """Values on a grid, as quantizers return them and quantized layers accept them.

    A layer that must know its input's grid (number of operations, accumulator bounds, bias scale) takes
    it from here; arithmetic on `value` is arithmetic on plain floats and drops the grid.

    Attributes:
      value: float array, every element equal to `scale * (code - zero_point)`; of a minifloat to `scale`
        times the value of its code. Only the ends of a range that is still being learned may lie off the
        grid.
      scale: float32, scalar or [channels].
      zero_point: integer-valued float32, like `scale`.
      format: the number format of the codes.
      symmetric: whether the zero point is known to be 0.
    """

    value: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    format: IntegerFormat | LearnedInteger | MinifloatFormat
    symmetric: bool = flax.struct.field(pytree_node=False, default=True)


def value_of(x: jax.Array | QuantizedArray) -> jax.Array:
    """The plain array."""
    return x.value if isinstance(x, QuantizedArray) else x


def bits_of(x: jax.Array | QuantizedArray) -> jax.Array | int:
    """Bits per element: those of the format, on average over its channels, or 32 for a plain array."""
    if not isinstance(x, QuantizedArray):
        return 32
    bits = x.format.bits
    return bits if isinstance(bits, int) else jnp.mean(bits)
