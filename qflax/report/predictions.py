"""What a trained network says of the test images."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from qflax.data import Batch, Dataset, load
from qflax.numerics import full_precision
from qflax.report.runs import Run
from qflax.training import build
from qflax.training.workdir import serving

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset

_CLASSES = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of all test images.

    Attributes:
      classes: their names.
      confusion: number of images, int64 [true class, told class].
      images: those that are told wrong, the most confident first, uint8 [mistakes, height, width, channels].
      labels, told: their classes, int32 [mistakes].
      confidence: softmax probability of the told class, float32 [mistakes].
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    told: np.ndarray
    confidence: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the images whose class is told."""
        return float(np.trace(self.confusion) / self.confusion.sum())


@full_precision()
def predict(run: Run, *, data_dir: str = "", most_mistakes: int = 18) -> Predictions:
    """Has a run's last checkpoint tell the test images.

    Args:
      run: a workdir.
      data_dir: instead of the one in its configuration.
      most_mistakes: how many images are kept.

    Raises:
      UserError: the test images or the checkpoint cannot be read.
    """
    config = run.config
    dataset = load(
        config.dataset,
        "test",
        data_dir=data_dir or config.data_dir or None,
        validation_examples=config.validation_examples,
        crop=build.crop(config),
    )
    serve, variables, _, _ = serving(run.folder)
    forward, counts = jax.jit(serve), np.zeros((dataset.num_classes,) * 2, np.int64)
    mistakes = []  # The most confident so far, each (confidence, image, label, told).
    with contextlib.closing(_batches(dataset, min(config.eval_batch_size, dataset.num_examples))) as batches:
        for images, labels, mask in batches:
            logits = np.asarray(forward(variables, images.astype(np.float32)))
            told, confidence = logits.argmax(1), np.asarray(jax.nn.softmax(logits)).max(1)
            np.add.at(counts, (labels[mask], told[mask]), 1)
            wrong = np.flatnonzero(mask & (told != labels))
            wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most_mistakes]
            mistakes += [(confidence[i], np.array(images[i]), labels[i], told[i]) for i in wrong]
            mistakes = sorted(mistakes, key=lambda mistake: -mistake[0])[:most_mistakes]
    confidences, images, labels, told = zip(*mistakes, strict=True) if mistakes else ((),) * 4
    return Predictions(
        classes=_CLASSES.get(config.dataset, tuple(map(str, range(dataset.num_classes)))),
        confusion=counts,
        images=np.array(images, np.uint8),
        labels=np.array(labels, np.int32),
        told=np.array(told, np.int32),
        confidence=np.array(confidences, np.float32),
    )


def _batches(dataset: "Dataset | StreamedDataset", size: int) -> Iterator[Batch]:
    """All examples once, in batches of whole size, so that one program serves all."""
    if not isinstance(dataset, Dataset):
        with contextlib.closing(dataset.evaluation_batches(batch_size=size)) as batches:
            yield from batches
        return
    for start in range(0, dataset.num_examples, size):
        images, labels = dataset.images[start : start + size], dataset.labels[start : start + size]
        missing = size - len(labels)
        yield Batch(
            images=np.pad(images, ((0, missing), *[(0, 0)] * 3)),
            labels=np.pad(labels, (0, missing)),
            mask=np.arange(size) < len(labels),
        )
