"""The images that quantizers are calibrated on."""

import numpy as np

from qflax.data import load
from qflax.data.augment import normalize
from qflax.training.calibration import CalibrationBatches


def test_images_are_read_once_and_passed_over_as_often_as_asked_for(tiny_config, monkeypatch):
    digits, reads = load("digits", "train"), []
    read = type(digits).calibration_batches
    monkeypatch.setattr(type(digits), "calibration_batches", lambda *a, **k: reads.append(k) or read(*a, **k))
    tiny_config.calibration_examples, tiny_config.calibration_batch_size = 70, 32
    batches = CalibrationBatches(tiny_config, digits)
    first, again = list(batches), list(batches)
    assert len(batches) == len(first) == len(again) == 2 and len(reads) == 1
    stored = read(digits, seed=tiny_config.seed, batch_size=32, num_batches=2)
    for one, other, batch in zip(first, again, stored, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, normalize(batch.images, tiny_config.mean, tiny_config.std))
