"""How large the sums of a layer of integers can become, exactly; and inputs for which they do.

All of it is Python's integers, but for the sums of weights, which int64 holds. With S+ the sum of a channel's
positive weights and S- that of the absolute negative ones, sums for inputs from `low` to `high` reach from
`low S+ - high S-` to `high S+ - low S-`. Inputs are taken to reach 0 at least, as padding does; then every
partial sum, in any order, lies in between.
"""

import dataclasses

import numpy as np

from qflax.verify.executor import evaluate
from qflax.verify.network import Node

DEFAULT_BITS = 32
LARGEST_CODE = 2**32  # Of a weight; as many as an array may have, 2^26, add up to less than 2^63.


@dataclasses.dataclass(kw_only=True, eq=False)
class IntegerLayer:
    """A convolution or dense layer of integers.

    Attributes:
      node: what executes it.
      codes: integer weights, int64 [..., out], from -LARGEST_CODE to LARGEST_CODE.
      weight_bits: of the weights' format.
      x_low, x_high: range of the integer inputs, with 0.
      scale: of the sums, float64 [out] or [1].
      asked: accumulator bits to hold it against beside the file's promise, or None.
      bias_low, bias_high: what is added to the sums of every channel, with 0: the negative integers of all
        constants together, and the positive ones.
      outputs: values that are these sums, with some of the constants or none: number -> scale.
    """

    node: Node
    codes: np.ndarray
    weight_bits: int
    x_low: int
    x_high: int
    scale: np.ndarray
    asked: int | None = None
    bias_low: list[int] = dataclasses.field(init=False)
    bias_high: list[int] = dataclasses.field(init=False)
    outputs: dict[int, np.ndarray] = dataclasses.field(init=False)

    def __post_init__(self):
        self.bias_low, self.bias_high = ([0] * self.codes.shape[-1] for _ in range(2))
        self.outputs = {self.node.output: self.scale}

    @property
    def depth(self) -> int:
        """Products in a sum."""
        return self.codes[..., 0].size

    @property
    def promised(self) -> int:
        """Bits of the accumulator, the least of what was promised and what is asked for."""
        widths = [bits for bits in (self.node.promised, self.asked) if bits is not None]
        return min(widths, default=DEFAULT_BITS)

    def sums(self) -> tuple[list[int], list[int]]:
        """Least and greatest sum of every output channel, without the bias."""
        flat = self.codes.reshape(-1, self.codes.shape[-1])
        positive = np.maximum(flat, 0).sum(0).tolist()
        negative = np.maximum(-flat, 0).sum(0).tolist()
        low = [self.x_low * p - self.x_high * n for p, n in zip(positive, negative, strict=True)]
        high = [self.x_high * p - self.x_low * n for p, n in zip(positive, negative, strict=True)]
        return low, high

    def extremes(self) -> tuple[list[int], list[int]]:
        """Of what the accumulator holds, channel by channel, whether biases come first or last."""
        low, high = self.sums()
        low = [value + bias for value, bias in zip(low, self.bias_low, strict=True)]
        return low, [value + bias for value, bias in zip(high, self.bias_high, strict=True)]

    def attained(self) -> bool:
        """Whether the extreme inputs of the widest channels give the extreme sums.

        In an accumulator of the promised bits that wraps around, product by product; and in the executor.
        """
        low, high = self.extremes()
        return self._attains(high.index(max(high)), True) and self._attains(low.index(min(low)), False)

    def _attains(self, channel: int, greatest: bool) -> bool:
        kernel = self.codes[..., channel : channel + 1]
        x = np.where((kernel > 0) == greatest, self.x_high, self.x_low)[..., 0]
        products = [a * b for a, b in zip(x.ravel().tolist(), kernel.ravel().tolist(), strict=True)]
        exact, bias = self.sums()[greatest][channel], (self.bias_low, self.bias_high)[greatest][channel]
        last = wrapped_sum([*products, bias], self.promised)
        first = wrapped_sum([bias, *products], self.promised)
        return bool(
            sum(products) == exact
            and wrapped_sum(products, self.promised) == exact
            and last == first == exact + bias
            and self._executed(x, kernel) == np.float32(exact)
        )

    def _executed(self, x: np.ndarray, kernel: np.ndarray) -> float:
        attributes = {}
        if self.node.operation == "conv":
            attributes = dict(strides=(1, 1), dilation=(1, 1), padding=((0, 0), (0, 0)), groups=1)
        arrays = [x[None].astype(np.float32), kernel.astype(np.float32)]
        return evaluate(self.node.operation, arrays, attributes).item()


def wrapped_sum(terms: list[int], bits: int) -> int:
    """Sum in two's complement of so many bits, term by term."""
    total, half = 0, 1 << (bits - 1)
    for term in terms:
        total = (total + term + half) % (2 * half) - half
    return total


def width(low: int, high: int) -> int:
    """Bits of the narrowest two's complement integer that holds 0 and both."""
    return max(max(high, 0).bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1
