"""What a layer's accumulator must hold."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qflax.numerics import (
    IntegerFormat,
    LearnedInteger,
    accumulator_extremes,
    code_sums,
    data_type_width,
    norm_width,
    width_of_extremes,
)
from qflax.quantizers import QuantizedArray


@flax.struct.dataclass
class Accumulation:
    """Integer weights and inputs of a layer, as far as bounds on its accumulator depend on them.

    Attributes:
      depth: products in a sum.
      input_signed, weight_signed: whether the formats are signed; inputs with a zero point count as unsigned,
        as less that they reach as far.
      positive, negative: sums of the positive and of the absolute negative integer weights, uint32
        [features].
      weight_bits: of the widest channel.
      input_bits: of the inputs.
      x_min, x_max: range of the integer inputs, less their zero point.
      bias: integers that are added to the sums, int32 [features]; 0 for a float bias, which is added to
        what comes out of the accumulator. The bounds from literature know none.
    """

    depth: int = flax.struct.field(pytree_node=False)
    input_signed: bool = flax.struct.field(pytree_node=False)
    weight_signed: bool = flax.struct.field(pytree_node=False)
    positive: jax.Array
    negative: jax.Array
    weight_bits: jax.Array | int
    input_bits: jax.Array | int
    x_min: jax.Array | int
    x_max: jax.Array | int
    bias: jax.Array | int = 0

    @property
    def data_type_bits(self) -> int:
        """Accumulator width that any weights of this type need."""
        return data_type_width(
            self.depth, int(self.weight_bits), int(self.input_bits), self.input_signed, self.weight_signed
        )

    @property
    def norm_bits(self) -> int:
        """Width that weights of this L1 norm need; the layer's largest."""
        norms = np.asarray(self.positive, np.int64) + np.asarray(self.negative, np.int64)
        return norm_width(int(norms.max()), int(self.input_bits), self.input_signed)

    @property
    def exact_bits(self) -> int:
        """Width that these weights and integer biases need, whichever is added first; the layer's largest.

        Without an integer bias an input attains the extreme.
        """
        positive, negative = np.asarray(self.positive), np.asarray(self.negative)
        biases = np.broadcast_to(np.asarray(self.bias), positive.shape)
        x_min, x_max, widths = int(self.x_min), int(self.x_max), []
        for p, n, b in zip(positive, negative, biases, strict=True):
            low, high = accumulator_extremes(int(p), int(n), x_min, x_max)
            widths.append(width_of_extremes(low + min(int(b), 0), high + max(int(b), 0)))
        return max(widths)


def has_integer_sums(kernel: jax.Array | QuantizedArray, inputs: jax.Array | QuantizedArray) -> bool:
    """Whether sums of products of the two are sums of integers behind one scale.

    They are not where an operand is no integer format, or where a scale differs within a sum: of inputs per
    channel.
    """
    integers = IntegerFormat | LearnedInteger
    quantized = all(
        isinstance(x, QuantizedArray) and isinstance(x.format, integers) for x in (kernel, inputs)
    )
    return quantized and inputs.scale.ndim == 0


def accumulation(
    kernel: jax.Array | QuantizedArray, inputs: jax.Array | QuantizedArray, bias: jax.Array | int = 0
) -> Accumulation | None:
    """The bounds' ingredients, or None where the sums are not of integers; `bias` as of `Accumulation`."""
    if not has_integer_sums(kernel, inputs):
        return None
    positive, negative = code_sums(kernel.unscaled)
    fmt = inputs.format
    return Accumulation(
        depth=kernel.value.size // kernel.value.shape[-1],
        input_signed=fmt.signed and inputs.symmetric,
        weight_signed=kernel.format.signed,
        positive=positive,
        negative=negative,
        weight_bits=jnp.max(jnp.asarray(kernel.format.bits)),
        input_bits=fmt.bits,
        x_min=jnp.minimum(fmt.lowest - inputs.zero_point, 0),
        x_max=jnp.maximum(fmt.highest - inputs.zero_point, 0),
        bias=bias,
    )
