"""Training loops of one's own: however a batch is divided among devices, gradients are those of all of it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qflax.linen import quantize
from qflax.quantizers import AccumulatorAware, Minifloat, Uniform, calibrate

AXIS, DEVICES = "batch", 2
INT4, E4M3 = Uniform(bits=4), Minifloat(exponent_bits=4, mantissa_bits=3, scale="log2")
SPECS = {
    "int4": dict(weights=Uniform(bits=4, granularity="per_channel"), activations=INT4),
    "a2q": dict(weights=AccumulatorAware(bits=4, accumulator_bits=12), activations=INT4),
    "e4m3": dict(weights=E4M3, activations=E4M3),
    "ema": dict(weights=Uniform(bits=4), activations=Uniform(bits=4, scale="ema", statistic="absmax")),
}
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(8, 6, 6, 3)).astype(np.float32), RNG.normal(size=(8, 5)).astype(np.float32)
RULES = [dict(layers="relu_*", activations={}), dict(layers="input", activations={})]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class WithConstants(nn.Module):
    """Its grids and signs are known only if its constants are."""

    @nn.compact
    def __call__(self, x):
        x = jnp.pad(nn.relu(nn.Conv(4, (3, 3))(x)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.maximum(nn.Conv(4, (3, 3))(x), 0.0)
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(5)(nn.avg_pool(x, (2, 2), (2, 2)).sum((1, 2)) / 4)


def value_and_gradients(model, reduced=lambda x: x):
    """Function of trained variables, others and data: loss and new statistics, and gradients."""

    def loss(trained, others, images, targets):
        outputs, state = model.apply({**trained, **others}, images, mutable=["quantizer_stats"])
        return reduced(jnp.mean((outputs - targets) ** 2)), state

    return jax.value_and_grad(loss, has_aux=True)


def on_whole_batch(model, trained, others, data):
    return jax.jit(value_and_gradients(model))(trained, others, *data)


def under_jit(model, trained, others, data, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(axis_type,))
    trained, others = jax.device_put((trained, others), NamedSharding(mesh, P()))
    data = jax.device_put(data, NamedSharding(mesh, P(AXIS)))
    return on_whole_batch(model, trained, others, data)


def under_shard_map(model, trained, others, data):
    step = value_and_gradients(model, lambda loss: jax.lax.pmean(loss, AXIS))
    mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], (AXIS,))
    specs = dict(in_specs=(P(), P(), P(AXIS), P(AXIS)), out_specs=P())
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs))(trained, others, *data)


def under_pmap(model, trained, others, data):
    def step(*args):
        return jax.lax.pmean(value_and_gradients(model)(*args), AXIS)

    data = (x.reshape(DEVICES, -1, *x.shape[1:]) for x in data)
    return jax.pmap(step, AXIS, in_axes=(None, None, 0, 0), out_axes=None)(trained, others, *data)


@functools.cache
def variables_and_expected(name):
    model = quantize(Net(), rules=RULES, **SPECS[name])
    variables = calibrate(model, model.init(jax.random.key(0), DATA[0]), [DATA[0]])
    trained = {name: x for name, x in variables.items() if name in ("params", "quantizer_params")}
    others = {name: x for name, x in variables.items() if name not in trained}
    return trained, others, on_whole_batch(model, trained, others, DATA)


def check(name, loop, axis_name):
    trained, others, expected = variables_and_expected(name)
    model = quantize(Net(), rules=RULES, axis_name=axis_name, **SPECS[name])
    found = loop(model, trained, others, DATA)
    # Sums over a batch round differently in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("loop, axis_name", [(under_jit, None), (under_shard_map, AXIS), (under_pmap, AXIS)])
def test_gradients_do_not_depend_on_how_a_batch_is_divided(name, loop, axis_name):
    check(name, loop, axis_name)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "ema"])
def test_nor_on_who_decides_where_arrays_lie(name):
    check(name, functools.partial(under_jit, axis_type=AxisType.Explicit), None)


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_what_is_known_of_arrays_is_known_on_every_device(wrap):
    model = quantize(WithConstants(), rules=RULES, **SPECS["int4"])
    variables = calibrate(model, model.init(jax.random.key(0), DATA[0]), [DATA[0]])
    mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], (AXIS,))
    found = wrap(jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS)))
    np.testing.assert_allclose(
        found(variables, DATA[0]), model.apply(variables, DATA[0]), rtol=1e-5, atol=1e-6
    )
