"""Terms of the loss beside the task: sizes beyond targets, norms beyond accumulators, weights off grids."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Penalties:
    """Targets and strengths, all run-time inputs: changing them compiles nothing.

    Attributes:
      targets: name of a size (`layers.sizes`) -> KiB; inf is no target.
      strengths: the same names -> weight of the squared excess in the loss, per KiB^2.
      ramp_start, ramp_end: steps between which the strengths grow from 0.
      freeze_step: from which learned widths freeze once all targets hold.
      last_step: at which they freeze in any case.
      accumulator_strength: weight of A2Q's penalty.
      oscillation_damping: weight of the weights' squared distances from their grids, at the last step.
      oscillation_thresholds: [2], the frequencies from which oscillating weights freeze, at the first and at
        the last step.
    """

    targets: dict[str, jax.Array]
    strengths: dict[str, jax.Array]
    ramp_start: jax.Array
    ramp_end: jax.Array
    freeze_step: jax.Array
    last_step: jax.Array
    accumulator_strength: jax.Array
    oscillation_damping: jax.Array
    oscillation_thresholds: jax.Array

    def of_sizes(self, sizes: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        """strength * relu(size - target)^2, summed (Uhlich et al. 2020, section 3.3)."""
        length = jnp.maximum(self.ramp_end - self.ramp_start, 1)
        ramp = jnp.clip((step + 1 - self.ramp_start) / length, 0.0, 1.0)
        excesses = {name: jax.nn.relu(sizes[name] - target) for name, target in self.targets.items()}
        return ramp * sum(self.strengths[name] * excess**2 for name, excess in excesses.items())

    def of_deviations(self, deviations: jax.Array, step: jax.Array) -> jax.Array:
        """Their sum by a weight that grows from 0 by a cosine (Nagel et al. 2022, dampening)."""
        return self.oscillation_damping * self._growth(step) * deviations

    def oscillation_threshold(self, step: jax.Array) -> jax.Array:
        """From the first to the last by a cosine (Nagel et al. 2022, iterative weight freezing)."""
        first, last = self.oscillation_thresholds
        return first + (last - first) * self._growth(step)

    def _growth(self, step: jax.Array) -> jax.Array:
        return (1 - jnp.cos(jnp.pi * (step + 1) / self.last_step)) / 2

    def freeze(self, sizes: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        """Whether widths are frozen after the step that had these sizes."""
        held = jnp.stack([sizes[name] <= target for name, target in self.targets.items()])
        due = (step + 1 >= self.freeze_step) & jnp.all(held)
        return due | (step + 1 >= self.last_step)
