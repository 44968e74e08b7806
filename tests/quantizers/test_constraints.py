"""Quantizer parameters stay in their boxes."""

import jax.numpy as jnp
import numpy as np
import pytest

from qflax.quantizers import constrain
from qflax.quantizers.constraints import BOUNDS


@pytest.mark.parametrize("name", BOUNDS)
def test_every_parameter_is_projected_into_its_box(name):
    low, high = BOUNDS[name]
    x = jnp.asarray([-jnp.inf, -1e9, -1.0, 0.0, 1e-9, 1.0, 1e9, jnp.inf], jnp.float32)
    y = constrain({"layer": {"weights": {name: x}}})["layer"]["weights"][name]
    np.testing.assert_array_equal(y, np.clip(x, low, high))
    assert np.all((y >= low) & (y <= high))


def test_values_inside_are_left_alone_and_nan_stays_visible():
    tree = {
        "a": {"scale": jnp.asarray([0.1, 2.0])},
        "b": {"x_min": jnp.float32(-3), "width": jnp.float32(jnp.nan)},
    }
    y = constrain(tree)
    np.testing.assert_array_equal(y["a"]["scale"], tree["a"]["scale"])
    assert y["b"]["x_min"] == -3 and np.isnan(y["b"]["width"])


def test_a_scale_cannot_become_negative_and_an_offset_not_positive():
    y = constrain({"scale": jnp.float32(-0.5), "x_min": jnp.float32(0.5), "log2_scale": jnp.float32(-99)})
    assert y["scale"] > 0 and y["x_min"] == 0 and y["log2_scale"] == -24


def test_nothing_to_constrain_is_fine():
    assert constrain({}) == {}
