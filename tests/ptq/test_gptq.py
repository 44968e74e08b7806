"""GPTQ: against the paper's recursion written out, on every kind of grid, in the order of the network."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, Conv, Dense, Quantize
from qflax.ptq.gptq import gptq
from qflax.quantizers import (
    STATISTICS,
    AccumulatorAware,
    Minifloat,
    MixedPrecision,
    Quantization,
    Rule,
    Uniform,
    calibrate,
    freeze_widths,
    value_of,
)

RNG = np.random.default_rng(0)
# Neighbours in the image and channels depend on each other.
MIXED = RNG.normal(size=(6, 4)) @ RNG.normal(size=(4, 6)) + 0.3 * np.eye(6)
NOISE = RNG.normal(size=(3, 8, 7, 8, 6)) @ MIXED
IMAGES = [np.float32(x + np.roll(x, 1, 1) + np.roll(x, 1, 2)) for x in NOISE]
LINES = [x.reshape(-1, 8, 6) for x in IMAGES]
VECTORS = [x.reshape(-1, 24) for x in IMAGES]
THREE_BITS = Uniform(bits=3, scale="static", granularity="per_channel")


def normal(key, shape, dtype=jnp.float32):
    """Initial kernel without JAX's random numbers, which take longest to compile."""
    del key
    return jnp.asarray(np.random.default_rng(1).normal(size=shape) / np.sqrt(np.prod(shape[:-1])), dtype)


class Plain(nn.Module):
    """One layer behind inputs that may be quantized, called `calls` times, each time with them shifted by a
    channel.
    """

    layer: nn.Module
    quantization: Quantization = Quantization()
    calls: int = 1

    @nn.compact
    def __call__(self, x, *, train):
        del train
        x = Quantize(name="input", quantization=self.quantization)(x)
        shifted = [jnp.roll(value_of(x), i, -1) for i in range(self.calls)]
        return sum(value_of(self.layer(x.moved(y) if hasattr(x, "moved") else y)) for y in shifted)


class Net(nn.Module):
    """Two layers, in another order than that of their names."""

    quantization: Quantization

    @nn.compact
    def __call__(self, x, *, train):
        del train
        x = Quantize(name="input", quantization=self.quantization)(x)
        options = {"kernel_init": normal, "quantization": self.quantization}
        x = Conv(6, (3, 3), strides=2, name="second", **options)(x)
        x = Activation(name="act", quantization=self.quantization)(x)
        return Dense(5, name="first", **options)(value_of(x).reshape(len(x.value), -1))


CONVS = {
    "strides": {"kernel_size": (3, 2), "strides": 2, "padding": ((1, 0), (2, 1))},
    "groups": {"kernel_size": (3, 3), "padding": "VALID", "feature_group_count": 2},
    "depthwise": {"kernel_size": (3, 2), "strides": 2, "feature_group_count": 6},
    "uneven": {"kernel_size": (3, 2), "strides": (2, 1), "kernel_dilation": (1, 2), "padding": 1},
    "circular": {"kernel_size": (2, 3), "strides": (2, 3), "padding": "CIRCULAR"},
    "lines": {"kernel_size": 3, "kernel_dilation": 2, "padding": "CAUSAL"},
}
KINDS = (*CONVS, "dense")


def policy(weights=THREE_BITS, rules=()):
    eight = {"kind": "uniform", "bits": 8, "scale": "static", "statistic": "absmax"}
    return Quantization(
        weights, Uniform(bits=6, scale="static"), rules=(Rule("input", {"activations": eight}), *rules)
    )


def network(kind, weights=THREE_BITS, **fields):
    """A network of one layer and batches of its inputs."""
    quantization = policy(weights)
    options = {"kernel_init": normal, "quantization": quantization}
    if kind == "dense":
        layer, batches = Dense(64, **options), VECTORS
    else:
        layer, batches = Conv(12, **CONVS[kind], **options), LINES if kind == "lines" else IMAGES
    return Plain(layer, quantization, **fields), batches


def start(model, batches):
    variables = jax.jit(lambda: model.init(jax.random.key(0), batches[0], train=False))()
    return calibrate(model, variables, batches, train=False)


@functools.cache
def started(kind, weights=THREE_BITS):
    """A network of one layer, batches of its inputs and its variables."""
    model, batches = network(kind, weights)
    return model, batches, start(model, batches)


@functools.cache
def changed_case(kind):
    """The same with the variables that come back."""
    model, batches, variables = started(kind)
    return model, batches, variables, gptq(model, variables, batches)


def kernel_of(variables, layer="layer"):
    return np.asarray(variables["params"][layer]["kernel"])


def with_kernel(variables, kernel, layer="layer"):
    own = {**variables["params"][layer], "kernel": jnp.asarray(kernel)}
    return {**variables, "params": {**variables["params"], layer: own}}


def seen(model, variables, batches, *path):
    """What the module at `path` returns, for each batch."""

    @jax.jit
    def returned(variables, batch):
        options = {
            "capture_intermediates": lambda module, _: module.path == path,
            "mutable": ["intermediates"],
        }
        state = model.apply(variables, batch, train=False, **options)[1]["intermediates"]
        return functools.reduce(lambda tree, name: tree[name], path, state)["__call__"][0]

    return [returned(variables, batch) for batch in batches]


def weights_grid(model, variables, batches):
    """What the layer's quantizer makes of its kernel."""
    return seen(model, variables, batches[:1], "layer", "weights")[0]


def inputs_of(model, variables, batches):
    """Quantized inputs of the layer, float64."""
    return np.concatenate([np.float64(x.value) for x in seen(model, variables, batches, "input")])


def explicit_patches(layer, x):
    """[batch, pixels, *window, in], without a window of a dense layer."""
    if isinstance(layer, Dense):
        return x[:, None, :]
    window, mode = np.atleast_1d(layer.kernel_size), "constant"
    strides, dilation = (
        np.broadcast_to(each, len(window)) for each in (layer.strides, layer.kernel_dilation)
    )
    reach, padding = (window - 1) * dilation + 1, layer.padding
    if isinstance(padding, int):
        padding = [(padding, padding)] * len(window)
    elif padding == "CIRCULAR":
        padding, mode = [((n - 1) // 2, n // 2) for n in reach], "wrap"
    elif padding == "CAUSAL":
        padding = [(reach[0] - 1, 0)]
    elif isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    x = np.pad(x, ((0, 0), *padding, (0, 0)), mode)
    starts = itertools.product(
        *(range(0, size - n + 1, s) for size, n, s in zip(x.shape[1:-1], reach, strides, strict=True))
    )
    places = [
        tuple(slice(i, i + n, d) for i, n, d in zip(start, reach, dilation, strict=True)) for start in starts
    ]
    return np.stack([x[:, *place] for place in places], axis=1)


def recursion(inputs, weights, scale, highest, damping):
    """Frantar et al. 2022, eq. 2 and 3, the inverse Hessian by Gaussian elimination; returns codes."""
    hessian = inputs.T @ inputs
    sizes = np.diag(hessian)
    inverse = np.linalg.inv(hessian + damping * sizes.mean() * np.eye(len(hessian)))
    weights, codes = weights.copy(), np.zeros(weights.shape, int)
    for i in np.argsort(-sizes, kind="stable"):
        codes[i] = np.clip(np.round(weights[i] / scale), -highest, highest)
        error = (weights[i] - codes[i] * scale) / inverse[i, i]
        weights -= np.outer(inverse[:, i], error)
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_recursion_written_out(kind):
    model, batches, variables, changed = changed_case(kind)
    layer, grid = model.layer, weights_grid(model, variables, batches)
    old, new = (np.float64(kernel_of(v)) for v in (variables, changed))
    patches = explicit_patches(layer, inputs_of(model, variables, batches))
    groups = patches.shape[-1] // old.shape[-2]
    inputs = [part.reshape(*part.shape[:2], -1) for part in np.split(patches, groups, -1)]
    codes, outputs = [], []
    for x, before, after, scale in zip(
        inputs, *(np.split(array, groups, -1) for array in (old, new, grid.scale)), strict=True
    ):
        outputs.append(x @ after.reshape(x.shape[-1], -1))
        x, before = x.reshape(-1, x.shape[-1]), before.reshape(x.shape[-1], -1)
        codes.append(recursion(x, before, scale, highest=3, damping=0.01))
    np.testing.assert_array_equal(
        np.round(new / grid.scale).reshape(codes[0].shape[0], -1), np.concatenate(codes, -1)
    )
    assert not np.array_equal(new, grid.value)
    # The explicit patches are what the layer multiplies its kernel by.
    own = np.concatenate(seen(model, changed, batches, "layer"))
    np.testing.assert_allclose(own, np.concatenate(outputs, -1).reshape(own.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "depthwise"])
def test_outputs_are_nearer_to_those_of_the_float_kernel_than_by_rounding_to_nearest(kind):
    model, batches, variables, changed = changed_case(kind)
    floats = network(kind, weights=None)[0]

    def outputs(model, variables):
        return np.concatenate(seen(model, variables, batches, "layer"))

    goal, nearest, better = outputs(floats, variables), outputs(model, variables), outputs(model, changed)
    assert np.mean((better - goal) ** 2) < 0.7 * np.mean((nearest - goal) ** 2)


def test_of_inputs_that_have_nothing_in_common_it_is_rounding_to_nearest():
    batches = [np.diag(np.arange(1, 25, dtype=np.float32))] * 2
    model = network("dense")[0]
    variables = start(model, batches)
    nearest = weights_grid(model, variables, batches).value
    np.testing.assert_array_equal(kernel_of(gptq(model, variables, batches)), nearest)


GRIDS = {
    "lsq": Uniform(bits=4, scale="lsq"),
    "log2": Uniform(bits=4, scale="log2", power_of_two=True, granularity="per_channel"),
    "statistic": Uniform(bits=3, scale="statistic", granularity="per_channel"),
    "bipolar": Uniform(bits=1, scale="static", granularity="per_channel"),
    "minifloat": Minifloat(exponent_bits=2, mantissa_bits=1, scale="static", granularity="per_channel"),
    "minifloat statistic": Minifloat(exponent_bits=3, mantissa_bits=2, scale="statistic"),
    "minifloat constant": Minifloat(exponent_bits=4, mantissa_bits=1),
    "frozen widths": MixedPrecision(bits=3, granularity="per_channel"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_quantizer_maps_the_kernel_onto_itself(name):
    model, batches, variables = started("dense", GRIDS[name])
    if name == "frozen widths":
        variables = {**variables, STATISTICS: freeze_widths(variables[STATISTICS])}
    before = weights_grid(model, variables, batches)
    changed = gptq(model, variables, batches)
    after = weights_grid(model, changed, batches)
    np.testing.assert_array_equal(after.value, kernel_of(changed))
    assert not np.array_equal(after.value, before.value)
    np.testing.assert_allclose(after.scale, before.scale, rtol=1e-6 if "statistic" in name else 0)
    assert jax.tree.all(jax.tree.map(np.array_equal, {**changed, "params": 0}, {**variables, "params": 0}))


def test_the_end_of_a_range_that_is_still_learned_keeps_its_code():
    model, batches, variables = started("dense", MixedPrecision(bits=4, granularity="per_channel"))
    changed = gptq(model, variables, batches)
    after, kernel = weights_grid(model, changed, batches), kernel_of(changed)
    codes = np.round(kernel / after.scale)
    np.testing.assert_array_equal(codes, after.format.encode(after.value, after.scale))
    np.testing.assert_array_equal(codes * np.asarray(after.scale), after.value)
    np.testing.assert_allclose(kernel, after.value, rtol=2e-7)
    assert not np.array_equal(kernel, after.value)


def test_a_layer_that_is_called_twice_is_judged_by_both_calls():
    model, batches = network("dense", calls=2)
    variables = start(model, batches)
    x = inputs_of(model, variables, batches)
    scale = np.asarray(weights_grid(model, variables, batches).scale)
    inputs = np.concatenate([x, np.roll(x, 1, -1)])
    codes = recursion(inputs, kernel_of(variables).astype(np.float64), scale, highest=3, damping=0.01)
    np.testing.assert_array_equal(np.round(kernel_of(gptq(model, variables, batches)) / scale), codes)


def test_a_layer_gets_its_inputs_behind_the_changed_one_before_it_which_stays_if_it_is_float():
    rules = (Rule("second", {"weights": None}),)
    model, alone = Net(policy()), Net(policy(rules=rules))
    variables = start(model, IMAGES)
    changed = gptq(model, variables, IMAGES)
    # A float layer with the changed kernel gives the same inputs, one with the old kernel does not.
    between = with_kernel(variables, kernel_of(changed, "second"), "second")
    behind_changed, behind_old = (gptq(alone, v, IMAGES) for v in (between, variables))
    np.testing.assert_array_equal(kernel_of(changed, "first"), kernel_of(behind_changed, "first"))
    assert not np.array_equal(kernel_of(changed, "first"), kernel_of(behind_old, "first"))
    np.testing.assert_array_equal(kernel_of(behind_old, "second"), kernel_of(variables, "second"))


def test_accumulator_aware_layers_are_left_alone():
    aware = {"kind": "accumulator_aware", "bits": 4, "accumulator_bits": 16}
    model = Net(policy(rules=(Rule("second", {"weights": aware}),)))
    variables = start(model, IMAGES)
    told = []
    changed = gptq(model, variables, IMAGES, progress=told.append)
    assert told == ["gptq leaves alone second"]
    np.testing.assert_array_equal(kernel_of(changed, "second"), kernel_of(variables, "second"))
    assert not np.array_equal(kernel_of(changed, "first"), kernel_of(variables, "first"))


def test_inputs_are_those_behind_the_layer_s_own_quantizer():
    coarse = Quantization(THREE_BITS, Uniform(bits=4, signed=True, scale="static"))
    model = Plain(Dense(64, kernel_init=normal, quantize_input=True, quantization=coarse))
    variables = start(model, VECTORS)
    x = np.concatenate([np.float64(x.value) for x in seen(model, variables, VECTORS, "layer", "input")])
    scale = np.asarray(weights_grid(model, variables, VECTORS).scale)
    codes = recursion(x, kernel_of(variables).astype(np.float64), scale, highest=3, damping=0.01)
    np.testing.assert_array_equal(np.round(kernel_of(gptq(model, variables, VECTORS)) / scale), codes)


def test_weights_of_dead_inputs_are_zero():
    alive = np.arange(24) % 5 > 0
    batches = [batch * alive.astype(np.float32) for batch in VECTORS]
    model = network("dense")[0]
    kernel = kernel_of(gptq(model, start(model, batches), batches, damping=0.0))
    assert not np.any(kernel[~alive])
    assert np.any(kernel[alive], axis=0).all()


@pytest.mark.parametrize(
    "weights, damping, batches, message",
    [
        (None, 0.01, VECTORS, "no convolution or dense layer .* has weights of kind"),
        (AccumulatorAware(bits=4, accumulator_bits=16), 0.01, VECTORS, "no convolution or dense"),
        (
            Uniform(bits=3, scale="statistic", statistic="mean"),
            0.01,
            VECTORS,
            "layer: .*'statistic' with absmax",
        ),
        (Uniform(bits=2, scale="dorefa"), 0.01, VECTORS, "layer: .*use scale='static'"),
        (MixedPrecision(bits=4, max_range=0.3, min_step=0.085), 0.01, VECTORS, "layer: .*freeze its width"),
        (THREE_BITS, 0.0, [VECTORS[0][:4]], "layer: .*use a larger damping"),
        (THREE_BITS, -0.1, VECTORS, "damping=-0.1: must not be negative"),
        (THREE_BITS, 0.01, [], "no batches"),
    ],
)
def test_bad_input_is_refused_in_one_line(weights, damping, batches, message):
    model, _, variables = started("dense", weights)
    with pytest.raises(UserError, match=message) as error:
        gptq(model, variables, batches, damping=damping)
    assert "\n" not in str(error.value)
