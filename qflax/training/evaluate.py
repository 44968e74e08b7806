"""Evaluation: every example counts exactly once, whatever the batch size and the number of devices."""

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from qflax.data import Dataset
from qflax.data.augment import normalize
from qflax.training.losses import cross_entropy
from qflax.training.parallel import AXIS, Devices


@flax.struct.dataclass
class EvaluationMetrics(metrics.Collection):
    """Means over the examples that the mask keeps."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Average.from_output("correct")
    top5_accuracy: metrics.Average.from_output("correct5")


class Evaluator:
    """Evaluates variables of one model on one data set that stays on the devices."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        devices: Devices,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        """Puts the data set on the devices.

        Args:
          model: computes in float32, whatever it was trained in.
          dataset: the examples.
          devices: they share every batch.
          batch_size: of all devices together, rounded up to what divides among them.
          mean, std: normalisation.
        """
        self._devices = devices
        self._num_examples = dataset.num_examples
        self._data = devices.replicate((dataset.images, dataset.labels))
        share = -(-batch_size // len(devices))
        self._batch_size = share * len(devices)

        def batch_metrics(variables, index, data, start):
            images, labels = data
            places = start + index * share + jnp.arange(share)
            mask = places < len(labels)
            chosen = jnp.minimum(places, len(labels) - 1)
            inputs = normalize(images[chosen], mean, std)
            logits = model.apply(variables, inputs, train=False)
            return EvaluationMetrics.gather_from_model_output(
                axis_name=AXIS, mask=mask, **_outcomes(logits, labels[chosen])
            )

        self._step = devices.pmap(batch_metrics)

    def __call__(self, variables: Mapping) -> dict[str, float]:
        """Mean `loss` (cross entropy), `accuracy` and `top5_accuracy` over all examples."""
        total = EvaluationMetrics.empty()
        for start in range(0, self._num_examples, self._batch_size):
            total = total.merge(self._step(variables, self._data, np.int32(start)))
        return {name: float(value) for name, value in total.compute().items()}


def _outcomes(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # A tie counts against the label that comes later, as argmax has it.
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & before), axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return {
        "loss": cross_entropy(logits, one_hot),
        "correct": ((rank < 1) & finite).astype(jnp.float32),
        "correct5": ((rank < 5) & finite).astype(jnp.float32),
    }
