"""The training step on one device, and many of them in one dispatch."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from qflax.data.augment import Augmentation, augment, normalize
from qflax.layers import COST, sizes, sown_costs
from qflax.quantizers import (
    CONSTRAINTS,
    DEVIATIONS,
    HELD,
    PARAMETERS,
    PENALTIES,
    STATISTICS,
    constrain,
    freeze_widths,
    frozen_share,
    limit_gradients,
    set_oscillation_threshold,
    widths_frozen,
)
from qflax.training.distillation import Teacher, distillation_loss
from qflax.training.losses import LOSSES, smooth
from qflax.training.optimizers import WEIGHTS, Hyperparameters, OptimizerKinds, build_optimizer
from qflax.training.parallel import AXIS
from qflax.training.penalties import Penalties
from qflax.training.schedules import RateWindow
from qflax.training.state import BATCH_STATS, OBSERVED, TrainState
from qflax.training.stream import ResidentData, StreamedData

RNGS = ("quantization", "dropout")  # Random streams that a network may draw from in training.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """One update from one batch; every device computes its share.

    The batch at step t is the t-th run of `batch_size` positions of the training stream. Everything random
    is a function of (seed, position) or (seed, step), so neither a resumed run nor another number of
    devices draws differently; only stochastic rounding of activations depends on the number of devices.

    Attributes:
      model: with `AXIS` as the axis of its norms.
      optimizer: kinds of optimizers.
      loss: name in `LOSSES`.
      batch_size: of all devices together.
      num_devices: that share it.
      num_classes: of the labels.
      augmentation, mean, std: see `data.augment`.
      damped: whether the loss has the penalty that damps oscillations of weights.
    """

    model: nn.Module
    optimizer: OptimizerKinds
    loss: str
    batch_size: int
    num_devices: int
    num_classes: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    damped: bool = False

    def many(
        self,
        state: TrainState,
        index: jax.Array,
        data: ResidentData | StreamedData,
        rates: RateWindow,
        numbers: Hyperparameters,
        penalties: Penalties,
        teacher: Teacher | None = None,
        *,
        steps: int,
        unroll: bool,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes several steps.

        Args:
          state: before the steps.
          index: of this device.
          data: the training set, or the batches of these steps.
          rates: the schedule.
          numbers: of the optimizer.
          penalties: beside the loss of the task.
          teacher: whose predictions are learned, too, or None.
          steps: how many.
          unroll: write the steps out instead of looping: in a loop (even one of a single round, such as
            a scan that is unrolled) XLA's CPU backend computes a convolution's weight gradient tens of
            times slower.

        Returns:
          The state after them, and metrics [steps].
        """

        def body(state, _=None):
            return self(state, index, data, rates.at(state.step), numbers, penalties, teacher)

        if not unroll:
            return jax.lax.scan(body, state, length=steps)
        rows = []
        for _ in range(steps):
            state, metrics = body(state)
            rows.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *rows)

    def __call__(
        self,
        state: TrainState,
        index: jax.Array,
        data: ResidentData | StreamedData,
        relative_rate: jax.Array,
        numbers: Hyperparameters,
        penalties: Penalties,
        teacher: Teacher | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one step; arguments and results as of `many`, for one step.

        A step that is not finite changes no parameter: up to `numbers.skip_bad_steps` in a row are passed
        over, and after one more the state stays as it was before that one.
        """
        updated, metrics, _ = self.update(state, index, data, relative_rate, numbers, penalties, teacher)
        finite = _all_finite((metrics, updated.trained, updated.observed))
        stuck = state.bad_steps > numbers.skip_bad_steps
        made = finite & ~stuck
        updated = jax.tree.map(lambda new, old: jnp.where(made, new, old), updated, state)
        skipped = ~made & (state.bad_steps < numbers.skip_bad_steps)
        bad_steps = jnp.where(made, 0, state.bad_steps + ~stuck)
        metrics["bad_steps"] = bad_steps.astype(jnp.float32)
        if widths_frozen(updated.observed[STATISTICS]) is not None:
            # At the last step, though it changes nothing else.
            due = skipped & (state.step + 1 >= penalties.last_step)
            statistics = freeze_widths(updated.observed[STATISTICS], due)
            updated = updated.replace(observed={**updated.observed, STATISTICS: statistics})
        return updated.replace(step=state.step + (made | skipped), bad_steps=bad_steps), metrics

    def update(
        self,
        state: TrainState,
        index: jax.Array,
        data: ResidentData | StreamedData,
        relative_rate: jax.Array,
        numbers: Hyperparameters,
        penalties: Penalties,
        teacher: Teacher | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array], Mapping]:
        """The state after one step, finite or not, its metrics, and the gradients that led there."""
        images, labels, rngs = self.inputs(state, index, data)
        inputs, labels = normalize(images, self.mean, self.std), smooth(labels, numbers.label_smoothing)
        soft_labels = None if teacher is None else teacher(images)
        learns_widths = widths_frozen(state.observed[STATISTICS]) is not None
        threshold = penalties.oscillation_threshold(state.step)
        statistics = set_oscillation_threshold(state.observed[STATISTICS], threshold)
        before = {**state.observed, STATISTICS: statistics}
        freezes_weights = frozen_share(statistics) is not None
        reported = [CONSTRAINTS, PENALTIES, *[COST] * learns_widths, *[DEVIATIONS] * self.damped]
        if freezes_weights:
            reported += [HELD, WEIGHTS]

        def loss_of(trained):
            logits, new = self.model.apply(
                {**trained, **before}, inputs, train=True, mutable=[*OBSERVED, *reported], rngs=rngs
            )
            logits = logits.astype(jnp.float32)  # Networks of the user's own may answer in fewer bits.
            task, extra = {"loss": jnp.mean(LOSSES[self.loss](logits, labels))}, {}
            if teacher is not None:
                soft = jnp.mean(distillation_loss(logits, soft_labels, teacher.temperature))
                mixed = (1 - teacher.weight) * task["loss"] + teacher.weight * soft
                task = {"loss": mixed, "distillation_loss": soft}
            if learns_widths:
                extra = sizes(sown_costs(new))
                extra["size_penalty"] = penalties.of_sizes(extra, state.step)
            if new.get(PENALTIES):
                total = _total(new[PENALTIES])
                extra["accumulator_penalty"] = penalties.accumulator_strength * total
            if self.damped:
                total = _total(new[DEVIATIONS])
                extra["oscillation_penalty"] = penalties.of_deviations(total, state.step)
            penalty = sum(value for name, value in extra.items() if name.endswith("_penalty"))
            return task["loss"] + penalty, (task, logits, new, extra)

        results, gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
        _, (task, logits, new, extra) = results
        gradients = jax.lax.pmean(gradients, AXIS)
        gradients[PARAMETERS] = limit_gradients(gradients[PARAMETERS], state.trained[PARAMETERS], new)
        metrics = {
            **task,
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(labels, -1), dtype=jnp.float32),
        }
        metrics = {
            **jax.lax.pmean(metrics, AXIS),
            **extra,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": relative_rate * numbers.learning_rate,
        }
        observed = {name: new.get(name, {}) for name in OBSERVED}
        if learns_widths:
            frozen = penalties.freeze(extra, state.step)
            observed[STATISTICS] = freeze_widths(observed[STATISTICS], frozen)
            metrics["widths_frozen"] = widths_frozen(observed[STATISTICS]).astype(jnp.float32)
        if freezes_weights:
            metrics["frozen_weights"] = frozen_share(observed[STATISTICS])
            # Those that are frozen go on from their points, from which they would decay.
            state = state.replace(trained={**state.trained, WEIGHTS: new[WEIGHTS]})
        updated = self._apply(state, gradients, observed, new, relative_rate, numbers)
        return updated, metrics, gradients

    def inputs(
        self, state: TrainState, index: jax.Array, data: ResidentData | StreamedData
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """This device's share of the batch, and what its step draws from.

        Returns:
          float32 images, values 0 to 255; label distributions; the keys of random streams.
        """
        key = jax.random.key(data.seed)
        share = self.batch_size // self.num_devices
        places = index * share + jnp.arange(share)
        examples = data.examples(state.step, places, self.batch_size, partners=self.augmentation.mixes)
        images, labels = augment(
            jax.random.fold_in(key, 0),
            state.step * self.batch_size + places,
            *examples,
            spec=self.augmentation,
            num_classes=self.num_classes,
            fill=255 * jnp.asarray(self.mean),  # Zero after normalisation, as in the cutout paper.
        )
        # The same on all devices, so that stochastically rounded weights are the same on all.
        rngs = {"quantization": jax.random.fold_in(jax.random.fold_in(key, 1), state.step)}
        dropout = jax.random.fold_in(jax.random.fold_in(key, 2), state.step)
        rngs["dropout"] = jax.random.fold_in(dropout, index)  # Of networks of the user's own.
        return images, labels, rngs

    def _apply(
        self,
        state: TrainState,
        gradients: Mapping,
        observed: dict,
        reported: Mapping,
        relative_rate: jax.Array,
        numbers: Hyperparameters,
    ) -> TrainState:
        optimizer = build_optimizer(self.optimizer, numbers, relative_rate)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        trained = {**trained, PARAMETERS: constrain(trained[PARAMETERS], reported)}
        average = state.average
        if average:
            current = {**trained, BATCH_STATS: observed[BATCH_STATS]}
            average = optax.incremental_update(current, average, 1 - numbers.ema_decay)
        return state.replace(
            step=state.step + 1,
            trained=trained,
            observed=observed,
            opt_state=opt_state,
            average=average,
        )


def _total(tree: Mapping) -> jax.Array:
    """Sum of all numbers; of repeated layers each has several."""
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


def _all_finite(tree) -> jax.Array:
    # One reduction: with one for each leaf, each fused with that leaf's update, XLA takes six times as long
    # to compile the step.
    leaves = [jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.isfinite(jnp.concatenate(leaves)))
