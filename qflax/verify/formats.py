"""Number formats: which numbers there are, and which of them is nearest."""

import dataclasses
import functools

import numpy as np

# Stochastic rounding is for training alone: networks are evaluated with the nearest.
ROUNDINGS = {
    "half_even": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "toward_zero": np.trunc,
    "stochastic": np.rint,
}
_BLOCK = 2**15  # Numbers of which all that is computed stays in a processor's cache.
_EXPONENT = np.uint64(0x7FF0_0000_0000_0000)  # Its bits in a float64.
SPECIALS = ("none", "nan", "ieee", "fnuz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerFormat:
    """Integers of a range.

    Attributes:
      bits: of a stored integer.
      lowest, highest: integers.
      bipolar: whether there are only the two.
    """

    bits: int
    lowest: int
    highest: int
    bipolar: bool = False

    @classmethod
    def of(cls, bits: int, *, signed: bool, narrow: bool) -> "IntegerFormat":
        """The format of a file; `narrow` leaves out the lowest signed integer."""
        if not 1 <= bits <= 32:
            raise ValueError(f"bits={bits}: integers have 1 to 32")
        if signed and bits == 1:
            return cls(bits=1, lowest=-1, highest=1, bipolar=True)
        if signed:
            return cls(bits=bits, lowest=-(2 ** (bits - 1)) + narrow, highest=2 ** (bits - 1) - 1)
        return cls(bits=bits, lowest=0, highest=2**bits - 1)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """float32 integers of what is stored, their distance from the lowest."""
        integers = stored.astype(np.int64) * (2 if self.bipolar else 1) + self.lowest
        if integers.max(initial=self.lowest) > self.highest:
            raise ValueError(f"code {integers.max()} is outside of {self.lowest} ... {self.highest}")
        array = integers.astype(np.float32)
        if not np.array_equal(array.astype(np.int64), integers):
            raise ValueError("a code is no float32")
        return array

    def nearest(self, x: np.ndarray, rounding: str) -> np.ndarray:
        """Rounded and clipped."""
        integers = 2 * np.floor(x / 2) + 1 if self.bipolar else ROUNDINGS[rounding](x)
        return np.clip(integers, self.lowest, self.highest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinifloatFormat:
    """Floating-point numbers of few bits, as in IEEE 754 but for the largest exponent.

    Attributes:
      exponent_bits, mantissa_bits: of a number.
      bias: of the exponent.
      specials: codes that are no numbers: `none`; `nan`, all ones; `ieee`, the largest exponent; `fnuz`,
        minus zero.
      signed: whether there is a sign bit; without one, what is negative becomes the smallest number.
      subnormals: whether exponent 0 has no implicit bit; otherwise there is no zero.
      saturate: whether what is too large becomes the largest number; otherwise infinity or NaN.
      maximum: largest number; None is that of the largest code.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"
    signed: bool = True
    subnormals: bool = True
    saturate: bool = True
    maximum: float | None = None

    def __post_init__(self):
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 23):
            raise ValueError("minifloats have 1 to 8 exponent bits and 0 to 23 mantissa bits")
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r}: unknown; choices: {', '.join(SPECIALS)}")
        if not -1100 < self.bias < 1100 or self._largest_code < 1 or not self.saturate and self._no_overflow:
            raise ValueError(f"{self}: there is no such format")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @functools.cached_property
    def largest(self) -> float:
        """Largest number."""
        largest = float(self._values(np.array([self._largest_code]))[0])
        return largest if self.maximum is None else min(largest, self.maximum)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """float32 numbers of codes: sign, exponent, mantissa."""
        magnitudes = codes.astype(np.int64) & (2 ** (self.exponent_bits + self.mantissa_bits) - 1)
        negative = magnitudes != codes
        special = magnitudes > self._largest_code
        if self.specials == "fnuz":
            special |= negative & (magnitudes == 0)
        if special.any():
            raise ValueError(f"code {codes[special][0]:#x} is not a number")
        values = self._values(magnitudes)
        return np.where(negative, -values, values).astype(np.float32)

    def nearest(self, x: np.ndarray, rounding: str) -> np.ndarray:
        """Nearest numbers of the format to float32 ones; NaN stays NaN."""
        numbers, nearest = x.reshape(-1), np.empty(x.size, np.float32)
        for i in range(0, x.size, _BLOCK):
            nearest[i : i + _BLOCK] = self._nearest(numbers[i : i + _BLOCK], rounding)
        return nearest.reshape(x.shape)

    def _nearest(self, x: np.ndarray, rounding: str) -> np.ndarray:
        x = x.astype(np.float64)
        power = (x.view(np.uint64) & _EXPONENT).view(np.float64)  # The greatest 2**n up to |x|; 0 of 0.
        smallest = 2.0 ** max(self._smallest_exponent, -1000)  # No float32 is below 2**-149, or from 2**128.
        step = np.clip(power, smallest, 2.0**127) * 2.0**-self.mantissa_bits
        rounded = np.where(np.isfinite(x), ROUNDINGS[rounding](x / step) * step, x)
        if not self.signed:
            rounded = np.where(np.signbit(rounded) & ~np.isnan(rounded), 0.0, rounded)
        magnitude = np.abs(rounded)
        if not self.subnormals:
            magnitude = np.maximum(magnitude, 2.0**self._smallest_exponent)
        overflow = self.largest if self.saturate else np.inf if self.specials == "ieee" else np.nan
        magnitude = np.where(magnitude > self.largest, overflow, magnitude)
        rounded = np.copysign(magnitude, rounded)
        if self.specials == "fnuz":
            rounded = rounded + 0.0  # There is no minus zero.
        return rounded

    @property
    def _no_overflow(self) -> bool:
        return self.specials == "none"

    @property
    def _smallest_exponent(self) -> int:
        return 1 - self.bias if self.subnormals else -self.bias

    @property
    def _largest_code(self) -> int:
        """The last before the codes that are no numbers, or that are none in float32."""
        codes = 2 ** (self.exponent_bits + self.mantissa_bits)
        reserved = {"nan": 1, "ieee": 2**self.mantissa_bits}.get(self.specials, 0)
        return min(codes - reserved, (128 + self.bias) * 2**self.mantissa_bits) - 1

    def _values(self, magnitudes: np.ndarray) -> np.ndarray:
        """float64 numbers of codes without a sign."""
        field, mantissa = np.divmod(magnitudes, 2**self.mantissa_bits)
        subnormal = (field == 0) & self.subnormals
        significand = np.where(subnormal, mantissa, mantissa + 2**self.mantissa_bits)
        exponent = np.where(subnormal, 1, field) - self.bias - self.mantissa_bits
        return np.ldexp(significand.astype(np.float64), exponent)


Format = IntegerFormat | MinifloatFormat
