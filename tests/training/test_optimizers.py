"""The two optimizer groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qflax.training.optimizers import OptimizerKinds, as_numbers, build_optimizer

NUMBERS = {
    "learning_rate": 0.1,
    "quantizer_learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
    "skip_bad_steps": 0,
}


def trained():
    return {
        "params": {
            "conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            "norm": {"scale": jnp.ones(2)},
            "heads": {"bias": jnp.ones((2, 2)), "scale": jnp.ones((2, 2))},
        },
        "quantizer_params": {"conv": {"scale": jnp.ones(())}},
    }


def run(kinds, gradients, steps=1, rate=1.0, **numbers):
    numbers = as_numbers(**{**NUMBERS, **numbers})
    values = trained()
    state = build_optimizer(kinds, numbers, 1.0).init(values)
    for _ in range(steps):
        updates, state = build_optimizer(kinds, numbers, rate).update(gradients, state, values)
        values = optax.apply_updates(values, updates)
    return values


def test_sgd_with_nesterov_is_the_published_rule():
    gradients = jax.tree.map(jnp.ones_like, trained())
    value, velocity = 1.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity + 1.0
        value -= 0.5 * 0.1 * (1.0 + 0.9 * velocity)
    result = run(OptimizerKinds(), gradients, steps=3, rate=0.5)
    np.testing.assert_allclose(result["params"]["conv"]["kernel"], value, rtol=1e-6)


def test_the_quantizer_group_has_its_own_rate():
    gradients = jax.tree.map(jnp.ones_like, trained())
    result = run(OptimizerKinds(nesterov=False), gradients)
    np.testing.assert_allclose(result["params"]["norm"]["scale"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(result["quantizer_params"]["conv"]["scale"], 0.99, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_only_kernels_decay(kind):
    gradients = jax.tree.map(jnp.zeros_like, trained())
    result = run(OptimizerKinds(weights=kind, quantizers=kind, nesterov=False), gradients, weight_decay=0.5)
    np.testing.assert_allclose(result["params"]["conv"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    for value in (
        result["params"]["conv"]["bias"],
        result["params"]["norm"]["scale"],
        *result["params"]["heads"].values(),
        result["quantizer_params"]["conv"]["scale"],
    ):
        np.testing.assert_array_equal(value, 1.0)


def test_gradient_clip_bounds_the_norm_of_the_weights_alone():
    gradients = jax.tree.map(lambda x: 100 * jnp.ones_like(x), trained())
    result = run(OptimizerKinds(nesterov=False), gradients, gradient_clip=1.0)
    step = [np.ravel(1 - x) for x in jax.tree.leaves(result["params"])]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(step)), 0.1, rtol=1e-5)
    np.testing.assert_allclose(result["quantizer_params"]["conv"]["scale"], 1 - 0.01 * 100, atol=1e-6)
