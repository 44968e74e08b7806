"""Images per second of what is served: float and quantized, JAX and onnxruntime, in one run.

python -m benchmarks.serving --float=runs/fp32 --quantized=runs/int8 --output=serving.json [--rounds=9]

The float network in JAX and as float32 ONNX in onnxruntime; the quantized one as it was trained (fake
quantization), in the integer runner (also with all sums in int32, and with integer rescaling), and as QCDQ in
onnxruntime. All take turns; a figure is the median of the rounds. Ratios are to the float network in JAX.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
import unittest.mock

import numpy as np

from qflax import runtime

BATCHES = (1, 100)


def contenders(float_run: pathlib.Path, quantized_run: pathlib.Path) -> dict:
    """Name -> function of float32 images [batch, height, width, channels] of 0 to 255 to logits."""
    import jax
    import onnxruntime

    from qflax.deploy.lowering import lower
    from qflax.deploy.onnx_model import to_onnx_float
    from qflax.deploy.qcdq import to_qcdq
    from qflax.deploy.runner import IntegerRunner
    from qflax.training.workdir import serving

    def session(model):
        made = onnxruntime.InferenceSession(model.SerializeToString())
        return lambda x: made.run(None, {"input": np.ascontiguousarray(np.moveaxis(x, -1, 1))})[0]

    found = {}
    for kind, run in (("float", float_run), ("quantized", quantized_run)):
        function, variables, shape, _ = serving(run)
        graph = lower(functools.partial(function, variables), shape)
        trained = jax.jit(function)
        found[f"{kind}, JAX"] = functools.partial(trained, jax.device_put(variables))
        if kind == "float":
            found["float32 ONNX, onnxruntime"] = session(to_onnx_float(graph))
        else:
            found["integer runner, JAX"] = IntegerRunner(graph)
            found["integer runner, int32 sums"] = all_in_int32(IntegerRunner(graph))
            found["integer runner, integer rescaling"] = of_bytes(IntegerRunner(graph, rescaling="integer"))
            found["QCDQ, onnxruntime"] = session(to_qcdq(graph))
    return found


def all_in_int32(run):
    """A runner that adds all integers as int32, which is decided when it compiles."""
    from qflax.deploy import runner

    def patched(x):
        with unittest.mock.patch.object(runner, "EXACT_IN_FLOAT32", 0):
            return run(x)

    return patched


def of_bytes(run):
    """A runner that is given uint8."""
    return lambda x: run(x.astype(np.uint8))


def rates(runs: dict, batch: int, rounds: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Median images per second of each, taking turns."""
    x = np.random.default_rng(0).integers(0, 256, (batch, *shape)).astype(np.float32)
    seconds = {name: [] for name in runs}
    repeats = max(1, 100 // batch)
    for run in runs.values():
        np.asarray(run(x))  # Compiles.
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(repeats):
                np.asarray(run(x))
            seconds[name].append((time.perf_counter() - began) / repeats)
    return {name: batch / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--float", type=pathlib.Path, required=True, help="workdir of the float network")
    parser.add_argument("--quantized", type=pathlib.Path, required=True, help="workdir of the quantized one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    options = parser.parse_args()
    runtime.configure()
    runs, results = contenders(options.float, options.quantized), {}
    for batch in BATCHES:
        results[batch] = rates(runs, batch, options.rounds, (32, 32, 3))
        base = results[batch]["float, JAX"]
        for name, rate in results[batch].items():
            print(f"batch {batch:4}  {name:35}{rate:10.0f} images/s{rate / base:8.2f}", flush=True)
    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
