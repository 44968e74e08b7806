"""Addition of a residual branch to its shortcut."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.layers.cost import report
from qflax.layers.operands import quantize_activations
from qflax.quantizers import CALIBRATION, FLOAT, STATISTICS, Quantization, QuantizedArray, bits_of, value_of


class Add(nn.Module):
    """Adds two branches; by a rule both go through one shared quantizer first, so that codes can be added.

    Attributes:
      signed: whether the branches are signed, where the spec leaves it open.
      quantization: the policy, asked for this layer's `activations`; float by default.
    """

    signed: bool = True
    quantization: Quantization = FLOAT

    @nn.compact
    def __call__(self, branch: jax.Array | QuantizedArray, shortcut: jax.Array | QuantizedArray) -> jax.Array:
        """Adds two arrays [batch, ...] of one shape."""
        operands = value_of(branch), value_of(shortcut)
        quantizer = quantize_activations(self, self.quantization, self.signed, by_default=False)
        bits = 32
        if quantizer is not None:
            # One call where it looks at the data, so that both are on one grid.
            if any(self.is_mutable_collection(name) for name in (STATISTICS, *CALIBRATION.values())):
                both = quantizer(jnp.concatenate(operands))
                operands, bits = jnp.split(both.value, 2), bits_of(both)
            else:
                quantized = [quantizer(x) for x in operands]
                operands, bits = [x.value for x in quantized], bits_of(quantized[0])
        total = operands[0] + operands[1]
        report(
            self,
            kind="activation",
            roles=("activations",),
            activations=0 if quantizer is None else 2 * math.prod(total.shape[1:]),
            activation_bits=bits,
        )
        return total
