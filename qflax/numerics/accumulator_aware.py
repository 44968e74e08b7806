"""Weights whose products never leave an accumulator of given width: A2Q and A2Q+.

Colbert et al. 2023, "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance";
Colbert et al. 2024, "A2Q+: Improving Accumulator-Aware Weight Quantization".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qflax.numerics.arithmetic import quotient, total
from qflax.numerics.gradients import straight_through
from qflax.numerics.integer import Estimator, IntegerFormat
from qflax.numerics.operation import Operation

_TRUNCATION = Estimator(rounding="toward_zero", clip="after_rounding")
_SMALLEST_STEP = 1e-8
_ROUNDING = 2.0**-18  # Relative, of a mean in float32.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("accumulator_bits", "input_bits"),
    meta_fields=("input_signed", "zero_centered"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AccumulatorBudget:
    """What one channel's integer weights may add up to. The widths are values: one program serves all.

    Attributes:
      accumulator_bits: P, int32 [], 2 to 32.
      input_bits: N, int32 [], 1 to 16.
      input_signed: whether one of those is a sign.
      zero_centered: False for A2Q, which bounds the L1 norm; True for A2Q+, which bounds the sum of the
        positive and that of the negative weights, of centred weights half the norm each.
    """

    accumulator_bits: jax.Array | int
    input_bits: jax.Array | int
    input_signed: bool
    zero_centered: bool

    @property
    def norm(self) -> jax.Array:
        """T, the L1 norm that is allowed, float32.

        A2Q (eq. 15): (2^(P-1) - 1) 2^(signed - N). A2Q+ (section 3.2): (2^P - 2) / (2^N - 1).
        """
        largest = _two_to(self.accumulator_bits - 1) - 1
        if self.zero_centered:
            return quotient(2 * largest, _two_to(self.input_bits) - 1)
        return quotient(largest, _two_to(self.input_bits - self.input_signed))

    @property
    def limit(self) -> jax.Array:
        """The same in exact integers, uint32: of the L1 norm (A2Q), of either sum (A2Q+)."""
        one = jnp.uint32(1)
        largest = (one << _unsigned(self.accumulator_bits - 1)) - 1
        if self.zero_centered:
            return largest // ((one << _unsigned(self.input_bits)) - 1)
        return largest >> _unsigned(self.input_bits - self.input_signed)


def accumulator_aware_codes(
    v: jax.Array, scale: jax.Array, norm: jax.Array, budget: AccumulatorBudget, fmt: IntegerFormat
) -> jax.Array:
    """Integer weights within the budget, whatever `v`, `scale` and `norm` are.

    With c = v (A2Q) or v - mean(v) (A2Q+), per channel:
    `clip(truncate(c / step))`, `step = ||c||_1 / min(norm / scale, T)`; truncation only shrinks.
    The proof supposes real numbers: where rounding of the sums has let the integers pass the limit, they
    are quantized again with a larger step, by which the limit holds in spite of all rounding.

    Gradients: truncation is straight-through, clipped elements get none, neither does `norm / scale`
    beyond T; all else is differentiated as it stands. Channels without extent give zeros, and get the
    gradient of the step `scale`, so that they can leave them.

    Args:
      v: float32 [..., channels].
      scale, norm: positive float32 [channels].
      budget: see there.
      fmt: signed, narrow format of the weights.

    Returns:
      Integer-valued float32 of the shape of `v`.
    """
    centred = v - quotient(total(v), v.size // v.shape[-1]) if budget.zero_centered else v
    ratio, allowed = quotient(norm, scale), budget.norm
    l1 = total(jnp.abs(centred))
    step = quotient(l1, jnp.where(ratio < allowed, ratio, allowed))
    extended = step >= _SMALLEST_STEP
    if budget.zero_centered:  # What rounding of the mean leaves of equal weights is no extent.
        extended &= l1 > _ROUNDING * total(jnp.abs(v))
    none = straight_through(jnp.zeros_like(centred), quotient(centred, jax.lax.stop_gradient(scale)))
    u = jnp.where(extended, quotient(centred, jnp.where(extended, step, 1.0)), none)
    u *= jax.lax.stop_gradient(_correction(u, budget, fmt))
    return fmt.fake_quant(u, 1.0, estimator=_TRUNCATION)


@Operation
def within_accumulator(codes: jax.Array, accumulator_bits: jax.Array, *, format: IntegerFormat) -> jax.Array:
    """`codes` as they are; a traced program shows their format and the accumulator they were made for."""
    del accumulator_bits, format
    return codes


def code_sums(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of the positive and absolute sums of the negative codes of each channel: uint32 [channels]."""
    codes = codes.astype(jnp.int32)
    axes = tuple(range(codes.ndim - 1))
    return (
        jnp.sum(jnp.maximum(codes, 0).astype(jnp.uint32), axes),
        jnp.sum(jnp.maximum(-codes, 0).astype(jnp.uint32), axes),
    )


def _correction(u: jax.Array, budget: AccumulatorBudget, fmt: IntegerFormat) -> jax.Array:
    """1 for channels whose codes keep the limit, else a factor for `u` with which they do."""
    positive, negative = code_sums(fmt.encode(u, 1.0, rounding="toward_zero"))
    masses = total(jnp.maximum(u, 0.0)), total(jnp.maximum(-u, 0.0))
    if budget.zero_centered:
        needed, mass = jnp.maximum(positive, negative), jnp.maximum(*masses)
    else:
        needed, mass = positive + negative, sum(masses)
    # A float32 sum of n terms of one sign is off by at most n 2^-24 of itself, in any order.
    rounding_errors = (u.size // u.shape[-1] + 16) * 2.0**-23
    largest = budget.limit.astype(jnp.float32) * (1 - rounding_errors)
    violated = needed > budget.limit
    return jnp.where(violated, quotient(largest, jnp.where(violated, mass, 1.0)), 1.0)


def _two_to(exponent: jax.Array | int) -> jax.Array:
    # exp2 is inexact at integers on some backends; ldexp never is.
    return jnp.ldexp(jnp.float32(1), jnp.asarray(exponent, jnp.int32))


def _unsigned(x: jax.Array | int) -> jax.Array:
    return jnp.asarray(x).astype(jnp.uint32)
