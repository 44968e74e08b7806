"""Evaluation: every example counts exactly once, whatever the batch size and the number of devices."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from qflax.data import Dataset
from qflax.data.augment import normalize
from qflax.numerics import full_precision
from qflax.training.losses import cross_entropy
from qflax.training.parallel import AXIS, Devices

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset


@flax.struct.dataclass
class EvaluationMetrics(metrics.Collection):
    """Means over the examples that the mask keeps."""

    loss: metrics.Average.from_output("loss")
    accuracy: metrics.Average.from_output("correct")
    top5_accuracy: metrics.Average.from_output("correct5")


class Evaluator:
    """Evaluates variables of one model on one data set, which stays on the devices or is streamed to them."""

    def __init__(
        self,
        model: nn.Module,
        dataset: "Dataset | StreamedDataset",
        devices: Devices,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_workers: int = 0,
    ):
        """Puts a data set that is in memory on the devices.

        Args:
          model: computes in float32, whatever it was trained in.
          dataset: the examples.
          devices: they share every batch.
          batch_size: of all devices together, at most all examples; rounded up to what divides among them.
          mean, std: normalisation.
          num_workers: processes that read and decode images, where the set is not in memory.
        """
        batch_size = min(batch_size, max(dataset.num_examples, 1))
        batches = _ResidentBatches if isinstance(dataset, Dataset) else _StreamedBatches
        self._batches = batches(dataset, devices, -(-batch_size // len(devices)), num_workers)

        def batch_metrics(variables, index, data):
            images, labels, mask = self._batches.examples(index, data)
            logits = model.apply(variables, normalize(images, mean, std), train=False)
            return EvaluationMetrics.gather_from_model_output(
                axis_name=AXIS, mask=mask, **_outcomes(logits, labels)
            )

        self._step = devices.pmap(batch_metrics, data_axes=self._batches.axes)

    @full_precision()
    def __call__(self, variables: Mapping) -> dict[str, float]:
        """Mean `loss` (cross entropy), `accuracy` and `top5_accuracy` over all examples."""
        total = EvaluationMetrics.empty()
        for data in self._batches:
            total = total.merge(self._step(variables, data))
        return {name: float(value) for name, value in total.compute().items()}


class _ResidentBatches:
    """Batches of a data set that stays on the devices: one is told by the place of its first example."""

    axes = None

    def __init__(self, dataset: Dataset, devices: Devices, share: int, num_workers: int):
        del num_workers
        self._arrays = devices.replicate((dataset.images, dataset.labels))
        self._share, self._batch_size = share, share * len(devices)

    def __iter__(self):
        for start in range(0, len(self._arrays[1]), self._batch_size):
            yield *self._arrays, np.int32(start)

    def examples(self, index: jax.Array, data: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        images, labels, start = data
        places = start + index * self._share + jnp.arange(self._share)
        chosen = jnp.minimum(places, len(labels) - 1)
        return images[chosen], labels[chosen], places < len(labels)


class _StreamedBatches:
    """Batches of a data set that is read and decoded on the way; each device gets its share."""

    axes = 0

    def __init__(self, dataset: "StreamedDataset", devices: Devices, share: int, num_workers: int):
        self._dataset, self._devices, self._num_workers = dataset, devices, num_workers
        self._batch_size = share * len(devices)

    def __iter__(self):
        own = len(self._devices.local)
        batches = self._dataset.evaluation_batches(
            batch_size=self._batch_size,
            shard=(jax.process_index(), jax.process_count()),
            num_workers=self._num_workers,
        )
        with contextlib.closing(batches):
            for batch in batches:
                parts = jax.tree.map(lambda x: x.reshape(own, -1, *x.shape[1:]), tuple(batch))
                yield self._devices.split(parts)

    def examples(self, index: jax.Array, data: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        del index
        return data


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
