"""The images that quantizers are calibrated on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import ml_collections
import numpy as np

from qflax.data import Dataset
from qflax.data.augment import normalize
from qflax.errors import require

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset


class CalibrationBatches:
    """Normalised training images, the first of the first epoch, in whole batches, as often as asked for.

    They are read once, and then held as bytes.
    """

    def __init__(self, config: ml_collections.ConfigDict, dataset: "Dataset | StreamedDataset"):
        """Takes the first `config.calibration_examples` images."""
        count = min(config.calibration_examples, dataset.num_examples)
        size = min(config.calibration_batch_size, count)
        self._config, self._dataset = config, dataset
        self._fields = {"seed": config.seed, "batch_size": size, "num_batches": count // size}
        self._images = None

    def __len__(self) -> int:
        return self._fields["num_batches"]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields float32 [batch, height, width, channels]."""
        if self._images is None:
            batches = self._dataset.calibration_batches(**self._fields)
            self._images = [batch.images for batch in batches]
        for images in self._images:
            yield np.asarray(normalize(images, self._config.mean, self._config.std))

    def others(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(images, labels) of the next `count` training images in whole batches, or fewer.

        Raises:
          UserError: there are none.
        """
        size = self._fields["batch_size"]
        most = self._dataset.num_examples // size
        fields = {**self._fields, "num_batches": min(len(self) + max(count // size, 1), most)}
        batches = list(self._dataset.calibration_batches(**fields))[len(self) :]
        require(
            bool(batches),
            f"config.calibration_examples={self._config.calibration_examples}: leaves none of the "
            f"{self._dataset.num_examples} training images to judge by; lower it",
        )
        images = [np.asarray(normalize(b.images, self._config.mean, self._config.std)) for b in batches]
        return [(image, batch.labels) for image, batch in zip(images, batches, strict=True)]
