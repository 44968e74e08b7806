"""What a trained network says of the test images."""

import dataclasses

import jax
import numpy as np

from qflax.data import Dataset, load
from qflax.report.runs import Run
from qflax.training import build
from qflax.training.workdir import serving

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


def predict(run: Run, *, data_dir: str = "", most_mistakes: int = 18) -> Predictions | None:
    """Has a run's last checkpoint tell the test images; None for a data set that is too large for memory.

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
    if not isinstance(dataset, Dataset):
        return None
    serve, variables, _, _ = serving(run.folder)
    forward, size = jax.jit(serve), min(config.eval_batch_size, dataset.num_examples)
    logits = np.concatenate(
        [
            forward(variables, _filled(dataset.images[i : i + size], size).astype(np.float32))
            for i in range(0, dataset.num_examples, size)
        ]
    )[: dataset.num_examples]
    told, labels = logits.argmax(1).astype(np.int32), dataset.labels
    counts = np.zeros((dataset.num_classes,) * 2, np.int64)
    np.add.at(counts, (labels, told), 1)
    confidence = np.asarray(jax.nn.softmax(logits)).max(1)
    wrong = np.flatnonzero(told != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:most_mistakes]
    return Predictions(
        classes=_CLASSES.get(config.dataset, tuple(map(str, range(dataset.num_classes)))),
        confusion=counts,
        images=dataset.images[wrong],
        labels=labels[wrong],
        told=told[wrong],
        confidence=confidence[wrong],
    )


def _filled(images: np.ndarray, size: int) -> np.ndarray:
    """A batch of whole size, so that one program serves all."""
    return np.pad(images, ((0, size - len(images)), *[(0, 0)] * 3))
