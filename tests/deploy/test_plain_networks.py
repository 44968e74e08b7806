"""Networks of plain Flax that are not of ReLUs and images alone, in every format."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.deploy import IntegerRunner, export, load
from qflax.linen import quantize
from qflax.quantizers import Uniform, calibrate
from qflax.verify import load as load_file
from qflax.verify import run, verify


class Images(nn.Module):
    """Layers behind functions that choose by the sign."""

    @nn.compact
    def __call__(self, x):
        for function in (nn.leaky_relu, nn.elu, nn.softplus, nn.hard_tanh):
            x = function(nn.Conv(4, (3, 3))(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Sequences(nn.Module):
    """Convolutions over one axis, to and fro."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3,))(x)), (2,), (2,))
        x = nn.relu(nn.Conv(8, (3,), kernel_dilation=2, feature_group_count=4)(x))
        x = nn.relu(nn.ConvTranspose(4, (3,), (2,))(x))
        return nn.Dense(5)(x.reshape(len(x), -1))


class Upwards(nn.Module):
    """To a larger image and back, by halves of the channels in another order."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = jax.image.resize(x, (len(x), 8, 8, 4), "nearest")
        left, right = jnp.split(nn.relu(nn.Conv(8, (3, 3))(x)), 2, axis=-1)
        x = jnp.stack([right, left], -1)[..., np.array([3, 0, 1]), :].min(1)
        return nn.Dense(5)(x.reshape(len(x), -1))


SHAPES = {Images: (8, 8, 3), Sequences: (16, 3), Upwards: (4, 4, 3)}
LAYERS = {Images: 5, Sequences: 4, Upwards: 3}


@pytest.fixture(scope="module", params=SHAPES)
def network(request):
    model = quantize(request.param(), weights=Uniform(bits=4), activations=Uniform(bits=8))
    x = np.random.default_rng(0).integers(0, 256, (16, *SHAPES[request.param])).astype(np.float32)
    inputs = x / 128 - 1
    variables = calibrate(model, model.init(jax.random.key(0), inputs), [inputs])
    return request.param, (lambda variables, x: model.apply(variables, x / 128 - 1)), variables, x


@pytest.mark.parametrize("form", ["packed", "qonnx", "qcdq"])
def test_it_is_exported_and_verified(network, form, tmp_path):
    kind, function, variables, x = network
    file = tmp_path / f"net.{form}"
    export(function, variables, SHAPES[kind], file, format=form)
    report = verify(file)
    assert report.ok and len(report.integer_layers) == LAYERS[kind]
    expected = np.asarray(jax.jit(function)(variables, x))
    # Elementary functions differ in the last bit, and then the odd code by one; the others do not.
    atol = 0.02 * np.abs(expected).max() if kind is Images else 1e-6
    found = [run(load_file(file), x)]
    if form == "packed":
        found.append(IntegerRunner(load(file))(x))
    for logits in found:
        np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-6, atol=atol)
