"""Truncation: integers that are on a grid already lose their last bits."""

import dataclasses

import flax.linen as nn
import jax

from qflax.errors import choose, require
from qflax.numerics import IntegerFormat, product, straight_through
from qflax.quantizers.base import Quantizer
from qflax.quantizers.checks import check_whole
from qflax.quantizers.quantized_array import QuantizedArray, quantized_array

_MOST_BITS = 24  # Of integers that float32 holds.
_ROUNDING_MODES = ("floor", "half_even", "ceil", "toward_zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncation:
    """Keeps the first `bits` bits of integers, as hardware does by a shift: floor(code / 2^k) behind 2^k
    times the scale, with k the bits that are too many.

    For the output of an average pool of integers, as Brevitas' `TruncAvgPool2d` and QONNX's `Trunc`. The
    gradient passes unchanged.

    Attributes:
      bits: to keep, 1 to 16, of signed integers at least 2; integers that have no more stay as they are.
      rounding: `floor`, `half_even`, `ceil` or `toward_zero`.
    """

    bits: int
    rounding: str = "floor"

    def __post_init__(self):
        check_whole(self, "bits", 1, 16, "truncation keeps 1 to 16 bits")
        choose("rounding", self.rounding, _ROUNDING_MODES)


class TruncationQuantizer(Quantizer):
    """Truncates what comes in as a `QuantizedArray` of integers with one scale. It has no variables."""

    @nn.compact
    def __call__(self, x: jax.Array, inputs: jax.Array | QuantizedArray | None = None) -> QuantizedArray:
        """Truncates `inputs`, whose value `x` is.

        Raises:
          UserError: `inputs` are no integers of a fixed width with one scale and no zero point, or one bit
            shall be left of signed ones.
        """
        ok = isinstance(inputs, QuantizedArray) and isinstance(inputs.format, IntegerFormat)
        ok = ok and inputs.scale.ndim == 0 and inputs.symmetric
        require(
            ok,
            f"{'/'.join(self.path[:-1])}: kind='truncation' drops bits of integers, and here come none (of "
            "a fixed width, with one scale and no zero point); quantize the activations before with "
            "kind='uniform' and symmetric=True, or give this place kind='uniform' too",
        )
        fmt = inputs.format
        require(
            fmt.bits <= _MOST_BITS,
            f"{'/'.join(self.path[:-1])}: kind='truncation' of {fmt.bits} bits, which float32 does "
            f"not hold; at most {_MOST_BITS} are: lower the bits of the activations before",
        )
        dropped = max(fmt.bits - self.spec.bits, 0)
        require(
            not (dropped and fmt.signed and self.spec.bits == 1),
            f"{'/'.join(self.path[:-1])}: kind='truncation' with bits=1 of signed integers: one signed bit "
            "is -1 or +1, which no shift gives; keep at least 2 bits, or quantize what comes before unsigned",
        )
        scale, fmt = inputs.scale * 2.0**dropped, IntegerFormat(bits=fmt.bits - dropped, signed=fmt.signed)
        if self._calibrating:
            return QuantizedArray(x, x / scale, scale, inputs.zero_point, fmt)
        # Clipped, as rounding up may leave the last code.
        codes = fmt.unscaled(
            jax.lax.stop_gradient(inputs.unscaled), 2.0**dropped, rounding=self.spec.rounding
        )
        return quantized_array(straight_through(product(codes, scale), x), codes, scale, fmt)
