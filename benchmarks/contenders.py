"""qflax's own training steps, one for each kind of quantizer, for the benchmarks of speed."""

import functools
import time

import jax
import numpy as np

from benchmarks.peers.jax_training import device_memory
from benchmarks.peers.problem import Problem
from configs import default
from qflax import runtime
from qflax.data import Dataset
from qflax.quantizers import calibrate
from qflax.training import build
from qflax.training.parallel import Devices
from qflax.training.schedules import Rates
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of

_LSQ = dict(scale="lsq", statistic="mse")
_UINT4 = dict(bits=4, **_LSQ)
_E4M3 = dict(kind="minifloat", exponent_bits=4, mantissa_bits=3, specials="nan")
_A2Q = dict(kind="accumulator_aware", bits=4, accumulator_bits=16)
# The stem's input is float.
_STEM = (dict(layers="conv_init", weights=dict(kind="uniform", bits=8)),)
_HEAD = (dict(layers="classifier", weights=dict(kind="uniform", bits=8)),)
_VARIANTS = {
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


class Training:
    """The training of one variant, as `qflax.training.train` does it.

    Attributes:
      steps: that a call makes: several on an accelerator.
      compile_seconds: of tracing and compiling them.
      program: that was compiled.
      num_devices: that share a batch.
      loss: of the last step that was waited for.
    """

    def __init__(self, problem: Problem, weights, activations, *rules, num_devices: int = 0):
        """Prepares everything; `num_devices` is 0 for all."""
        runtime.configure(problem.batch_size, num_devices)
        config = default.get_config()
        config.update({name: getattr(problem, name) for name in ("model", "batch_size", "dtype")})
        config.weights, config.activations, config.rules = weights, activations, rules
        devices = Devices(num_devices, problem.batch_size)
        dataset = Dataset(images=problem.images, labels=problem.labels, num_classes=10, name="noise")
        network, shape = build.model(config), problem.images.shape[1:]
        variables = initial_variables(network, shape, 0)
        batch = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
        variables = calibrate(network, variables, [batch], train=True)
        stream, on_cpu = stream_of(dataset, 0, problem.batch_size, devices), devices.platform == "cpu"
        self.steps, self.num_devices = 1 if on_cpu else stream.usual_steps, len(devices)
        many = functools.partial(build.train_step(config, devices).many, steps=self.steps, unroll=on_cpu)
        self._state = devices.replicate(build.state(config, variables))
        self._rates = Rates(np.full(10**6, problem.learning_rate, np.float32), devices.replicate)
        self._dispatches, self._at = stream.dispatches(0, 10**6, self.steps), 0
        self._numbers = devices.replicate((build.hyperparameters(config), build.penalties(config, 10**6)))
        began = time.monotonic()
        arguments = stream.abstract(self.steps), self._rates.window(0, 1), *self._numbers
        self._dispatch = devices.pmap(many, donate=True).compile(self._state, *arguments)
        self.compile_seconds, self.program = time.monotonic() - began, self._dispatch.as_text()

    def __call__(self) -> None:
        """Makes `steps` steps, without waiting for them."""
        end, data = next(self._dispatches)
        rates = self._rates.window(self._at, end)
        self._state, self._metrics = self._dispatch(self._state, data, rates, *self._numbers)
        self._at = end

    def wait(self) -> None:
        """Waits for all steps."""
        jax.block_until_ready(self._state)
        self.loss = float(self._metrics["loss"][-1])

    def device_memory(self) -> int | None:
        """The most bytes that were in use on a device, where it has memory of its own."""
        return device_memory()


CONTENDERS = {
    f"qflax {name}": lambda problem, variant=variant, **options: Training(problem, *variant, **options)
    for name, variant in _VARIANTS.items()
}
