"""The operations of a graph in JAX; see the table in `deploy.graph`.

Each takes its node and arrays of one type, int32 or float32, and gives that type.
"""

import jax
import jax.numpy as jnp

from qflax.deploy.graph import UNARY, Graph, Node
from qflax.numerics import product, quotient


def value_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Shapes of all values for a batch of one."""

    def run(x):
        values = {graph.input: x, **{name: jnp.asarray(c.array) for name, c in graph.constants.items()}}
        for node in graph.nodes:
            value = EXECUTE[node.operation](node, *(values[name] for name in node.inputs))
            values[node.output] = value.astype(jnp.float32)
        return values

    values = jax.eval_shape(run, jax.ShapeDtypeStruct((1, *graph.shape), jnp.float32))
    return {name: value.shape for name, value in values.items()}


def _conv(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=node.attributes["strides"],
        padding=node.attributes["padding"],
        rhs_dilation=node.attributes["dilation"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=node.attributes["groups"],
        precision=jax.lax.Precision.HIGHEST,
    )


def _dense(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    del node
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def _quantize(node: Node, x: jax.Array, *grid: jax.Array) -> jax.Array:
    fmt, rounding = node.attributes["format"], node.attributes["rounding"]
    return fmt.unscaled(x.astype(jnp.float32), *grid, rounding=rounding)


def _pool(node: Node, x: jax.Array) -> jax.Array:
    start, combine = jnp.zeros((), x.dtype), jax.lax.add
    if node.operation == "max_pool":
        lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        start, combine = jnp.array(lowest, x.dtype), jax.lax.max
    a = node.attributes
    window, strides = (1, *a["window"], 1), (1, *a["strides"], 1)
    return jax.lax.reduce_window(x, start, combine, window, strides, ((0, 0), *a["padding"], (0, 0)))


def _slice(node: Node, x: jax.Array) -> jax.Array:
    a = node.attributes
    return x[tuple(slice(*of) for of in zip(a["start"], a["stop"], a["step"], strict=True))]


def _rescale(node: Node, *inputs: jax.Array) -> jax.Array:
    a = node.attributes
    pairs = zip(inputs, a["multipliers"], strict=True)
    total = sum(x.astype(jnp.int64) * multiplier for x, multiplier in pairs) + a["offset"]
    return jnp.clip(jnp.right_shift(total, a["shift"]), a["lowest"], a["highest"])


def _plain(function):
    return lambda node, *inputs: function(*inputs)


SUMS = {"conv": _conv, "dense": _dense}
EXECUTE = {
    **SUMS,
    "quantize": _quantize,
    "rescale": _rescale,
    "max_pool": _pool,
    "sum_pool": _pool,
    "slice": _slice,
    "multiply": _plain(product),
    "divide": _plain(quotient),
    **{name: _plain(getattr(jnp, name)) for name in ("add", "subtract", "maximum", "minimum")},
    **{name: _plain(getattr(jnp, name, None) or getattr(jax.lax, name)) for name in UNARY},
    "select": lambda node, which, a, b: jnp.where(which > 0, a, b),
    "power": lambda node, x: jax.lax.integer_pow(x, node.attributes["exponent"]),
    "sum": lambda node, x: jnp.sum(x, node.attributes["axes"]),
    "max": lambda node, x: jnp.max(x, node.attributes["axes"]),
    "pad": lambda node, x: jnp.pad(x, node.attributes["padding"]),
    "reshape": lambda node, x: x.reshape(node.attributes["shape"]),
    "transpose": lambda node, x: x.transpose(node.attributes["permutation"]),
    "concatenate": lambda node, *inputs: jnp.concatenate(inputs, node.attributes["axis"]),
}
