"""Spec of integer biases."""

import dataclasses

from qflax.numerics import IntegerFormat
from qflax.quantizers.checks import check_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerBias:
    """Biases as integers that are added to the accumulator: their scale is the input's times the weights'.

    As Brevitas' `Int32Bias`. Values beyond 24 bits are those of float32, which has no more.

    Attributes:
      bits: 2 to 32.
    """

    bits: int = 32

    def __post_init__(self):
        check_whole(self, "bits", 2, 32, "an integer bias has 2 to 32 bits")

    @property
    def format(self) -> IntegerFormat:
        """Number format of the codes."""
        return IntegerFormat(bits=self.bits, signed=True)
