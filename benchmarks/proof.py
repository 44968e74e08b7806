"""The verification of an exported file, for a process of its own: nothing of JAX is imported."""

import json
import pathlib

import numpy as np

from qflax.files import write_atomically
from qflax.verify import verify


def prove(
    file: pathlib.Path,
    result: pathlib.Path,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    trained: np.ndarray | None = None,
) -> None:
    """Verifies a file and adds to a row's result what was found, as `verification`.

    Args:
      file: packed.
      result: JSON file.
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
    fields = {**json.loads(result.read_text()), "verification": found}
    write_atomically(result, json.dumps(fields, indent=1) + "\n")
    verdict = "verified" if report.ok else f"NOT verified: {report.failures}"
    print(f"{result.stem}: {verdict}", flush=True)
