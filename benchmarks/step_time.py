"""Seconds per training step of each quantizer against the float network, in one run.

python -m benchmarks.step_time --model=resnet20 --batch_size=128 --rounds=9 --output=step_time.json

The variants take turns, one step each a round, so that whatever else the machine does hits all of them;
the table gives the minimum and the median over the rounds and the ratio of medians to float.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import numpy as np

from configs import default
from qflax import runtime
from qflax.data import Dataset, data_format
from qflax.quantizers import calibrate
from qflax.training import build
from qflax.training.parallel import Devices
from qflax.training.provenance import provenance
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of

_LSQ = dict(scale="lsq", statistic="mse")
_UINT4 = dict(bits=4, **_LSQ)
_E4M3 = dict(kind="minifloat", exponent_bits=4, mantissa_bits=3, specials="nan")
_A2Q = dict(kind="accumulator_aware", bits=4, accumulator_bits=16)
# The stem's input is float.
_STEM = (dict(layers="conv_init", weights=dict(kind="uniform", bits=8)),)
_HEAD = (dict(layers="classifier", weights=dict(kind="uniform", bits=8)),)
VARIANTS = {
    "float": (None, None),
    "int8 lsq": (dict(bits=8, granularity="per_channel", **_LSQ), dict(bits=8, **_LSQ)),
    "int4 lsq": (dict(bits=4, granularity="per_channel", **_LSQ), _UINT4),
    "int4 statistic, learned range": (
        dict(bits=4, scale="statistic", granularity="per_channel"),
        dict(bits=4, scale="range"),
    ),
    "int4 ewgs": (
        dict(bits=4, granularity="per_channel", surrogate="ewgs", **_LSQ),
        dict(bits=4, surrogate="ewgs", **_LSQ),
    ),
    "int4 asymmetric activations": (
        dict(bits=4, granularity="per_channel", **_LSQ),
        dict(bits=4, scale="lsq", symmetric=False),
    ),
    "learned widths": (dict(kind="mixed_precision", bits=4), dict(kind="mixed_precision", bits=6)),
    "learned widths per channel": (
        dict(kind="mixed_precision", bits=4, granularity="per_channel"),
        dict(kind="mixed_precision", bits=6, granularity="per_channel"),
    ),
    "a2q": (dict(variant="a2q", **_A2Q), _UINT4, *_STEM, *_HEAD),
    "a2q+": (_A2Q, _UINT4, *_STEM, *_HEAD),
    "e4m3": (_E4M3, _E4M3),
    "e4m3, learned ranges": (
        dict(scale="range", granularity="per_channel", **_E4M3),
        dict(scale="range", **_E4M3),
    ),
    "e3m1": (dict(kind="minifloat", exponent_bits=3, mantissa_bits=1),) * 2,
}


class Variant:
    """One compiled training step and its state."""

    def __init__(self, config, dataset, weights, activations, *rules):
        """Compiles the step; `first_seconds` is what that took, with the first step."""
        config.weights, config.activations, config.rules = weights, activations, rules
        devices = Devices(0, config.batch_size)
        network = build.model(config)
        variables = initial_variables(network, dataset.images.shape[1:], 0)
        batch = np.random.default_rng(0).normal(size=(64, *dataset.images.shape[1:]))
        variables = calibrate(network, variables, [batch.astype(np.float32)], train=True)
        on_cpu = devices.platform == "cpu"
        step = functools.partial(build.train_step(config, devices).many, unroll=on_cpu)
        self._dispatch = devices.pmap(step, donate=True)
        self._state = devices.replicate(build.state(config, variables))
        stream = stream_of(dataset, 0, config.batch_size, devices)
        self._rates = np.full(1 if on_cpu else stream.usual_steps, 0.01, np.float32)
        self._data = (data for _, data in stream.dispatches(0, 10**6, len(self._rates)))
        self._numbers = build.hyperparameters(config), build.penalties(config, 10**6)
        began = time.perf_counter()
        self.step()
        self.first_seconds = time.perf_counter() - began

    def step(self) -> float:
        """Seconds per step of one dispatch."""
        data = next(self._data)
        began = time.perf_counter()
        self._state, metrics = self._dispatch(self._state, data, self._rates, *self._numbers)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - began) / len(self._rates)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    runtime.configure(options.batch_size)
    config = default.get_config()
    config.update({name: getattr(options, name) for name in ("model", "batch_size", "dtype")})
    shape = data_format(config.dataset).image_shape
    rng, count = np.random.default_rng(0), 50 * options.batch_size
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    dataset = Dataset(images=images, labels=labels, num_classes=10, name="noise")
    built = {}
    for name in dict.fromkeys(["float", *options.variants]):
        built[name] = Variant(config.copy_and_resolve_references(), dataset, *VARIANTS[name])
    seconds = {name: [] for name in built}
    for _ in range(options.rounds):
        for name, variant in built.items():
            seconds[name].append(variant.step())
    origin = provenance(len(jax.devices()))
    print(f"{options.model}, batch {options.batch_size}, {options.dtype}, {origin['device']}")
    print(f"{'variant':32}{'min s':>10}{'median s':>10}{'to float':>10}{'compile s':>11}")
    rows = []
    for name, times in seconds.items():
        median, ratio = np.median(times), np.median(times) / np.median(seconds["float"])
        first = built[name].first_seconds
        print(f"{name:32}{min(times):10.4f}{median:10.4f}{ratio:10.3f}{first:11.1f}")
        rows.append({"variant": name, "seconds": times, "median_to_float": ratio, "first_seconds": first})
    if options.output:
        options.output.write_text(json.dumps({**vars(options), "output": None, **origin, "rows": rows}))


if __name__ == "__main__":
    main()
