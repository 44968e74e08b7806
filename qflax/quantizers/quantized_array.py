"""An array on a quantizer's grid, together with the grid."""

import typing

import flax.struct
import jax
import jax.numpy as jnp

from qflax.numerics import IntegerFormat, LearnedInteger, MinifloatFormat, vary_alike


@flax.struct.dataclass
class QuantizedArray:
    """Values on a grid, as quantizers return them and quantized layers accept them.

    A layer that must know its input's grid (number of operations, accumulator bounds, bias scale) takes
    it from here; arithmetic on `value` is arithmetic on plain floats and drops the grid. Layers that multiply
    do so in units of the scale, in which sums of integers are exact in any order.

    Attributes:
      value: float array, every element equal to `scale * (code - zero_point)`; of a minifloat to `scale`
        times the value of its code. Only the ends of a range that is still being learned may lie off the
        grid.
      unscaled: `value` in units of `scale`: integers, or minifloats; float32. Its gradient is that of
        `value / scale` for a constant scale.
      scale: float32, scalar or [channels].
      zero_point: integer-valued float32, like `scale`.
      format: the number format of the codes.
      symmetric: whether the zero point is known to be 0.
    """

    value: jax.Array
    unscaled: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    format: IntegerFormat | LearnedInteger | MinifloatFormat
    symmetric: bool = flax.struct.field(pytree_node=False, default=True)

    def moved(self, value: jax.Array) -> "QuantizedArray":
        """Other values behind the same grid, wherever they lie."""
        return self.replace(value=value, unscaled=value / jax.lax.stop_gradient(self.scale))


def quantized_array(
    value: jax.Array,
    unscaled: jax.Array,
    scale: jax.Array,
    format: IntegerFormat | LearnedInteger | MinifloatFormat,
    zero_point: jax.Array | float = 0.0,
    symmetric: bool = True,
) -> QuantizedArray:
    """A `QuantizedArray`; `unscaled` gets its gradient from here, whatever it has of its own."""
    unscaled = _with_gradient_of(*vary_alike(value, unscaled, scale))
    return QuantizedArray(value, unscaled, scale, jnp.asarray(zero_point, jnp.float32), format, symmetric)


@jax.custom_vjp
def _with_gradient_of(value, unscaled, scale):
    del value, scale
    return unscaled


_with_gradient_of.defvjp(
    lambda value, unscaled, scale: (unscaled, scale), lambda scale, g: (g / scale, None, None)
)


def payload_of(x: typing.Any) -> typing.Any:
    """The array or quantized array that a tracer of `qflax.linen` stands for; anything else as it is."""
    return getattr(x, "payload", x) if isinstance(x, jax.core.Tracer) else x


def value_of(x: jax.Array | QuantizedArray) -> jax.Array:
    """The plain array."""
    x = payload_of(x)
    return x.value if isinstance(x, QuantizedArray) else x


def bits_of(x: jax.Array | QuantizedArray) -> jax.Array | int:
    """Bits per element: those of the format, on average over its channels, or 32 for a plain array."""
    if not isinstance(x, QuantizedArray):
        return 32
    bits = x.format.bits
    return bits if isinstance(bits, int) else jnp.mean(bits)
