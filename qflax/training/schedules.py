"""Learning rate over the steps of a run, relative to its peak."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qflax.errors import require


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
        f"config.warmup_epochs: {warmup_steps} steps of warm-up in a run of {num_steps}; shorten it",
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
