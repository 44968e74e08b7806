"""Accumulators: what each integer layer's holds, and what becomes of a sum that leaves its width.

In one are a layer's sums of products and, as hardware adds it there, an integer bias.
"""

import jax
import jax.numpy as jnp

from qflax.deploy.graph import Graph
from qflax.deploy.operations import SUMS
from qflax.deploy.ranges import Range

ACCUMULATORS = ("exact", "wrap", "saturate", "check")
MOVES = ("slice", "reshape", "transpose")  # What leaves a value in its accumulator.


def accumulated(graph: Graph, ranges: dict[str, Range]) -> dict[str, str]:
    """Values that are in an accumulator -> the layer's own output, its sums of products."""
    sums: dict[str, str] = {}
    for node in (node for node in graph.nodes if node.output in ranges):
        held = [name for name in node.inputs if name in sums]
        constants = [name for name in node.inputs if name in graph.constants]
        if node.operation in SUMS:
            sums[node.output] = node.output
        elif held and (node.operation in MOVES or (node.operation == "add" and constants)):
            sums[node.output] = sums[held[0]]
    return sums


def fitted(total: jax.Array, bits: int, accumulators: str) -> jax.Array:
    """What an accumulator of so many bits makes of sums, int32 or int64, which these types hold."""
    held = jnp.iinfo(total.dtype).bits
    if bits < held and accumulators == "wrap":
        return jnp.right_shift(jnp.left_shift(total, held - bits), held - bits)
    if bits < held and accumulators == "saturate":
        return jnp.clip(total, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return total
