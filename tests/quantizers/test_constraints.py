"""Quantizer parameters stay within their bounds, whatever the update."""

import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.quantizers import CONSTRAINTS, constrain, limit_gradients
from qflax.quantizers.constraints import ANY_LOG2, NEGATIVE, POSITIVE, Box


def state(**layers):
    return {CONSTRAINTS: {name: {"weights": {"constraint": box}} for name, box in layers.items()}}


@pytest.mark.parametrize("low,high", [POSITIVE, ANY_LOG2, NEGATIVE])
def test_every_parameter_is_projected_into_its_box(low, high):
    x = jnp.asarray([-jnp.inf, -1e9, -1.0, 0.0, 1e-9, 1.0, 1e9, jnp.inf], jnp.float32)
    y = constrain({"layer": {"weights": {"a": x}}}, state(layer=Box((("a", low, high),))))
    y = y["layer"]["weights"]["a"]
    np.testing.assert_array_equal(y, np.clip(x, low, high))
    assert np.all((y >= low) & (y <= high))


def test_values_inside_are_left_alone_and_nan_stays_visible():
    tree = {
        "a": {"weights": {"scale": jnp.asarray([0.1, 2.0])}},
        "b": {"weights": {"x_min": jnp.float32(-3), "width": jnp.float32(jnp.nan)}},
    }
    bounds = state(a=Box((("scale", *POSITIVE),)), b=Box((("width", *POSITIVE), ("x_min", *NEGATIVE))))
    y = constrain(tree, bounds)
    np.testing.assert_array_equal(y["a"]["weights"]["scale"], tree["a"]["weights"]["scale"])
    assert y["b"]["weights"]["x_min"] == -3 and np.isnan(y["b"]["weights"]["width"])


def test_a_box_leaves_gradients_alone():
    tree = {"a": {"weights": {"scale": jnp.float32(1e9)}}}
    assert limit_gradients(tree, tree, state(a=Box((("scale", *POSITIVE),)))) == tree


def test_nothing_to_constrain_is_fine():
    assert constrain({}, {}) == {}


def test_a_state_without_constraints_is_an_error_that_names_the_collection():
    with pytest.raises(UserError, match="a: no constraints.*quantizer_constraints"):
        constrain({"a": {"weights": {"scale": jnp.float32(1)}}}, {})
