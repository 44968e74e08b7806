"""Accumulator-aware weights in a layer: input format, messages, projection, change of the accumulator."""

import fnmatch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qflax.errors import UserError
from qflax.layers import Activation, Conv, Dense, cost_function, layer_costs
from qflax.linen import quantize
from qflax.quantizers import (
    CONSTRAINTS,
    PARAMETERS,
    STATISTICS,
    AccumulatorAware,
    Minifloat,
    MixedPrecision,
    Quantization,
    Uniform,
    calibrate,
    constrain,
    project_weights,
    quantizer_of,
    set_accumulator_bits,
    value_of,
)

X = np.random.default_rng(0).normal(size=(4, 6, 6, 8)).astype(np.float32)


def build(activations, **fields):
    """A model of an activation and a convolution."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            spec = AccumulatorAware(**{"bits": 4, "accumulator_bits": 12, **fields})
            quantization = Quantization(weights=spec, activations=activations)
            x = Activation(name="act", quantization=quantization)(x)
            return Conv(5, (3, 3), name="conv", quantization=quantization)(x)

    return Net()


def calibrated(activations, **fields):
    model = build(activations, **fields)
    return model, calibrate(model, model.init(jax.random.key(0), X), [X])


INTEGERS = {
    "uint4": Uniform(bits=4),
    "int8": Uniform(bits=8, signed=True),
    "asymmetric": Uniform(bits=4, symmetric=False),
    "learned": MixedPrecision(bits=6),
    "bipolar": Uniform(bits=1, signed=True),
}


@pytest.mark.parametrize("variant", ["a2q", "a2q+"])
@pytest.mark.parametrize("activations", INTEGERS)
def test_every_integer_input_keeps_within_the_accumulator(activations, variant):
    model, variables = calibrated(INTEGERS[activations], variant=variant)
    for bits in (16, 12, 9):
        variables = {**variables, STATISTICS: set_accumulator_bits(variables[STATISTICS], bits)}
        conv = layer_costs(model, variables, X[:1])[-1]
        assert conv.accumulation.exact_bits <= bits
        assert bits < 16 or conv.accumulation.exact_bits >= 8


@pytest.mark.parametrize("variant", ["a2q", "a2q+"])
def test_signed_codes_less_their_zero_point_reach_as_far_as_unsigned_ones(variant):
    activations = Uniform(bits=4, symmetric=False, signed=True, scale="static", statistic="absmax")
    model, x = build(activations, variant=variant, bits=8), np.abs(X)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    variables, _ = project_weights(model, variables, x)
    accumulation = layer_costs(model, variables, x[:1])[-1].accumulation
    assert (int(accumulation.x_min), int(accumulation.x_max)) == (0, 15)
    assert 11 <= accumulation.exact_bits <= 12 and accumulation.exact_bits <= accumulation.norm_bits


@pytest.mark.parametrize(
    "activations,problem",
    [
        (None, "it is float; quantize what comes before"),
        (
            Minifloat(exponent_bits=4, mantissa_bits=3),
            "it is a minifloat; give the activations before it kind='uniform'",
        ),
        (Uniform(bits=4, granularity="per_channel"), "it is scaled per channel; .* granularity='per_tensor'"),
    ],
)
def test_other_inputs_are_an_error_that_says_what_to_do(activations, problem):
    with pytest.raises(UserError, match=f"conv: accumulator_bits=12 needs .*{problem}"):
        build(activations).init(jax.random.key(0), X)


def test_not_for_activations():
    quantization = Quantization(activations=AccumulatorAware(bits=4, accumulator_bits=9))
    with pytest.raises(UserError, match="is for weights, not activations"):
        Activation(quantization=quantization).init(jax.random.key(0), X)


def test_changing_the_accumulator_compiles_nothing():
    model, variables = calibrated(Uniform(bits=4))
    traces, outputs = [], []

    @jax.jit
    def forward(variables, x):
        traces.append(1)
        return model.apply(variables, x)

    for bits in (16, 12, 11, 10, 9):
        variables = {**variables, STATISTICS: set_accumulator_bits(variables[STATISTICS], bits)}
        outputs.append(np.abs(forward(variables, X)).sum())
    assert len(traces) == 1
    assert len(set(outputs)) > 1


def test_specs_that_differ_in_the_accumulator_are_one_program():
    programs = set()
    for bits in (16, 12):
        model, variables = calibrated(Uniform(bits=4), accumulator_bits=bits)
        programs.add(jax.jit(model.apply).lower(variables, X).as_text())
    assert len(programs) == 1


def test_projection_lets_truncation_keep_the_kernel():
    model, variables = calibrated(Uniform(bits=4), accumulator_bits=10)
    projected, changed = project_weights(model, variables, X)
    radius = np.exp2(projected[PARAMETERS]["conv"]["weights"]["log2_norm"])
    before, after = (np.abs(v["params"]["conv"]["kernel"]).sum((0, 1, 2)) for v in (variables, projected))
    assert changed and np.all(before > 1.1 * radius) and np.all(after <= radius * (1 + 1e-5))
    np.testing.assert_array_equal(projected["params"]["conv"]["bias"], variables["params"]["conv"]["bias"])
    assert layer_costs(model, projected, X[:1])[-1].accumulation.exact_bits <= 10


def test_without_ep_init_nothing_is_projected():
    model, variables = calibrated(Uniform(bits=4), ep_init=False)
    assert project_weights(model, variables, X) == (variables, False)


class Attention(nn.Module):
    """A plain model with projections of several axes."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2)(x)


class Repeated(nn.Module):
    """A plain model of blocks with kernels of their own; `axis` is where these are stacked."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(nn.Dense(6)(x)), None

        axes = {"params": self.axis, True: 0}
        return nn.scan(Block, length=3, variable_axes=axes, split_rngs={"params": True})(name="blocks")(
            x, None
        )[0]


# Plain model, shape of its input, axes of each kernel that a sum of products goes over.
KERNELS = {
    "dense of several axes": (nn.DenseGeneral((2, 3)), (4, 12), {"kernel": 0}),
    "attention": (
        Attention(),
        (2, 5, 6),
        {**{f"*/{name}/kernel": 0 for name in ("query", "key", "value")}, "*/out/kernel": (0, 1)},
    ),
    "transposed kernel": (
        nn.ConvTranspose(6, (2, 2), transpose_kernel=True),
        (1, 4, 4, 6),
        {"kernel": (0, 1, 3)},
    ),
    "einsum": (nn.Einsum((5, 6, 3), "btd,hdk->bhtk"), (2, 4, 6), {"kernel": 1}),
    "scan": (Repeated(), (4, 6), {"*/kernel": 1}),
    "scan, stacked behind": (Repeated(axis=1), (4, 6), {"*/kernel": 0}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_projected_output_by_output(name):
    plain, shape, summed = KERNELS[name]
    spec = AccumulatorAware(bits=4, accumulator_bits=8)
    model = quantize(plain, weights=spec, activations=Uniform(bits=4, signed=True))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    projected, changed = project_weights(model, variables, x)
    assert changed and jax.tree.map(jnp.shape, projected) == jax.tree.map(jnp.shape, variables)
    norms = flatten_dict(projected[PARAMETERS], sep="/")
    kernels, found = flatten_dict(projected["params"], sep="/"), 0
    for pattern, axes in summed.items():
        for path in fnmatch.filter(kernels, pattern):
            before = jnp.sum(jnp.abs(flatten_dict(variables["params"], sep="/")[path]), axes)
            after = jnp.sum(jnp.abs(kernels[path]), axes)
            radius = np.exp2(norms[path.replace("kernel", "weights/log2_norm")]).reshape(after.shape)
            np.testing.assert_allclose(after, np.minimum(before, radius), rtol=1e-4)
            assert np.any(before > 1.1 * radius)
            found += 1
    assert found == len(summed)
    for cost in layer_costs(model, projected, x):
        assert cost.accumulation is None or cost.accumulation.exact_bits <= 8


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(bits=1, accumulator_bits=16), "bits=1: accumulator-aware weights have 2 to 16 bits"),
        (dict(bits=4, accumulator_bits=33), "accumulator_bits=33: an accumulator has 2 to 32 bits"),
        (dict(bits=4, accumulator_bits=16, variant="a2q++"), "variant='a2q\\+\\+': unknown"),
        (dict(bits=4, accumulator_bits=16, tied=1), "tied=1: must be True or False"),
    ],
)
def test_impossible_specs(fields, message):
    with pytest.raises(UserError, match=message):
        AccumulatorAware(**fields)


@pytest.mark.parametrize("variant", ["a2q", "a2q+"])
def test_a_layer_that_starts_from_zeros_learns_within_its_accumulator(variant):
    policy = Quantization(
        weights=AccumulatorAware(bits=4, accumulator_bits=12, variant=variant), activations=Uniform(bits=4)
    )
    layer = Dense(
        3,
        quantization=policy,
        quantize_input=True,
        signed_input=False,
        kernel_init=nn.initializers.zeros_init(),
    )
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(64, 12))).astype(np.float32)
    goal = jax.nn.one_hot(np.argmax((x - x.mean(0)) @ rng.normal(size=(12, 3)), -1), 3)
    variables = calibrate(layer, layer.init(jax.random.key(0), x), [x])
    costs = cost_function(layer, x[:1])

    @jax.jit
    def step(variables):
        def loss(trained):
            logits, state = layer.apply({**variables, **trained}, x, mutable=[CONSTRAINTS])
            return -jnp.mean(jnp.sum(goal * jax.nn.log_softmax(logits), -1)), state

        trained = {name: variables[name] for name in ("params", PARAMETERS)}
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        trained = jax.tree.map(lambda x, g: x - 0.1 * g, trained, gradients)
        return value, {**variables, **trained, PARAMETERS: constrain(trained[PARAMETERS], state)}

    losses = []
    for _ in range(40):
        value, variables = step(variables)
        losses.append(value)
        assert costs(variables)[-1].accumulation.exact_bits <= 12
    assert losses[-1] < 0.9 * losses[0]


def test_a_dead_channel_stays_zero_and_lives_on():
    model, variables = calibrated(Uniform(bits=4))
    kernel = variables["params"]["conv"]["kernel"].at[..., 2].set(0.0)
    variables = {**variables, "params": {"conv": {**variables["params"]["conv"], "kernel": kernel}}}
    variables = calibrate(model, variables, [X])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    variables, _ = project_weights(model, variables, X)
    assert not variables["params"]["conv"]["kernel"][..., 2].any()
    assert not value_of(model.apply(variables, X))[..., 2].any()
    gradient = jax.grad(lambda p: jnp.sum(value_of(model.apply({**variables, "params": p}, X))))(
        variables["params"]
    )["conv"]["kernel"]
    assert np.isfinite(gradient).all() and gradient[..., 2].any() and gradient[..., 0].any()


def test_centring_a_single_weight_is_an_error():
    x = np.zeros((1, 4, 4, 6), np.float32)
    for variant in ("a2q", "a2q+"):
        spec = AccumulatorAware(bits=4, accumulator_bits=12, variant=variant)
        quantization = Quantization(weights=spec)
        layer = Conv(6, (1, 1), feature_group_count=6, quantization=quantization)
        inputs = quantizer_of(Uniform(bits=4, scale="constant", scale_value=1.0), weights=False).apply({}, x)
        if variant == "a2q":
            layer.init(jax.random.key(0), inputs)
            continue
        with pytest.raises(UserError, match="centres the weights.*one.*variant='a2q'"):
            layer.init(jax.random.key(0), inputs)


@pytest.mark.parametrize("bits", [1, 33])
def test_impossible_accumulators_cannot_be_set(bits):
    with pytest.raises(UserError, match="2 to 32 bits"):
        set_accumulator_bits({}, bits)
