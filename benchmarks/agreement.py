"""Whether what is served is what was trained: logits and codes of every test image, executor by executor.

python -m benchmarks.agreement runs/int4 runs/mixed --output=agreement.json [--images=10000]

The trained network (fake quantization) is compared with the integer runner on the packed file, the same with
accumulators that wrap at the width the weights were made for (or at --wrap) and with integer rescaling,
onnxruntime on QCDQ, and qonnx's executor on QONNX. Codes are those of all activations, of the first --codes
images.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
import warnings

import numpy as np

from qflax import runtime

BATCH = 100


def trained_codes(workdir: pathlib.Path, images: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Codes less zero points (or minifloats) of every quantizer of activations, by its path, call by call."""
    import jax

    from qflax.data.augment import normalize
    from qflax.quantizers import QuantizedArray
    from qflax.training import build
    from qflax.training.workdir import load_workdir

    config, state = load_workdir(workdir)
    model = build.model(config)
    wanted = ("activations", "outputs")

    def run(variables, images):
        x = normalize(images, tuple(config.mean), tuple(config.std))
        called = lambda module, method: module.name in wanted and method == "__call__"  # noqa: E731
        options = {"capture_intermediates": called, "mutable": ["intermediates"]}
        return model.apply(variables, x, train=False, **options)[1]

    tree = jax.jit(run)(state.served, images)["intermediates"]
    is_leaf = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
    found = collections.defaultdict(list)
    for path, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        found["/".join(p.key for p in path if hasattr(p, "key") and p.key != "__call__")].append(
            np.asarray(value.unscaled)
        )
    return found


def graph_codes(graph, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The same of a graph, executed: layers and codes, in order."""
    import jax

    from qflax.deploy.runner import execute

    values = jax.jit(lambda x: execute(graph, x)[0])(images)
    nodes = [node for node in graph.nodes if node.operation == "quantize"]
    return [(node.layer, np.asarray(values[node.output], np.float32)) for node in nodes]


def qonnx_codes(wrapper, images: np.ndarray) -> list[np.ndarray]:
    """What the quantizers of activations give in qonnx's executor, in order."""
    from qonnx.core.onnx_exec import execute_onnx

    context = execute_onnx(wrapper, {"input": nchw(images)}, return_full_exec_context=True)
    constants = {tensor.name for tensor in wrapper.graph.initializer}
    kinds = ("Quant", "FloatQuant", "BipolarQuant", "Trunc")
    outputs = [
        context[node.output[0]]
        for node in wrapper.graph.node
        if node.op_type in kinds and node.input[0] not in constants
    ]
    return [np.moveaxis(x, 1, -1) if x.ndim == 4 else x for x in outputs]


def nchw(images: np.ndarray) -> np.ndarray:
    """[batch, height, width, channels] as ONNX has it."""
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def executors(graph, folder: pathlib.Path, wrap: int | None) -> dict:
    """Name -> function of images to logits."""
    from qflax.deploy import packed
    from qflax.deploy.qcdq import to_qcdq
    from qflax.deploy.qonnx import to_qonnx
    from qflax.deploy.runner import IntegerRunner
    from qflax.errors import UserError

    packed.save(graph, folder / "packed")
    read = packed.load(folder / "packed")
    found = {"runner": IntegerRunner(read)}
    promised = any(constant.accumulator_bits for constant in graph.constants.values())
    if promised:
        found["runner, wrapping at the promised width"] = IntegerRunner(read, accumulators="wrap")
    if wrap:
        found[f"runner, wrapping at {wrap} bits"] = IntegerRunner(read, accumulators="wrap", bits=wrap)
    with contextlib.suppress(UserError):  # Minifloats.
        rescaled = IntegerRunner(read, rescaling="integer")
        found["runner, integer rescaling"] = lambda x: rescaled(x.astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnxruntime
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx

    with contextlib.suppress(UserError):  # Minifloats.
        session = onnxruntime.InferenceSession(to_qcdq(graph).SerializeToString())
        found["onnxruntime, QCDQ"] = lambda x: session.run(None, {"input": nchw(x)})[0]
    wrapper = ModelWrapper(to_qonnx(graph, batch=BATCH))
    found["qonnx"] = lambda x: execute_onnx(wrapper, {"input": nchw(x)})["output"]
    found["qonnx"].wrapper = wrapper
    return found


def measure(workdir: pathlib.Path, options: argparse.Namespace) -> dict:
    """Compares all executors on one run."""
    import jax

    from qflax.data import load
    from qflax.deploy.lowering import lower
    from qflax.training.workdir import serving

    function, variables, shape, about = serving(workdir)
    graph = lower(functools.partial(function, variables), shape)
    graph = dataclasses.replace(graph, metadata={"probe": {}})
    dataset = load(about["dataset"], "test", data_dir=None, validation_examples=0)
    images = dataset.images[: options.images].astype(np.float32)
    labels = dataset.labels[: options.images]
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    trained = jax.jit(function)
    expected = np.concatenate([np.asarray(trained(variables, batch)) for batch in batches])
    result = {
        "workdir": workdir.name,
        "images": len(images),
        "accuracy": float(np.mean(expected.argmax(1) == labels)),
        "executors": {},
    }
    few = images[: options.codes]
    codes = trained_codes(workdir, few)
    own = graph_codes(graph, few)
    with tempfile.TemporaryDirectory() as folder:
        for name, run in executors(graph, pathlib.Path(folder), options.wrap).items():
            began = time.monotonic()
            got = np.concatenate([np.asarray(run(batch)) for batch in batches])
            row = {
                "argmax_differs": int(np.sum(got.argmax(1) != expected.argmax(1))),
                "largest_logit_difference": float(np.max(np.abs(got - expected))),
                "accuracy": float(np.mean(got.argmax(1) == labels)),
                "seconds": time.monotonic() - began,
            }
            if name == "runner":
                row["codes_differ"] = count_differences(codes, own)
                row["codes"] = sum(codes.size for _, codes in own)
            if name == "qonnx":
                row["codes_differ"] = 0
                for start in range(0, len(few), BATCH):
                    part = few[start : start + BATCH]
                    pairs = zip(graph_codes(graph, part), qonnx_codes(run.wrapper, part), strict=True)
                    row["codes_differ"] += sum(int(np.sum(a != b)) for (_, a), b in pairs)
            result["executors"][name] = row
            print(f"{workdir.name:40}{name:45}{row}", flush=True)
    return result


def count_differences(trained: dict[str, list[np.ndarray]], graph: list[tuple[str, np.ndarray]]) -> int:
    """Elements that differ between the trained network's codes and a graph's.

    A layer that is called from within another one is known in the graph by that one's path, so that names say
    only the layer's own: of the trained calls that have it and the shape, the nearest is the same.
    """
    calls = [(path.split("/")[-2:], codes) for path, found in trained.items() for codes in found]
    if len(calls) != len(graph):
        raise SystemExit(f"{len(graph)} quantizers in the graph, {len(calls)} in the network")
    differences = 0
    for layer, codes in graph:
        alike = [
            i for i, (own, x) in enumerate(calls) if own == layer.split("/")[-2:] and x.shape == codes.shape
        ]
        distances = {i: int(np.sum(calls[i][1] != codes)) for i in alike}
        nearest = min(distances, key=distances.get)
        differences += distances[nearest]
        del calls[nearest]
    return differences


def main() -> None:
    """Measures, prints, and saves after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--codes", type=int, default=1000, help="images whose codes are compared")
    parser.add_argument("--wrap", type=int, help="also wrap all accumulators at this width")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    options = parser.parse_args()
    runtime.configure()
    results = []
    for workdir in options.workdirs:
        results.append(measure(workdir, options))
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
