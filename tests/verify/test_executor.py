"""The NumPy executor agrees with JAX, and quantizes as the number formats of training do."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qflax.verify
from qflax.numerics import IntegerFormat, MinifloatFormat
from qflax.verify import formats
from qflax.verify.executor import evaluate

pytestmark = pytest.mark.exact

CONVOLUTIONS = [
    dict(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1),
    dict(strides=(2, 2), padding=((0, 1), (0, 1)), dilation=(1, 1), groups=1),
    dict(strides=(1, 2), padding=((2, 0), (1, 3)), dilation=(2, 1), groups=2),
    dict(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=6),
]


@pytest.mark.parametrize("attributes", CONVOLUTIONS)
def test_convolutions_of_integers_are_exact(attributes):
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (3, 7, 9, 6)).astype(np.float32)
    kernel = rng.integers(-100, 100, (3, 2, 6 // attributes["groups"], 12)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        *(x, kernel, attributes["strides"], attributes["padding"]),
        rhs_dilation=attributes["dilation"],
        feature_group_count=attributes["groups"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_array_equal(evaluate("conv", [x, kernel], attributes), expected)


@pytest.mark.parametrize("highest", [7, 100, 4095, 2**20])
def test_sums_are_exact_where_those_of_float32_are_not(highest):
    rng = np.random.default_rng(0)
    x, kernel = (rng.integers(-highest, highest, shape, endpoint=True) for shape in ((8, 500), (500, 8)))
    expected = (x @ kernel).astype(np.float32)
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    np.testing.assert_array_equal(evaluate("dense", [x, kernel], {}), expected)
    attributes = dict(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1)
    y = evaluate("conv", [x[:, None, None], kernel[None, None]], attributes)
    np.testing.assert_array_equal(y[:, 0, 0], expected)


def test_large_convolutions_are_done_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(5, 6, 6, 4)), rng.normal(size=(3, 3, 2, 8))
    attributes = dict(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=2)
    whole = evaluate("conv", [x, kernel], attributes)
    monkeypatch.setattr("qflax.verify.executor._COLUMNS", 2 * 36 * 36)
    np.testing.assert_allclose(evaluate("conv", [x, kernel], attributes), whole, rtol=1e-6)


@pytest.mark.parametrize("operation", ["max_pool", "sum_pool"])
def test_pools(operation):
    x = np.random.default_rng(0).integers(-50, -1, (2, 7, 8, 3)).astype(np.float32)
    start, reduce = {"max_pool": (-np.inf, jax.lax.max), "sum_pool": (0.0, jax.lax.add)}[operation]
    padding = ((1, 1), (0, 1))
    expected = jax.lax.reduce_window(
        *(x, np.float32(start), reduce, (1, 3, 2, 1), (1, 2, 3, 1), ((0, 0), *padding, (0, 0)))
    )
    y = evaluate(operation, [x], dict(window=(3, 2), strides=(2, 3), padding=padding))
    np.testing.assert_array_equal(y, expected)


X = np.float32([[-2.5, -1.5, -0.5, -0.0, 0.25], [0.5, 1.5, 2.5, 3.75, 7.0]])
SINGLE = {
    "exp": jnp.exp,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "erf": jax.lax.erf,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "sign": jnp.sign,
    "negative": jnp.negative,
    "absolute": jnp.abs,
}


@pytest.mark.parametrize("operation", SINGLE)
def test_functions_of_one_number(operation):
    np.testing.assert_allclose(evaluate(operation, [X], {}), SINGLE[operation](X), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("operation", ["log", "sqrt", "rsqrt"])
def test_functions_of_a_positive_number(operation):
    x = np.abs(X) + np.float32(0.1)
    np.testing.assert_allclose(evaluate(operation, [x], {}), getattr(jax.lax, operation)(x), rtol=2e-6)


@pytest.mark.parametrize("exponent", [-2, -1, 0, 1, 2, 3, 7])
def test_whole_powers(exponent):
    expected = jax.lax.integer_pow(X, exponent)
    np.testing.assert_allclose(evaluate("power", [X], {"exponent": exponent}), expected, rtol=1e-6)


def test_shapes():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    cases = [
        ("sum", dict(axes=(1, 2)), x.sum((1, 2))),
        ("max", dict(axes=(2,)), x.max(2)),
        ("pad", dict(padding=((0, 0), (1, 0), (0, 2))), np.pad(x, ((0, 0), (1, 0), (0, 2)))),
        ("slice", dict(start=(0, 1, 0), stop=(None, None, 3), step=(1, 1, 2)), x[:, 1:, 0:3:2]),
        ("reshape", dict(shape=(-1, 12)), x.reshape(2, 12)),
        ("transpose", dict(permutation=(0, 2, 1)), x.transpose(0, 2, 1)),
    ]
    for operation, attributes, expected in cases:
        np.testing.assert_array_equal(evaluate(operation, [x], attributes), expected)
    np.testing.assert_array_equal(
        evaluate("concatenate", [x, 2 * x], {"axis": 1}), np.concatenate([x, 2 * x], 1)
    )


ROUNDINGS = ["half_even", "floor", "ceil", "toward_zero", "stochastic"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fields", [(1, True, False), (1, False, False), (2, True, True), (5, False, False)])
def test_integers_are_those_of_training(rounding, fields):
    bits, signed, narrow = fields
    x = np.concatenate([np.arange(-80, 80) / 4, np.random.default_rng(0).normal(size=500) * 9])
    x, scale, zero_point = x.astype(np.float32), np.float32(0.25), np.float32(signed * 0 or bits)
    expected = IntegerFormat(bits=bits, signed=signed, narrow=narrow).unscaled(
        x, scale, zero_point, rounding=rounding
    )
    fmt = formats.IntegerFormat.of(bits, signed=signed, narrow=narrow)
    y = evaluate("quantize", [x, scale, zero_point], {"format": fmt, "rounding": rounding})
    np.testing.assert_array_equal(y, expected)


MINIFLOATS = [
    dict(exponent_bits=4, mantissa_bits=3, specials="nan"),
    dict(exponent_bits=5, mantissa_bits=2, specials="ieee", saturate=False),
    dict(exponent_bits=4, mantissa_bits=3, specials="nan", saturate=False),
    dict(exponent_bits=4, mantissa_bits=3, specials="fnuz", bias=8),
    dict(exponent_bits=3, mantissa_bits=1, signed=False),
    dict(exponent_bits=8, mantissa_bits=0, subnormals=False, signed=False, bias=127, specials="nan"),
    dict(exponent_bits=3, mantissa_bits=2, subnormals=False),
    dict(exponent_bits=8, mantissa_bits=7),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fields", MINIFLOATS)
def test_minifloats_are_those_of_training(rounding, fields):
    theirs = MinifloatFormat(**fields)
    edges = theirs.values[:300].astype(np.float32)
    middles = ((edges[1:].astype(np.float64) + edges[:-1]) / 2).astype(np.float32)
    patterns = np.random.default_rng(0).integers(0, 0x7F800000, 500, dtype=np.uint32).view(np.float32)
    beyond = np.float32([theirs.max * 0.99, theirs.max, 3e38, np.inf, np.nan])
    x = np.concatenate([edges, middles, np.nextafter(middles, np.float32(0)), patterns, beyond])
    x = np.concatenate([x, -x])
    if not theirs.subnormals:
        x = x[~(np.abs(x) < 2.0**-126)]  # Where float8_e8m0fnu of ml_dtypes rounds up, and training with it.
    names = ("exponent_bits", "mantissa_bits", "bias", "specials", "signed", "subnormals", "saturate")
    ours = formats.MinifloatFormat(**{name: getattr(theirs, name) for name in names})
    y = evaluate("quantize", [x], {"format": ours, "rounding": rounding})
    expected = np.asarray(theirs.unscaled(x, rounding=rounding))
    np.testing.assert_array_equal(y[np.isnan(expected)], expected[np.isnan(expected)])
    fine = ~np.isnan(expected)
    np.testing.assert_array_equal(y[fine].view(np.uint32), expected[fine].view(np.uint32))


def test_nothing_of_qflax_but_its_errors_and_limits_is_imported():
    files = list(pathlib.Path(qflax.verify.__file__).parent.glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                known = name.startswith(("qflax.errors", "qflax.untrusted", "qflax.verify"))
                assert known or not name.startswith("qflax"), f"{file}: {name}"
    code = "import sys, qflax.verify; sys.exit(bool({'jax', 'flax', 'onnx', 'qonnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
