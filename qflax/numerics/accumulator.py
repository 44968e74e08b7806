"""How wide an accumulator must be: from data types, from the weights' L1 norm, exactly.

Colbert et al. 2023, "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance", section 3.
Everything here is Python integers, of any size.
"""


def width_of_extremes(low: int, high: int) -> int:
    """Bits of the narrowest two's complement integer that holds `low <= 0 <= high`."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


def data_type_width(
    depth: int, weight_bits: int, input_bits: int, input_signed: bool, weight_signed: bool = True
) -> int:
    """Width that suffices for all weights and inputs of these types (A2Q, eq. 4 and 5).

    ceil(a + log2(1 + 2^-a) + 1) with a = log2(depth) + N + M - 1 - signed, in integers.

    Args:
      depth: products in a sum.
      weight_bits: M, with the sign.
      input_bits: N.
      input_signed: whether one of those is a sign.
      weight_signed: the paper's weights are; unsigned ones may be twice as large.
    """
    return norm_width(depth << (weight_bits - weight_signed), input_bits, input_signed)


def norm_width(l1_norm: int, input_bits: int, input_signed: bool) -> int:
    """Width that suffices for integer weights of this L1 norm (A2Q, eq. 8)."""
    bound = l1_norm << (input_bits - input_signed)
    return width_of_extremes(-bound, bound)


def accumulator_extremes(positive: int, negative: int, x_min: int, x_max: int) -> tuple[int, int]:
    """Least and largest sum of products, both attained.

    The largest at x = `x_max` where a weight is positive and `x_min` where it is negative. Every partial
    sum lies between them too, if `x_min <= 0 <= x_max`.

    Args:
      positive: sum of the positive integer weights of a channel.
      negative: absolute sum of the negative ones.
      x_min, x_max: range of the integer inputs.
    """
    return x_min * positive - x_max * negative, x_max * positive - x_min * negative
