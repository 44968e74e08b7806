"""The verification of an exported file, for a process of its own."""

import json
import os
import pathlib

import numpy as np

from qflax.files import write_atomically
from qflax.verify import verify


def prove(
    file: pathlib.Path,
    result: pathlib.Path,
    workdir: pathlib.Path,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Verifies a file and adds to a row's result what was found, as `verification`.

    Args:
      file: packed.
      result: JSON file.
      workdir: of the run that was exported.
      images, labels: see `verify`.
    """
    report = verify(file, images, labels)
    integers = report.integer_layers
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
        "same_class": int(np.sum(report.classes == _trained_classes(workdir, images)))
        if report.examples
        else 0,
    }
    fields = {**json.loads(result.read_text()), "verification": found}
    write_atomically(result, json.dumps(fields, indent=1) + "\n")
    print(f"{result.stem}: {'; '.join((report.verdict, *report.failures))}", flush=True)


def _trained_classes(workdir: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The class that the trained network finds for each image.

    On the CPU, whatever it was trained on: accelerators do not round quotients correctly, so that a code
    next to a rounding boundary may be another one there.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qflax import runtime

    runtime.configure()
    import jax

    from qflax.training.workdir import load_workdir, serving

    serve, variables, _, _ = serving(workdir)
    serve, size = jax.jit(serve), load_workdir(workdir)[0].eval_batch_size
    parts = [images[i : i + size].astype(np.float32) for i in range(0, len(images), size)]
    return np.concatenate([np.asarray(serve(variables, part).argmax(-1)) for part in parts])
