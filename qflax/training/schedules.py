"""Learning rate over the steps of a run, relative to its peak."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qflax.errors import require

MOST_STEPS_PER_DISPATCH = 8192  # All of them read one window of rates.


@flax.struct.dataclass
class RateWindow:
    """Relative learning rates of some steps in a row, as many in a run of any length.

    Attributes:
      values: float32 [8192].
      first_step: int32, the first of the steps.
    """

    values: jax.Array
    first_step: jax.Array

    def at(self, step: jax.Array) -> jax.Array:
        """The rate of a step."""
        return self.values[step - self.first_step]


class Rates:
    """The schedule on the devices, window by window, so that dispatches need nothing from the host."""

    def __init__(self, relative_rates: np.ndarray, replicate: Callable[[RateWindow], RateWindow]):
        """Takes the schedule [steps] and a function that puts a window on the devices."""
        self._rates, self._replicate = relative_rates, replicate
        self._first, self._window = 0, None

    def window(self, start: int, end: int) -> RateWindow:
        """A window with the steps from `start` to `end`; the same one as before while it has them."""
        size = MOST_STEPS_PER_DISPATCH
        if self._window is None or not self._first <= start <= end <= self._first + size:
            self._first, values = start, self._rates[start : start + size]
            values = np.pad(values, (0, size - len(values)))
            self._window = self._replicate(RateWindow(values, np.int32(start)))
        return self._window


def relative_learning_rate(
    schedule: str,
    num_steps: int,
    warmup_steps: int,
    milestone_steps: tuple[int, ...] = (),
    milestone_factor: float = 1.0,
) -> np.ndarray:
    """The whole schedule, worked out once on the host and given to the steps as numbers.

    | schedule | after a linear warm-up from 0 to 1                                     |
    |----------|------------------------------------------------------------------------|
    | cosine   | half a cosine down to 0 at the last step                               |
    | onecycle | linear down to 0 at the last step (Smith & Topin 2018, without momentum's part) |
    | step     | times `milestone_factor` at every milestone                            |
    | constant | 1                                                                      |

    Args:
      schedule: one of the above.
      num_steps: length of the run.
      warmup_steps: of them.
      milestone_steps: counted from the start of the run.
      milestone_factor: see above.

    Returns:
      float32 [num_steps], 1 at the peak.

    Raises:
      UserError: the warm-up is as long as the run.
    """
    require(
        warmup_steps < num_steps,
        f"config.warmup_epochs: its {warmup_steps} steps must be fewer than the run's {num_steps}; lower it "
        "(0 is none), or raise config.num_epochs or config.num_train_steps",
    )
    rest = num_steps - warmup_steps
    factors = {}
    for step in milestone_steps:  # Several may fall on one step of a short run.
        factors[step - warmup_steps] = factors.get(step - warmup_steps, 1.0) * milestone_factor
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "onecycle": optax.linear_schedule(1.0, 0.0, rest),
        "step": optax.piecewise_constant_schedule(1.0, factors),
        "constant": optax.constant_schedule(1.0),
    }[schedule]
    warmup = optax.linear_schedule(0.0, 1.0, max(warmup_steps, 1))
    joined = optax.join_schedules([warmup, after], [warmup_steps])
    steps = jnp.arange(num_steps)
    # The first step of a warm-up would have a rate of 0 and change nothing: count from 1.
    values = jax.jit(jax.vmap(lambda step: joined(jnp.where(step < warmup_steps, step + 1, step))))(steps)
    return np.asarray(values, np.float32)
