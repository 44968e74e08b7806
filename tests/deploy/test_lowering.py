"""The graph of a function computes what the function does, bit for bit where sums are of integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import INTEGER, POLICIES, images

from qflax.deploy.exporting import is_exact
from qflax.deploy.lowering import lower
from qflax.deploy.ranges import integer_ranges
from qflax.deploy.runner import execute
from qflax.errors import UserError
from qflax.numerics import IntegerFormat
from qflax.quantizers import MixedPrecision, Quantization, quantizer_of

pytestmark = pytest.mark.exact

X = np.random.default_rng(0).normal(size=(3, 6, 4, 8)).astype(np.float32)
ALONG = {"kernel": X[0, :3, :, :6].reshape(3, 4, 6), "bias": X[0, 0, 0, :6]}


def run(graph, x):
    return np.asarray(jax.jit(lambda x: execute(graph, x)[0][graph.output].astype(jnp.float32))(x))


@pytest.mark.parametrize("name", POLICIES)
def test_every_quantizer_gives_the_same_bits(trained, lowered, name):
    (function, variables), graph, x = trained(name), lowered(name), images(40)
    expected, got = np.asarray(jax.jit(function)(variables, x)), run(graph, x)
    assert is_exact(graph) == (name in INTEGER)
    if name == "float":
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(got, expected)
    assert len(np.unique(expected, axis=0)) > 5


@pytest.mark.parametrize("name", INTEGER)
def test_all_sums_of_integer_networks_are_integers(lowered, name):
    graph = lowered(name)
    ranges = integer_ranges(graph)
    values = jax.jit(lambda x: execute(graph, x)[0])(images(20, seed=1))
    kernels = [node for node in graph.nodes if node.operation in ("conv", "dense")]
    assert len(kernels) == 5
    for node in kernels:
        low, high = ranges[node.output]
        sums = np.asarray(values[node.output])
        assert sums.dtype == np.int32 and low <= sums.min() < sums.max() <= high
        assert isinstance(graph.constants[node.inputs[1]].format, IntegerFormat)


def test_accumulator_promises_are_on_the_weights(lowered):
    graph = lowered("a2q+")
    kernels = [graph.constants[node.inputs[1]] for node in graph.nodes if node.operation in ("conv", "dense")]
    assert [kernel.accumulator_bits for kernel in kernels] == [12] * 5


def test_learned_widths_are_in_the_formats(trained, lowered):
    variables, graph = trained("mixed")[1], lowered("mixed")
    widths = variables["quantizer_stats"]["stem"]["weights"]["bits"]
    kernel = next(graph.constants[node.inputs[1]] for node in graph.nodes if node.layer == "stem")
    assert kernel.format == IntegerFormat(bits=int(widths), signed=True, narrow=True)


def test_a_width_that_is_still_learned_is_told_of():
    quantizer = quantizer_of(MixedPrecision(bits=4), weights=False, signed=True)
    variables = quantizer.init(jax.random.key(0), X)
    variables = {**variables, "quantizer_params": {"step": jnp.float32(0.1), "x_max": jnp.float32(0.75)}}
    with pytest.raises(UserError, match="still being learned.*freeze_widths_after"):
        lower(lambda x: quantizer.apply(variables, x).value, X.shape[1:])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.gelu(x) - jax.nn.silu(x) * jax.nn.sigmoid(x),
        lambda x: jnp.clip(x, -0.5, 2.0) ** 3 + jnp.exp(-jnp.square(x)),
        lambda x: x * jax.nn.sigmoid(jnp.mean(x, (1, 2)))[:, None, None, :],
        lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=2),
        lambda x: jnp.pad(x[:, ::2, 1:], ((0, 0), (1, 0), (0, 2), (3, 3))),
        lambda x: jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], 8, -1).max(-1),
        lambda x: nn.avg_pool(x, (2, 2), (2, 2)) + nn.max_pool(x, (3, 3), (2, 2), "SAME"),
        lambda x: jnp.round(x) + jnp.floor(x) * jnp.sign(x) / jnp.maximum(jnp.abs(x), 1),
        lambda x: jax.nn.relu6(jnp.squeeze(x[:, :1], 1)) @ np.eye(8, 5, dtype=np.float32),
        lambda x: jnp.where(True, x, 0.0) + jnp.arange(8.0) * jnp.ones((4, 1)),
        lambda x: jax.nn.leaky_relu(x) + jax.nn.elu(x) + jax.nn.celu(x, 2.0) * jax.nn.selu(x),
        lambda x: jax.nn.softplus(x) + jax.nn.mish(x) - jax.nn.log_sigmoid(x) + jax.nn.squareplus(x),
        lambda x: jax.nn.hard_tanh(x) + jax.nn.hard_silu(x) * jax.nn.soft_sign(x),
        lambda x: jnp.where(x > 0.3, x, jnp.where(x[..., :1] <= -0.5, -1.0, x.max(-1, keepdims=True))),
        lambda x: jnp.where(jnp.arange(8) % 3 == 0, x, 2 * x) + (x < 0.5) + ~(x <= 0),
        lambda x: jnp.where((x > 0.1) & (x <= 1) | (x < -1) & (jnp.arange(8) < 4), x, 7 * x),
        lambda x: jnp.where(jnp.isnan(x.sum(-1, keepdims=True)), 0.0, x) + jnp.isnan(x[..., 0])[..., None],
        lambda x: jnp.where(jnp.where(x > 0, x > 1, x < -1), 0.0, x),
        lambda x: jnp.where(jnp.where(x > 0, jnp.arange(8) < 4, False), 0.0, x),
        lambda x: jnp.where(~jnp.where(jnp.arange(8) < 4, x > 0, x < 0), 0.0, x),
        lambda x: jnp.where(x > 60, x, jnp.exp(3 * x) * 0 + 1) * (jnp.float32(0.25) < x),
        lambda x: jnp.einsum("bhwc,bhwd->bcd", x, 2 * x),
        lambda x: nn.Conv(6, (3,), 2, ((2, 1),), kernel_dilation=2, feature_group_count=2).apply(
            {"params": ALONG}, jnp.concatenate([jnp.swapaxes(x[:, 1], 1, 2)] * 2, -1)
        ),
        lambda x: nn.ConvTranspose(6, (3,), (2,)).apply({"params": ALONG}, jnp.swapaxes(x[:, 1], 1, 2)),
        lambda x: nn.ConvTranspose(2, (3, 2), (2, 3), "VALID", use_bias=False).apply(
            {"params": {"kernel": X[0, :3, :2].reshape(3, 2, 8, 1) * jnp.arange(1.0, 3.0)}}, x
        ),
        lambda x: nn.max_pool(x[:, 0], (2,), (2,)) - nn.avg_pool(x[:, 1], (2,), (2,)),
        lambda x: jnp.broadcast_to(x.max(-1, keepdims=True), x.shape),
        lambda x: jnp.tanh(jnp.broadcast_to(jnp.sum(x, (1, 2))[:, None], (len(x), 5, 8))),
        lambda x: jnp.square(jnp.broadcast_to(x[:, :1], x.shape)).reshape(len(x), -1),
        lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 3, 2) + 1,
        lambda x: jnp.stack([x, jnp.tile(x[:, :1], (1, 6, 1, 1)), -x], 2),
        lambda x: jax.nn.gelu(x, approximate=False) + x.min((1, 2), keepdims=True),
        lambda x: nn.pooling.min_pool(x, (2, 2), (2, 2)) - x[:, 1, None, 2, None].min(-1, keepdims=True),
        lambda x: jax.image.resize(x, (len(x), 12, 4, 8), "nearest")[..., jnp.array([2, 3, 4, 0, 7, 7])],
        lambda x: (
            jax.image.resize(x, (len(x), 4, 7, 8), "nearest")
            * jnp.take(x, jnp.array([1, 4, 2, 5]), 1)[:, :, :1]
        ),
    ],
)
def test_plain_functions(function):
    graph = lower(function, X.shape[1:])
    expected = function(X)
    assert run(graph, X).shape == expected.shape
    np.testing.assert_allclose(run(graph, X), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x), "sort"),
        (lambda x: x - jnp.mean(x, 0), "over the batch"),
        (lambda x: x.reshape(-1), "mixes the batch"),
        (lambda x: jnp.where(x == 0, x, 0.0), "order is known, equality not"),
        (lambda x: x > 0, "is of truths"),
        (lambda x: x + jnp.flip(jnp.ones_like(x), 1), "of the batch's size"),
        (lambda x: (x > 0).sum(1), "convert_element_type to int32"),
        (lambda x: jnp.any(x > 0, 1) * x[:, 0], "reduce_or of a comparison"),
        (lambda x: jnp.einsum("bhwc,ahwd->abcd", x, x), "sums over the batch, or moves it"),
        (lambda x: jax.lax.conv(x, x[:1], (1, 1), "SAME"), "slice of the batch"),
        (lambda x: jax.lax.conv(x, X[:1, :, :3, :3], (1, 1), [(0, 0), (0, 0)]), "is not NHWC"),
        (lambda x: nn.Conv(6, (3,), padding=((0, -1),)).apply({"params": ALONG}, x[:, 1, :, :4]), "crops"),
        (lambda x: jnp.take(x, jnp.array([0, 1]), axis=0), "gather along the batch"),
        (lambda x: jnp.arange(9.0)[jnp.floor(x).astype(int)], "to int32"),
        (lambda x: jnp.take(x, jnp.array([8]), axis=1), "gather of places that are not there"),
        (lambda x: jnp.tile(x, (2, 1, 1, 1)), "tile along the batch"),
        (lambda x: jnp.ones((2, 3)), "does not depend on its input"),
        (lambda x: (x, x), "2 results"),
    ],
)
def test_what_a_graph_cannot_say_is_told(function, message):
    with pytest.raises(UserError, match=message):
        lower(function, X.shape[1:])


def test_names_are_those_of_layers_and_nothing_is_there_twice(lowered):
    graph = lowered("int4")
    assert {"stem/conv", "norm1/add", "act2/activations/quantize"} <= {node.output for node in graph.nodes}
    assert graph.constants["stem/kernel"].array.shape == (3, 3, 3, 8)
    keys = [(node.operation, node.inputs, str(node.attributes)) for node in graph.nodes]
    assert len(set(keys)) == len(keys)
    used = {name for node in graph.nodes for name in node.inputs} | {graph.output}
    assert used == {graph.input, *graph.constants, *(node.output for node in graph.nodes)}


def test_a_float_network_has_no_formats():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    graph = lower(lambda x: model.apply(variables, x), X.shape[1:])
    assert all(constant.format is None for constant in graph.constants.values())
    assert Quantization() == POLICIES["float"]
