"""What all quantizers share: calibration, learned numbers, observed ranges."""

import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.quantizers.collections import (
    CALIBRATION,
    CONSTRAINTS,
    DEVIATIONS,
    GIVEN,
    HELD,
    OBSERVED,
    PARAMETERS,
    STATISTICS,
)
from qflax.quantizers.observers import Observed
from qflax.quantizers.oscillation import MOST_BITS, RECORD, hold, observed, unobserved
from qflax.quantizers.statistics import SMALLEST_RANGE, Statistic


class Quantizer(nn.Module):
    """Puts an array on a grid that a spec describes.

    Learned numbers and observed ranges are placeholders until a calibration pass (`calibration.calibrate`)
    has set them. In it activations pass through unquantized, so that every range is that of the float
    network behind quantized weights.

    A subclass has the `format`, and maps `__call__(x, inputs)` to a `QuantizedArray`, which
    `quantized_array` makes; `inputs` is what a kernel is multiplied with. What it computes must be the same
    bits in every program, or exports differ: made by `numerics.product` and `quotient`, and of maxima rather
    than of sums.

    Attributes:
      spec: describes the quantizer.
      weights: True for a kernel [..., channels], False for activations [batch, ..., channels].
      signed: whether the data is signed, where the spec leaves it open.
      axis_name: mapped axis over which a batch's range is reduced, or None.
      freezes_oscillating: whether weights of few bits that oscillate freeze, where the quantizer rounds them
        to the nearest points of a grid (see `oscillation`).
    """

    spec: typing.Any
    weights: bool
    signed: bool = True
    axis_name: str | None = None
    freezes_oscillating: bool = False

    @property
    def _calibrating(self) -> bool:
        role = "weights" if self.weights else "activations"
        return self._is_asked(CALIBRATION[role])

    def _is_asked(self, collection: str) -> bool:
        """Whether this pass shall do what a collection stands for: it names it as mutable. `mutable=True`,
        which every other name is, too, means what the pass changes anyhow.
        """
        everything = self.is_mutable_collection("any other")
        return self.is_mutable_collection(collection) and not everything and not self.is_initializing()

    @property
    def _training(self) -> bool:
        """Whether statistics are to follow the data of this pass."""
        mutable = self.is_mutable_collection(STATISTICS) and not self.is_initializing()
        return mutable and not any(self._is_asked(name) for name in CALIBRATION.values())

    @property
    def _averaging(self) -> bool:
        """Whether this pass moves a running average."""
        return False

    @property
    def _symmetric(self) -> bool:
        """Whether a range is one number, its end on both sides."""
        return True

    def _learned(self, name: str, calibrated: jax.Array) -> jax.Array:
        """A trained number; a calibration pass sets it."""
        variable = self.variable(PARAMETERS, name, lambda: calibrated)
        if self._calibrating:
            variable.value = jax.lax.stop_gradient(calibrated)
        return variable.value

    def _report(self, collection: str, name: str, value: typing.Any) -> None:
        """Reports `value` where `collection` is mutable, but not among initial variables."""
        if not self.is_initializing():
            self.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def _constrain(self, constraint: typing.Any) -> None:
        """Declares what this quantizer's parameters must satisfy."""
        self._report(CONSTRAINTS, "constraint", constraint)

    def _report_deviation(self, x: jax.Array, value: jax.Array, x_max: jax.Array) -> None:
        """Reports how far weights are from their grid, as a penalty that damps their oscillation between
        its points (Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", dampening):
        it pulls each towards its own, and leaves those beyond the range alone, as well as the grid.
        """
        if self.weights and self.is_mutable_collection(DEVIATIONS):
            value, x_max = jax.lax.stop_gradient((value, x_max))
            inside = jnp.where(jnp.abs(x) <= x_max, x - value, 0.0)
            self._report(DEVIATIONS, "weights", jnp.sum(inside**2))

    @property
    def _freezes(self) -> bool:
        """Whether weights freeze that oscillate."""
        return self.weights and self.freezes_oscillating and self.format.bits <= MOST_BITS

    def _held(self, x: jax.Array, scale: jax.Array, kernel: jax.Array | None) -> jax.Array:
        """Weights `x`, those that are frozen on their points of the grid of `scale`.

        Where that is asked for, reports likewise the `kernel` that they were made of, if it has their units.
        """
        if not self._freezes:
            return x
        record = self.variable(STATISTICS, RECORD, unobserved, x.shape).value
        if kernel is not None and self._is_asked(HELD):
            self._report(HELD, "kernel", hold(kernel, scale, record))
        return hold(x, scale, record)

    def _watch(
        self,
        codes: jax.Array,
        rounded: typing.Callable[[jax.Array], jax.Array],
        *,
        fixed: jax.Array | bool = True,
        narrow: jax.Array | bool = True,
    ) -> None:
        """Lets weights freeze that oscillate, by the codes of a training step; see `observed`.

        Before the grid is `fixed`, steps do not count.
        """
        if not (self._freezes and self._training):
            return
        before = self.get_variable(STATISTICS, RECORD)
        after = observed(before, jax.lax.stop_gradient(codes), rounded, narrow)
        after = jax.tree.map(lambda new, old: jnp.where(fixed, new, old), after, before)
        self.put_variable(STATISTICS, RECORD, after)

    def _observed(self, x: jax.Array) -> tuple[jax.Array | float, jax.Array]:
        """Lower and upper end of the range that was observed so far; before anything was, 1 is the upper.

        Calibration takes the mean over its batches, of absolute maxima the extremes, unless it was given
        another rule (see `calibration.calibrate`). A running average copies its first batch; that of
        training quantizes each batch by its own range. Batches without any extent are left out; where there
        was no other, the range is one of a usual size.
        """
        shape = (x.shape[-1],) if self.spec.granularity == "per_channel" else ()
        start = {"x_max": jnp.ones} if self._symmetric else {"x_min": jnp.zeros, "x_max": jnp.ones}
        ends = {name: self.variable(STATISTICS, name, init, shape) for name, init in start.items()}
        count = self.variable(STATISTICS, "count", lambda: jnp.zeros((), jnp.int32))
        current = {name: end.value for name, end in ends.items()}
        if self._calibrating or self._averaging:
            batch = self._batch_range(x)
            first, nothing = (count.value == 0) | _is_empty(current), _is_empty(batch)
            for name, end in ends.items():
                merged = jnp.where(
                    nothing, end.value, self._merged(name, end.value, batch[name], count.value)
                )
                end.value = jnp.where(first, batch[name], merged)
                current[name] = batch[name] if self._averaging else end.value
            count.value += 1
        usual = usual_weight(x) if self.weights else 1.0
        return current.get("x_min", 0.0), jnp.where(_is_empty(current), usual, current["x_max"])

    def _merged(self, name: str, old: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
        momentum = self.spec.momentum if self._averaging else self.get_variable(GIVEN, "momentum")
        if momentum is not None:
            return old + momentum * (new - old)
        if self._extremes:
            return jnp.minimum(old, new) if name == "x_min" else jnp.maximum(old, new)
        return old + (new - old) / (count + 1)

    @property
    def _extremes(self) -> bool:
        return self.spec.range_statistic == "absmax"

    def _batch_range(self, x: jax.Array) -> dict[str, jax.Array]:
        """Ends of one batch's range, on all devices: their mean over those with any extent; of NaN NaN."""
        low, high = self._ends(x)
        ends = {"x_max": high} if self._symmetric else {"x_min": low, "x_max": high}
        if self.axis_name is None:
            return ends
        if self._extremes:
            wider = {"x_min": jax.lax.pmin, "x_max": jax.lax.pmax}
            return {name: wider[name](value, self.axis_name) for name, value in ends.items()}
        nothing = _is_empty(ends)
        terms = [jnp.where(nothing, 0.0, value) for value in ends.values()]
        *sums, count = jax.lax.psum(jnp.stack([*terms, jnp.where(nothing, 0.0, 1.0)]), self.axis_name)
        return {name: total / jnp.maximum(count, 1.0) for name, total in zip(ends, sums, strict=True)}

    def _ends(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """Lower and upper end as they were given, or else of the range of `x`; reports `x` to observers."""
        if self.has_variable(GIVEN, "x_max"):
            return self.get_variable(GIVEN, "x_min"), self.get_variable(GIVEN, "x_max")
        if not self.weights:
            self.sow(OBSERVED, "calls", Observed(x, self._statistic))
        sample = x if self.weights else self._statistic.sample(x)
        low, high = jax.lax.stop_gradient(self._statistic.range_of(sample))
        # Not every sample has the NaN, nor is every percentile beyond it.
        return low, jnp.where(jnp.isnan(x).any(), jnp.nan, high)

    @property
    def _statistic(self) -> Statistic:
        return Statistic(
            kind=self.spec.range_statistic,
            format=self.format,
            symmetric=self._symmetric,
            per_channel=self.spec.granularity == "per_channel",
            percentile=self.spec.percentile,
        )


def _is_empty(ends: dict[str, jax.Array]) -> jax.Array:
    """Whether a range has no extent."""
    return ends["x_max"] - ends.get("x_min", 0.0) <= SMALLEST_RANGE


def usual_weight(kernel: jax.Array) -> float:
    """Size of the weights of a kernel [..., channels] that has none of its own, so that a layer that starts
    from zeros can leave them: the standard deviation of a common initialisation.
    """
    return math.sqrt(kernel.shape[-1] / kernel.size)
