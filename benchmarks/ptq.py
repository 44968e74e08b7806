"""Test accuracy after every method of some recipes of post-training quantization.

python -m benchmarks.ptq --source=runs/fp32 --output=ptq.json [--iterations=500]

For each format of ResNet-20 on CIFAR-10: ranges alone; equalization, ranges, bias correction and learned
rounding; the default recipe. The test images are read after every method, so that its share is known: nothing
is chosen by them.
"""

import argparse
import importlib
import json
import pathlib
import time

from qflax import runtime

ROWS = {
    "INT8": ("resnet20_int8_cifar10", {}),
    "INT4 weights, INT8 activations": ("resnet20_int4_cifar10", {"activations.bits": 8}),
    "INT4": ("resnet20_int4_cifar10", {}),
    "e4m3": ("resnet20_e4m3_cifar10", {}),
}
RECIPES = (
    ("ranges",),
    ("equalization", "ranges", "bias_correction", "brecq"),
    ("ranges", "norm_reestimation", "brecq"),
)


def measure(row: str, recipe: tuple[str, ...], options: argparse.Namespace) -> list[dict]:
    """Applies a recipe; returns for each method its seconds and the test accuracy after it."""
    from qflax.ptq.recipe import apply_recipe
    from qflax.training import post_training
    from qflax.training.parallel import Devices
    from qflax.training.workdir import load_evaluator

    name, changes = ROWS[row]
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(changes)
    config.init_from, config.ptq.iterations = options.source, options.iterations
    run = post_training.Run(config)
    evaluate, results = load_evaluator(config, "test", Devices()), []

    def done(method, networks):
        seconds = time.monotonic() - began[0]
        accuracy = evaluate(networks.variables)["accuracy"] if "ranges" in reached(method) else None
        results.append({"method": method, "seconds": seconds, "test_accuracy": accuracy})
        began[0] = time.monotonic()

    def reached(method):
        return [*(result["method"] for result in results), method]

    networks = run.networks()
    began = [time.monotonic()]
    apply_recipe(networks, recipe, run.batches, post_training.settings(config), done=done)
    return results


def main() -> None:
    """Measures, prints, and saves after every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="workdir of the float ResNet-20")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    options = parser.parse_args()
    runtime.configure(1000)
    table = []
    for row in options.rows:
        for recipe in RECIPES:
            results = measure(row, recipe, options)
            table.append({"row": row, "iterations": options.iterations, "methods": results})
            text = "  ".join(
                f"{r['method']} {'' if r['test_accuracy'] is None else format(r['test_accuracy'], '.2%')}"
                f" ({r['seconds']:.0f} s)"
                for r in results
            )
            print(f"{row:32}{text}", flush=True)
            options.output.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
