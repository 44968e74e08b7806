"""The integer runner: executes a graph, such as of a packed file, on integers.

Codes are integers, products of codes are summed in int32, and floats appear in the rescaling of sums alone.
Where the weights prove that all sums stay below 2^24, a float32 unit adds the integers: that is exact, and on
a CPU several times faster (`benchmarks/serving.py`). Where sums could leave int32, all integers are int64, so
that none leaves its type unseen. Everything runs where JAX does.
"""

import contextlib
import functools
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qflax.deploy.accumulators import ACCUMULATORS, MOVES, accumulated, fitted
from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.operations import EXECUTE, SUMS
from qflax.deploy.ranges import EXACT_IN_FLOAT32, Range, integer_ranges
from qflax.deploy.rescaling import integer_only
from qflax.errors import choose, require
from qflax.numerics import IntegerFormat, width_of_extremes

RESCALINGS = ("float", "integer")

_WIDEST = 64  # Bits of JAX's integers.
_NONE = types.MappingProxyType({})


class IntegerRunner:
    """A compiled graph.

    Attributes:
      graph: what is executed.
      extremes: path of each integer layer -> least and largest sum so far, with an integer bias and without.
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
          accumulators: of sums with their integer biases. `exact` ones hold all; `wrap` keeps the last bits
            of each sum, in two's complement, as an accumulator of that width does; `saturate` makes of a
            final sum the nearest that the width holds; `check` raises where a partial sum could leave the
            width, whatever the order of additions.
          bits: width of all accumulators; None is what the weights were made for, else 32.
          rescaling: `float`, as in training, or `integer`, by multipliers and shifts (`deploy.rescaling`),
            for inputs of an integer type, from 0 to 255; few codes then differ by one.

        Raises:
          UserError: unknown choice, a width outside of 2 to 64, integers that 64 bits do not hold, or a graph
            that is not of integers.
        """
        choose("accumulators", accumulators, ACCUMULATORS)
        choose("rescaling", rescaling, RESCALINGS)
        require(
            bits is None or 2 <= bits <= _WIDEST, f"bits={bits!r}: an accumulator has 2 to {_WIDEST} bits"
        )
        self._of_bytes = rescaling == "integer"
        self._wide = self._of_bytes or _needs_int64(graph, integer_ranges(graph))
        self.graph = graph = integer_only(graph) if self._of_bytes else graph
        self.extremes: dict[str, tuple[int, int]] = {}
        self._widths = {
            node.output: bits or graph.constants[node.inputs[1]].accumulator_bits or 32
            for node in graph.nodes
            if node.operation in ("conv", "dense") and node.inputs[1] in graph.constants
        }
        self._accumulators = accumulators
        self._run = jax.jit(self._execute)

    def __call__(self, x: np.ndarray | jax.Array) -> jax.Array:
        """The output, float32 [batch, ...], for float32 or uint8 [batch, *shape]; adds to `extremes`."""
        require(
            not self._of_bytes or np.issubdtype(x.dtype, np.integer),
            f"rescaling='integer' is for images of whole numbers, and these are {x.dtype}; pass uint8",
        )
        require(
            tuple(x.shape[1:]) == self.graph.shape,
            f"an input of {list(x.shape[1:])} was given; the network takes {list(self.graph.shape)} of each "
            "example",
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


def _needs_int64(graph: Graph, ranges: dict[str, Range]) -> bool:
    """Whether int32 does not hold all integers of a graph.

    Raises:
      UserError: int64 does not hold them, either.
    """
    widest = 0
    for node in (node for node in graph.nodes if node.output in ranges):
        ends = [ranges[name] for name in (node.output, *node.inputs) if name in ranges]
        bits = max(width_of_extremes(min(low, 0), max(high, 0)) for low, high in ends)
        require(
            bits <= _WIDEST,
            f"{node.layer or node.output}: its integers need {bits} bits, and there are {_WIDEST}; use "
            "narrower weights or inputs",
        )
        widest = max(widest, bits)
    return widest > 32


def enough_bits(graph: Graph) -> contextlib.AbstractContextManager:
    """In which a graph is traced and executed: JAX has int64 only where it is told to."""
    return jax.enable_x64(_needs_int64(graph, integer_ranges(graph)) or jax.config.jax_enable_x64)


def execute(
    graph: Graph, x: jax.Array, *, accumulators: str = "exact", widths: Mapping[str, int] = _NONE
) -> tuple[dict[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
    """All values of a graph by name, and by its output's name each integer layer's least and largest sum.

    Integers are all int32 or all int64, other values float32. In `check` mode the sums are partial ones in
    the worst order.
    """
    ranges, extremes = integer_ranges(graph), {}
    integer = jnp.int64 if _needs_int64(graph, ranges) else jnp.int32
    layers, held = accumulated(graph, ranges), {}
    values = {graph.input: x, **{name: _stored(constant) for name, constant in graph.constants.items()}}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        if node.output in layers:
            layer = layers[node.output]
            if node.operation in SUMS:
                sums = functools.partial(_integer_sums, node, ends=ranges[node.output], dtype=integer)
                found = _summed(sums, *inputs, worst=accumulators == "check")
            else:
                found = _passed_on(node, [held.get(name, values[name]) for name in node.inputs])
            held[node.output] = total, low, high = found
            least, most = extremes.get(layer, (0, 0))
            extremes[layer] = jnp.min(low, initial=least), jnp.max(high, initial=most)
            values[node.output] = fitted(total, widths.get(layer, _WIDEST), accumulators)
        else:
            dtype = integer if node.output in ranges else jnp.float32
            if node.operation not in ("quantize", "rescale"):
                inputs = [value.astype(dtype) for value in inputs]
            values[node.output] = EXECUTE[node.operation](node, *inputs).astype(dtype)
    return values, extremes


def _stored(constant: Constant) -> jax.Array:
    """Integer weights in the smallest type that holds them, all else in float32."""
    fmt = constant.format
    if not isinstance(fmt, IntegerFormat):
        return jnp.asarray(constant.array)
    dtypes = (jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32)
    limits = ((jnp.iinfo(dtype), dtype) for dtype in dtypes)
    dtype = next(d for info, d in limits if info.min <= fmt.lowest and fmt.highest <= info.max)
    return jnp.asarray(constant.array, dtype)


def _integer_sums(node: Node, x: jax.Array, kernel: jax.Array, *, ends: Range, dtype) -> jax.Array:
    """Sums of products of integers, of the type `dtype`, which lie between `ends`."""
    exact = jnp.float32 if max(map(abs, ends)) < EXACT_IN_FLOAT32 else dtype
    return SUMS[node.operation](node, x.astype(exact), kernel.astype(exact)).astype(dtype)


def _summed(sums, x: jax.Array, kernel: jax.Array, *, worst: bool) -> tuple[jax.Array, ...]:
    """The sums, and the least and greatest on the way: in the worst order those of one sign come first."""
    total = sums(x, kernel)
    if not worst:
        return total, total, total
    above, below = (jnp.maximum(x, 0), jnp.maximum(kernel, 0)), (jnp.minimum(x, 0), jnp.minimum(kernel, 0))
    lowest = sums(above[0], below[1]) + sums(below[0], above[1])
    return total, lowest, sums(above[0], above[1]) + sums(below[0], below[1])


def _passed_on(node: Node, inputs: list) -> tuple[jax.Array, ...]:
    """The same behind an integer bias, which may be added first or last, or in another shape."""
    if node.operation in MOVES:
        return tuple(EXECUTE[node.operation](node, sums) for sums in inputs[0])
    (total, low, high), bias = inputs if isinstance(inputs[0], tuple) else inputs[::-1]
    bias = bias.astype(total.dtype)
    return total + bias, low + jnp.minimum(bias, 0), high + jnp.maximum(bias, 0)
