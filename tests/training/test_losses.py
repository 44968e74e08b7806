"""Losses."""

import jax.numpy as jnp
import numpy as np

from qflax.training.losses import cross_entropy, smooth, squared_hinge

LOGITS = jnp.asarray([[2.0, -1.0, 0.5], [0.0, 0.3, -4.0]])
LABELS = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def test_cross_entropy_is_the_negative_log_probability():
    logits = np.asarray(LOGITS, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [-log_probability[0, 0], -log_probability[1, 2]]
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), expected, rtol=1e-6)


def test_squared_hinge_follows_its_formula():
    expected = [
        np.mean([0, 0, 1.5**2]),  # 1 - 2 < 0; 1 + (-1) = 0; 1 + 0.5.
        np.mean([1, 1.3**2, 5.0**2]),
    ]
    np.testing.assert_allclose(squared_hinge(LOGITS, LABELS), expected, rtol=1e-6)


def test_smoothing_keeps_the_sum_and_takes_from_the_label():
    smoothed = smooth(LABELS, 0.3)
    np.testing.assert_allclose(jnp.sum(smoothed, -1), 1, rtol=1e-6)
    np.testing.assert_allclose(smoothed[0], [0.8, 0.1, 0.1], rtol=1e-6)
