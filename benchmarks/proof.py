"""The verification of an exported file, for a process of its own: nothing of JAX is imported."""

import json
import pathlib

import numpy as np

from qflax.files import write_atomically
from qflax.verify import verify


def prove(
    file: pathlib.Path,
    answer: pathlib.Path,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    trained: np.ndarray | None = None,
) -> None:
    """Verifies a file and writes as JSON what was found.

    Args:
      file: packed.
      answer: JSON file to write.
      images, labels: see `verify`.
      trained: class that the trained network finds for each image.
    """
    report = verify(file, images, labels)
    integers = [layer for layer in report.layers if layer.holds is not None]
    found = {
        "ok": report.ok,
        "failures": report.failures,
        "probe": report.probe,
        "layers": len(report.layers),
        "integer_layers": len(integers),
        "accumulators_held": sum(layer.holds and layer.attained for layer in integers),
        "accumulator_bits": {layer.layer: layer.needed for layer in integers},
        "promised_bits": {layer.layer: layer.promised for layer in integers},
        "accuracy": report.accuracy,
        "images": report.examples,
        "same_class": int(np.sum(np.equal(report.classes, trained))) if report.examples else 0,
    }
    write_atomically(answer, json.dumps(found, indent=1) + "\n")
