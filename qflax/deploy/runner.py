"""The integer runner: executes a graph, such as of a packed file, on integers.

Codes are integers, products of codes are summed in int32, and floats appear in the rescaling of sums alone.
Where the weights prove that all sums stay below 2^24, a float32 unit adds the integers: that is exact, and on
a CPU several times faster (`benchmarks/serving.py`). Everything runs where JAX does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.operations import EXECUTE, SUMS
from qflax.deploy.ranges import EXACT_IN_FLOAT32, integer_ranges
from qflax.deploy.rescaling import integer_only
from qflax.errors import choose, require
from qflax.numerics import IntegerFormat

ACCUMULATORS = ("exact", "wrap", "check")
RESCALINGS = ("float", "integer")


class IntegerRunner:
    """A compiled graph.

    Attributes:
      graph: what is executed.
      extremes: path of each integer layer -> least and largest sum so far.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        accumulators: str = "exact",
        bits: int | None = None,
        rescaling: str = "float",
    ):
        """Compiles at the first call.

        Args:
          graph: see `deploy.lower`, `packed.load`.
          accumulators: `exact` are int32; `wrap` keeps the last bits of each sum, in two's complement, as an
            accumulator of that width does; `check` raises where a partial sum could leave the width,
            whatever the order of additions.
          bits: width of all accumulators; None is what the weights were made for, else 32.
          rescaling: `float`, as in training, or `integer`, by multipliers and shifts (`deploy.rescaling`),
            for inputs of an integer type, from 0 to 255; few codes then differ by one.

        Raises:
          UserError: unknown choice, a width outside of 2 to 32, or a graph that is not of integers.
        """
        choose("accumulators", accumulators, ACCUMULATORS)
        choose("rescaling", rescaling, RESCALINGS)
        require(bits is None or 2 <= bits <= 32, f"bits={bits!r}: an accumulator has 2 to 32 bits")
        self._wide = rescaling == "integer"
        self.graph = graph = integer_only(graph) if self._wide else graph
        self.extremes: dict[str, tuple[int, int]] = {}
        self._widths = {
            node.output: bits or graph.constants[node.inputs[1]].accumulator_bits or 32
            for node in graph.nodes
            if node.operation in ("conv", "dense") and node.inputs[1] in graph.constants
        }
        self._accumulators = accumulators
        self._run = jax.jit(self._execute)

    def __call__(self, x: np.ndarray | jax.Array) -> jax.Array:
        """The output for float32 or uint8 [batch, *shape]; adds to `extremes`."""
        require(
            not self._wide or np.issubdtype(x.dtype, np.integer),
            f"rescaling='integer' is for images of whole numbers, and these are {x.dtype}; pass uint8",
        )
        with jax.enable_x64(self._wide or jax.config.jax_enable_x64):
            y, extremes = self._run(jnp.asarray(x, jnp.float32))
        seen = jax.device_get(extremes)
        for node in (node for node in self.graph.nodes if node.output in seen):
            low, high = map(int, seen[node.output])
            layer, width = node.layer or node.output, self._widths[node.output]
            limit = 2 ** (width - 1)
            require(
                self._accumulators != "check" or (-limit <= low and high < limit),
                f"{layer}: sums from {low} to {high} leave an accumulator of {width} bits",
            )
            old = self.extremes.get(layer, (low, high))
            self.extremes[layer] = (min(old[0], low), max(old[1], high))
        return y

    def _execute(self, x: jax.Array) -> tuple[jax.Array, dict]:
        values, extremes = execute(self.graph, x, accumulators=self._accumulators, widths=self._widths)
        return values[self.graph.output].astype(jnp.float32), extremes


def execute(
    graph: Graph, x: jax.Array, *, accumulators: str = "exact", widths: dict[str, int] | None = None
) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """All values of a graph by name, and by its output's name each integer layer's least and largest sum.

    Integers are int32, other values float32. In `check` mode the sums are partial ones in the worst order.
    """
    ranges, extremes = integer_ranges(graph), {}
    values = {graph.input: x, **{name: _stored(constant) for name, constant in graph.constants.items()}}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.operation in ("conv", "dense") and node.output in ranges:
            sums = functools.partial(_integer_sums, node, bound=max(map(abs, ranges[node.output])))
            total = sums(*inputs)
            lowest, highest = _partial_sums(sums, *inputs) if accumulators == "check" else (total, total)
            extremes[node.output] = jnp.min(lowest, initial=0), jnp.max(highest, initial=0)
            if accumulators == "wrap":
                dropped = 32 - widths[node.output]
                total = jnp.right_shift(jnp.left_shift(total, dropped), dropped)
            values[node.output] = total
        else:
            dtype = jnp.int32 if node.output in ranges else jnp.float32
            if node.operation not in ("quantize", "rescale"):
                inputs = [value.astype(dtype) for value in inputs]
            values[node.output] = EXECUTE[node.operation](node, *inputs).astype(dtype)
    return values, extremes


def _stored(constant: Constant) -> jax.Array:
    """Integer weights in the smallest type that holds them, all else in float32."""
    fmt = constant.format
    if not isinstance(fmt, IntegerFormat):
        return jnp.asarray(constant.array)
    dtypes = (jnp.int8, jnp.uint8, jnp.int16, jnp.int32)
    limits = ((jnp.iinfo(dtype), dtype) for dtype in dtypes)
    dtype = next(d for info, d in limits if info.min <= fmt.lowest and fmt.highest <= info.max)
    return jnp.asarray(constant.array, dtype)


def _integer_sums(node: Node, x: jax.Array, kernel: jax.Array, *, bound: int) -> jax.Array:
    """int32 sums of products of integers, of at most `bound`."""
    dtype = jnp.float32 if bound < EXACT_IN_FLOAT32 else jnp.int32
    return SUMS[node.operation](node, x.astype(dtype), kernel.astype(dtype)).astype(jnp.int32)


def _partial_sums(sums, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of the negative and of the positive products alone."""
    above, below = (jnp.maximum(x, 0), jnp.maximum(kernel, 0)), (jnp.minimum(x, 0), jnp.minimum(kernel, 0))
    highest = sums(above[0], above[1]) + sums(below[0], below[1])
    return sums(above[0], below[1]) + sums(below[0], above[1]), highest
