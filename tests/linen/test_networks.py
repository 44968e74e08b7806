"""Networks of plain Flax are quantized, trained, exported and verified."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_networks import NETWORKS

from qflax import quantizers
from qflax.data import load
from qflax.deploy import IntegerRunner, export
from qflax.deploy import load as load_packed
from qflax.linen import quantize
from qflax.quantizers import Uniform, calibrate, constrain
from qflax.verify import load as load_file
from qflax.verify import run, verify
from qflax.verify.probe import spread

STEPS = 64
STATE = ["batch_stats", quantizers.STATISTICS, quantizers.CONSTRAINTS]


def serve(model):
    return lambda variables, images: model.apply(variables, images / 64 - 2)


def trained(model, digits):
    """Variables after some steps of Adam, and the losses."""
    images = digits.images[:512].astype(np.float32) / 64 - 2
    variables = dict(jax.jit(model.init)(jax.random.key(0), images[:2]))
    variables = calibrate(model, variables, [images[:64]])
    learned = {name: variables.pop(name) for name in ("params", quantizers.PARAMETERS) if name in variables}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(learned, rest, moments, images, labels):
        def loss_of(learned):
            logits, state = model.apply({**learned, **rest}, images, train=True, mutable=STATE)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

        (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(learned)
        changes, moments = optimizer.update(gradients, moments)
        learned = optax.apply_updates(learned, changes)
        if quantizers.PARAMETERS in learned:
            learned[quantizers.PARAMETERS] = constrain(learned[quantizers.PARAMETERS], state)
        state.pop(quantizers.CONSTRAINTS, None)
        return learned, {**rest, **state}, moments, loss

    moments, losses = optimizer.init(learned), []
    for i in range(STEPS):
        part = slice(64 * (i % 8), 64 * (i % 8 + 1))
        learned, variables, moments, loss = step(
            learned, variables, moments, images[part], digits.labels[part]
        )
        losses.append(float(loss))
    return {**learned, **variables}, losses


@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        pytest.param("cnn", marks=pytest.mark.thorough),
        pytest.param("mixer", marks=pytest.mark.thorough),
        pytest.param("mobilenet", marks=pytest.mark.thorough),
    ],
)
def test_network_is_quantized_trained_and_exported(name, tmp_path):
    digits = load("digits", "train")
    plain = NETWORKS[name]()
    model = quantize(
        plain,
        weights=Uniform(bits=4, granularity="per_channel"),
        activations=Uniform(bits=8, statistic="mse"),
    )
    variables, losses = trained(model, digits)
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    float_variables = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.structure(float_variables["params"]) == jax.tree.structure(variables["params"])

    images = load("digits", "test").images[:100]
    expected = np.asarray(jax.jit(serve(model))(variables, images.astype(np.float32)))
    files = {}
    for form in ("packed", "qonnx"):
        files[form] = tmp_path / f"net.{form}"
        export(serve(model), variables, (32, 32, 3), files[form], format=form)
        assert verify(files[form]).ok
        network = load_file(files[form])
        logits = run(network, spread(images, 0, 255)).reshape(expected.shape)
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    logits = IntegerRunner(load_packed(files["packed"]))(images)
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
