"""A small network that is no ResNet, quantized in all the ways there are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.layers import Activation, Add, AveragePool, BatchNorm, Conv, Dense, MaxPool, Quantize
from qflax.quantizers import (
    AccumulatorAware,
    IntegerBias,
    Minifloat,
    MixedPrecision,
    Quantization,
    Rule,
    Uniform,
    calibrate,
    freeze_widths,
)

SHAPE = (12, 10, 3)

FOUR = Uniform(bits=4, scale="lsq")
EIGHT = dict(kind="uniform", bits=8, signed=True, scale="static")
INPUT = Rule("input", {"activations": EIGHT})
ASYMMETRIC = dict(kind="uniform", bits=5, scale="static", symmetric=False, statistic="absmax")

POLICIES = {
    "float": Quantization(),
    "int4": Quantization(weights=FOUR, activations=FOUR, rules=(INPUT,)),
    "per channel": Quantization(
        weights=Uniform(bits=3, scale="lsq", granularity="per_channel"),
        activations=FOUR,
        biases=IntegerBias(bits=16),
        rules=(INPUT, Rule("pool/output", {"activations": {"kind": "truncation", "bits": 6}})),
    ),
    "zero points": Quantization(
        weights=FOUR,
        activations=FOUR,
        rules=(Rule("input", {"activations": ASYMMETRIC}), Rule("add", {"activations": ASYMMETRIC})),
    ),
    "mixed": Quantization(weights=MixedPrecision(bits=3), activations=MixedPrecision(bits=5), rules=(INPUT,)),
    "a2q+": Quantization(
        weights=AccumulatorAware(bits=4, accumulator_bits=12, variant="a2q+"),
        activations=Uniform(bits=3, scale="lsq"),
        rules=(INPUT, Rule("depthwise", {"weights": {"variant": "a2q"}})),
    ),
    "binary": Quantization(
        weights=Uniform(bits=1, scale="statistic"), activations=Uniform(bits=2, scale="range"), rules=(INPUT,)
    ),
    "e4m3": Quantization(
        weights=Minifloat(exponent_bits=4, mantissa_bits=3, specials="nan", scale="statistic"),
        activations=Minifloat(exponent_bits=4, mantissa_bits=3, specials="nan"),
    ),
    "e3m1": Quantization(
        weights=Minifloat(exponent_bits=3, mantissa_bits=1, scale="statistic", power_of_two=True),
        activations=Minifloat(exponent_bits=3, mantissa_bits=1, scale="static", power_of_two=True),
        outputs=Minifloat(exponent_bits=3, mantissa_bits=1, scale="static", power_of_two=True),
        rules=(Rule("input", {"activations": {}}), Rule("pool/output", {"activations": {}})),
    ),
}
LAYERS = ("stem", "depthwise", "pointwise", "hidden", "classifier")
INTEGER = tuple(name for name in POLICIES if name not in ("float", "e4m3", "e3m1"))


class Network(nn.Module):
    """Depthwise and pointwise convolutions, a residual, both pools, a classifier with two layers."""

    quantization: Quantization
    running: bool = True

    @nn.compact
    def __call__(self, x):
        policy = {"quantization": self.quantization}
        norm = lambda name: BatchNorm(use_running_average=self.running, momentum=0.0, name=name)  # noqa: E731
        x = Quantize(name="input", **policy)(x)
        x = norm("norm1")(value(Conv(8, (3, 3), use_bias=False, name="stem", **policy)(x)))
        x = MaxPool((3, 3), 2, ((1, 1), (0, 1)), name="max_pool")(Activation(name="act1", **policy)(x))
        y = Conv(8, (3, 3), feature_group_count=8, padding=((0, 2), (1, 1)), name="depthwise", **policy)(x)
        y = norm("norm2")(value(y))
        x = Activation(name="act2", **policy)(Add(name="add", **policy)(y, x))
        x = Conv(16, (1, 1), strides=2, name="pointwise", **policy)(x)
        x = AveragePool(name="pool", **policy)(Activation(name="act3", **policy)(value(x)))
        x = Activation(name="act4", **policy)(value(Dense(7, name="hidden", **policy)(x)))
        return value(Dense(4, name="classifier", **policy)(x))


def value(x):
    return getattr(x, "value", x)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.float32)


def make(policy):
    """A function of (variables, images of 0 to 255), and variables: calibrated, widths frozen."""
    model = Network(policy)
    function = jax.tree_util.Partial(lambda variables, x: model.apply(variables, x / 128 - 1))
    x = images(64) / 128 - 1
    variables = model.init(jax.random.key(1), x)
    rng = np.random.default_rng(2)
    noise = lambda path, leaf: leaf + rng.normal(size=leaf.shape, scale=0.1) * (path[-1].key == "bias")  # noqa: E731
    params = jax.tree_util.tree_map_with_path(lambda *leaf: jnp.float32(noise(*leaf)), variables["params"])
    floats = {"params": params, "batch_stats": variables["batch_stats"]}
    stats = Network(Quantization(), running=False).apply(floats, x, mutable=["batch_stats"])[1]
    variables = {**variables, **stats, "params": params}
    if policy != Quantization():
        variables = calibrate(model, variables, [x])
    if "quantizer_stats" in variables:
        variables = {**variables, "quantizer_stats": freeze_widths(variables["quantizer_stats"])}
    return function, jax.device_get(variables)
