"""StableHLO: the served program for JAX's own runtimes."""

import jax
import jax.numpy as jnp
from jax import export

from qflax.deploy.graph import Graph
from qflax.deploy.runner import enough_bits, execute

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(graph: Graph) -> bytes:
    """The serialized program, weights included, of any batch size; `jax.export.deserialize` reads it.

    Integer weights stay integers in it; it maps float32 [batch, *shape] to the float32 output.
    """
    (batch,) = export.symbolic_shape("batch")

    def serve(x):
        return execute(graph, x)[0][graph.output].astype(jnp.float32)

    with enough_bits(graph):
        served = export.export(jax.jit(serve), platforms=PLATFORMS)
        return bytes(served(jax.ShapeDtypeStruct((batch, *graph.shape), jnp.float32)).serialize())
