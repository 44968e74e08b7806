"""Learned widths reproduce the reference vectors: values, widths, gradients of step and range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.numerics import bit_width, quantize_to_range

pytestmark = pytest.mark.exact


def names(golden):
    arrays = golden("mixed_precision")._arrays
    return sorted({name.rsplit(".", 1)[0] for name in arrays if name.endswith(".dQ_dd")})


@pytest.fixture(scope="module")
def cases(golden):
    return {name: golden("mixed_precision").case(name) for name in names(golden)}


def test_values_widths_and_gradients(cases):
    assert len(cases) >= 8
    for case in cases.values():
        signed = bool(case["signed"])
        x, gy, d, x_max = (jnp.asarray(case[name], jnp.float32) for name in ("x", "gy", "d", "xmax"))
        y = jax.jit(lambda x, d, x_max, s=signed: quantize_to_range(x, d, x_max, signed=s))(x, d, x_max)
        np.testing.assert_allclose(y, case["Q"] if "Q" in case else case["y"], rtol=1e-6, atol=1e-7)

        def loss(x, d, x_max, signed=signed, gy=gy):
            return jnp.sum(gy * quantize_to_range(x, d, x_max, signed=signed))

        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(x, d, x_max)
        np.testing.assert_allclose(gradients[0], case["grad_x"], rtol=1e-6)
        for name, derivative, gradient in (
            ("grad_d", "dQ_dd", gradients[1]),
            ("grad_xmax", "dQ_dxmax", gradients[2]),
        ):
            terms = np.sum(np.abs(case["gy"] * case[derivative]))
            # u - round(u) of u in float32 is good to its last place only.
            last_place = 2.0**-23 * np.sum(np.abs(case["gy"]) * np.minimum(np.abs(x), x_max)) / d
            assert abs(gradient - case[name]) <= 1e-6 * (1 + terms) + last_place
        assert bit_width(d, x_max, signed) == case["bits"]


@pytest.mark.parametrize("kind", ["table", "exact"])
@pytest.mark.parametrize("signed", [True, False])
def test_tables_of_widths(golden, kind, signed):
    case = golden("mixed_precision").case(f"bits_{kind}_{'signed' if signed else 'unsigned'}")
    np.testing.assert_array_equal(
        jax.jit(bit_width, static_argnums=2)(case["d"], case["xmax"], signed), case["bits"]
    )


def test_every_range_that_a_width_gives_has_that_width():
    steps = np.random.default_rng(0).uniform(2**-12, 1, 1000).astype(np.float32)
    for bits in range(1, 17):
        for signed in (True, False)[bits < 2 :]:
            highest = np.float32(2 ** (bits - signed) - 1)
            assert set(np.asarray(bit_width(steps, steps * highest, signed))) == {bits}
            assert set(np.asarray(bit_width(steps, steps * highest * np.float32(1.001), signed))) == {
                bits + 1
            }


def test_the_gradient_of_a_width_is_that_of_the_logarithm():
    d, x_max = jnp.float32(0.1), jnp.float32(1.3)
    gradients = jax.grad(lambda d, x_max: bit_width(d, x_max, True), (0, 1))(d, x_max)
    expected = jax.grad(lambda d, x_max: jnp.log2(x_max / d + 1), (0, 1))(d, x_max)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5)
