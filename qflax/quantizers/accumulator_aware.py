"""Accumulator-aware weights, A2Q and A2Q+: sums of products that never overflow.

Colbert et al. 2023, "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance";
Colbert et al. 2024, "A2Q+: Improving Accumulator-Aware Weight Quantization".
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.errors import UserError, choose, require
from qflax.numerics import (
    AccumulatorBudget,
    IntegerFormat,
    LearnedInteger,
    accumulator_aware_codes,
    product,
    project_onto_l1_ball,
    within_accumulator,
)
from qflax.quantizers.base import Quantizer, usual_weight
from qflax.quantizers.checks import check_flag, check_whole
from qflax.quantizers.collections import PARAMETERS, PENALTIES, PROJECTED, STATISTICS
from qflax.quantizers.constraints import ANY_LOG2, Box
from qflax.quantizers.quantized_array import QuantizedArray, quantized_array
from qflax.quantizers.statistics import SMALLEST_RANGE

VARIANTS = ("a2q", "a2q+")

_SMALLEST_SCALE = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccumulatorAware:
    """Weight quantizer whose integer weights keep every sum of products within an accumulator.

    The scale s = 2^d and the norm g = 2^t of each output channel are learned (A2Q, section 4.2). The
    layer's input must be quantized to integers: its width and sign are part of the bound.

    Attributes:
      bits: of the weights, 2 to 16; signed and narrow.
      accumulator_bits: P, 2 to 32; in the variables, so that changing it there compiles nothing (see
        `set_accumulator_bits`).
      variant: `a2q`, or `a2q+`, which centres each channel and may spend about twice the norm.
      tied: one scale, as in the papers; False keeps another one in g / s and the penalty (Brevitas).
      ep_init: project the float weights onto the budget before training (A2Q+, section 3.3).
    """

    bits: int
    accumulator_bits: int
    variant: str = "a2q+"
    tied: bool = True
    ep_init: bool = True

    def __post_init__(self):
        check_whole(self, "bits", 2, 16, "accumulator-aware weights have 2 to 16 bits")
        check_whole(self, "accumulator_bits", 2, 32, "an accumulator has 2 to 32 bits")
        choose("variant", self.variant, VARIANTS)
        check_flag(self, "tied", "ep_init")


class AccumulatorAwareQuantizer(Quantizer):
    """Puts a kernel [..., channels] on the grid of an `AccumulatorAware` spec.

    Variables: in `quantizer_params` `log2_scale` and `log2_norm`, float32 [channels], and if untied
    `log2_norm_scale`; in `quantizer_stats` `accumulator_bits`, int32 [].

    Reports the penalty sum(relu(g - T s)), which keeps g where it has an effect (A2Q, section 4.2; in the
    linear domain, as in the authors' code).
    """

    @property
    def format(self) -> IntegerFormat:
        """Number format of the codes."""
        return IntegerFormat(bits=self.spec.bits, signed=True, narrow=True)

    @nn.compact
    def __call__(self, x: jax.Array, inputs: jax.Array | QuantizedArray | None = None) -> QuantizedArray:
        """Quantizes a kernel that will be multiplied with `inputs`; the value is float32.

        Raises:
          UserError: `inputs` are not integers with one scale; this is a quantizer of activations.
        """
        fmt, x = self.format, x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        require(
            self.spec.variant == "a2q" or x.size > x.shape[-1],
            f"{'/'.join(self.path[:-1])}: variant='a2q+' centres the weights of each channel, and here that "
            "is one, which leaves zero; give this layer variant='a2q'",
        )
        budget = self._budget(inputs)
        size = jnp.abs(x)
        size = jnp.where(jnp.max(size, axes) <= SMALLEST_RANGE, usual_weight(x), size)
        largest = jnp.maximum(jnp.max(size, axes) / fmt.highest, _SMALLEST_SCALE)
        norm = jnp.maximum(jnp.sum(size, axes), _SMALLEST_SCALE)
        log2_scale = self._learned("log2_scale", jnp.log2(largest))
        log2_norm = self._learned("log2_norm", jnp.log2(norm))
        names, log2_norm_scale = ["log2_norm", "log2_scale"], log2_scale
        if not self.spec.tied:
            names.append("log2_norm_scale")
            log2_norm_scale = self._learned("log2_norm_scale", jnp.log2(largest))
        self._constrain(Box(tuple((name, *ANY_LOG2) for name in sorted(names))))
        scale, norm_scale = (
            jnp.maximum(jnp.exp2(value), _SMALLEST_SCALE) for value in (log2_scale, log2_norm_scale)
        )
        norm = jnp.exp2(log2_norm)
        allowed = budget.norm * norm_scale
        self._report(PENALTIES, "accumulator", jnp.sum(jax.nn.relu(norm - allowed)))
        if self.spec.ep_init:
            self._project(x, allowed)
        codes = accumulator_aware_codes(x, norm_scale, norm, budget, fmt)
        unscaled = jax.lax.stop_gradient(codes)
        unscaled = within_accumulator(unscaled, budget.accumulator_bits, format=fmt)
        return quantized_array(product(codes, scale), unscaled, scale, fmt)

    def _project(self, kernel: jax.Array, radius: jax.Array) -> None:
        """EP-init, see `project_weights`: the layer knows where in its kernel the weights of `kernel` are."""
        if not self._is_asked(PROJECTED):
            return
        self._report(PROJECTED, "kernel", project_onto_l1_ball(kernel, radius))
        log2_norm = jnp.minimum(self.get_variable(PARAMETERS, "log2_norm"), jnp.log2(radius))
        self.put_variable(PARAMETERS, "log2_norm", log2_norm)

    def _budget(self, inputs: jax.Array | QuantizedArray | None) -> AccumulatorBudget:
        spec, where = self.spec, "/".join(self.path[:-1])
        require(self.weights, f"{where}: kind='accumulator_aware' is for weights, not activations")
        problem = None
        if not isinstance(inputs, QuantizedArray):
            problem = "float; quantize what comes before it by a rule for its activations (before the first "
            problem += (
                f"layer of a ResNet 'input', before its classifier 'pool/output'; else '{where}/input')"
            )
        elif not isinstance(inputs.format, IntegerFormat | LearnedInteger):
            problem = "a minifloat; give the activations before it kind='uniform'"
        elif inputs.scale.ndim > 0:
            problem = "scaled per channel; give the activations before it granularity='per_tensor'"
        if problem:
            raise UserError(
                f"{where}: accumulator_bits={spec.accumulator_bits} needs an input of integers with one "
                f"scale, and it is {problem}, or give {where!r} another kind of weights"
            )
        width = self.variable(STATISTICS, "accumulator_bits", lambda: jnp.int32(spec.accumulator_bits))
        zero_centered, fmt = spec.variant == "a2q+", inputs.format
        bits = jnp.asarray(jax.lax.stop_gradient(jnp.max(jnp.asarray(fmt.bits))), jnp.int32)
        # -1 and +1 are two apart, as far as the codes of two bits.
        bipolar = isinstance(fmt, IntegerFormat) and fmt.bipolar
        return AccumulatorBudget(
            accumulator_bits=width.value,
            input_bits=bits + (bipolar and zero_centered),
            # Less their zero point, signed codes reach as far as unsigned ones.
            input_signed=fmt.signed and inputs.symmetric,
            zero_centered=zero_centered,
        )


def set_accumulator_bits(quantizer_stats: Mapping, bits: int) -> dict:
    """Statistics in which every accumulator has `bits`, 2 to 32."""
    require(2 <= bits <= 32, f"accumulator_bits={bits!r}: an accumulator has 2 to 32 bits")

    def change(path, value):
        return jnp.full_like(value, bits) if path[-1].key == "accumulator_bits" else value

    return jax.tree_util.tree_map_with_path(change, quantizer_stats)


def project_weights(
    model: nn.Module, variables: Mapping, x: jax.Array, **call_arguments
) -> tuple[dict, bool]:
    """EP-init: each channel's float weights projected onto the L1 ball that its accumulator allows.

    The Euclidean projection is the nearest kernel that truncation will not shrink further (Colbert et al.
    2024, section 3.3). Then norms are at most those of the balls; scales stay. A layer that is called several
    times keeps what all of its inputs allow.

    Args:
      model: a module built of qflax layers.
      variables: its variables, calibrated.
      x: an input of the model, of which the widths matter, not the values.
      **call_arguments: passed to the model, such as `train=False`.

    Returns:
      The variables with new kernels and norms, and whether there are any.
    """

    @jax.jit
    def project(variables, x):
        mutable = ["params", PARAMETERS, PROJECTED]
        return model.apply(variables, x, mutable=mutable, **call_arguments)[1]

    state = project(variables, x)
    if not state.get(PROJECTED):
        return dict(variables), False
    return {**variables, "params": state["params"], PARAMETERS: state[PARAMETERS]}, True
