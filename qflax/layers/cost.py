"""What a layer costs: parameters, bits, operations. Layers report it, nothing recomputes it."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qflax.layers.accumulation import Accumulation

COST = "cost"  # Linen collection that layers sow a `LayerCost` into when it is mutable.


@flax.struct.dataclass
class LayerCost:
    """Costs of one layer for one example.

    The counts are static; the bits are values, so that learned widths can be penalised.

    Attributes:
      path: the layer's path, `/` between module names.
      kind: `conv`, `dense` or `activation`.
      roles: what rules may say about the layer.
      weights: elements of the kernel.
      biases: elements of the bias.
      macs: multiply-accumulate operations.
      activations: elements that an activation layer writes, or another one whose outputs are quantized.
      weight_bits, bias_bits, input_bits, activation_bits: bits per element, on average over channels; 32 is
        float, of a bias also an integer of that width.
      accumulation: for bounds on the accumulator; None where sums are not of integers.
    """

    path: str = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)
    roles: tuple[str, ...] = flax.struct.field(pytree_node=False)
    weights: int = flax.struct.field(pytree_node=False, default=0)
    biases: int = flax.struct.field(pytree_node=False, default=0)
    macs: int = flax.struct.field(pytree_node=False, default=0)
    activations: int = flax.struct.field(pytree_node=False, default=0)
    weight_bits: jax.Array | int = 32
    bias_bits: jax.Array | int = 32
    input_bits: jax.Array | int = 32
    activation_bits: jax.Array | int = 32
    accumulation: Accumulation | None = None

    @property
    def weight_bytes(self):
        """Bytes of kernel and bias."""
        return (self.weights * self.weight_bits + self.biases * self.bias_bits) / 8

    @property
    def activation_bytes(self):
        """Bytes of the layer's output for one example."""
        return self.activations * self.activation_bits / 8

    @property
    def bit_operations(self):
        """Multiply-accumulates times the bits of both operands."""
        return self.macs * self.weight_bits * self.input_bits


def report(module: nn.Module, **fields) -> None:
    """Sows the cost of `module` where the collection is mutable, but not among initial variables.

    A layer that is called several times computes and stores several times, but has its parameters once.
    """
    if module.is_initializing():
        return
    cost = LayerCost(path="/".join(module.path), **fields)
    module.sow(COST, "cost", cost, reduce_fn=_append, init_fn=tuple)


def _append(earlier: tuple[LayerCost, ...], cost: LayerCost) -> tuple[LayerCost, ...]:
    return (*earlier, cost.replace(weights=0, biases=0) if earlier else cost)


def sown_costs(state: Mapping) -> tuple[LayerCost, ...]:
    """The costs in a state that a forward pass with `COST` mutable returned, in the order of the network;
    of a repeated layer one for each repetition.
    """

    def walk(tree):
        for value in tree.values():
            if isinstance(value, tuple):
                for cost in value:
                    yield from _repetitions(cost)
            else:
                yield from walk(value)

    return tuple(walk(state.get(COST, {})))


def _repetitions(cost: LayerCost) -> Iterator[LayerCost]:
    """The costs that a repeated layer (`nn.scan`, `nn.vmap`) has sown stacked; of any other one its own."""
    for place in np.ndindex(jnp.shape(cost.input_bits)):
        yield jax.tree.map(lambda x, place=place: x[place] if place else x, cost)


def sizes(costs: Sequence[LayerCost]) -> dict[str, jax.Array]:
    """What size penalties are about, in KiB: all weights; all activations of an example; the largest."""
    activations = [cost.activation_bytes for cost in costs]
    return {
        "weight_kib": sum(cost.weight_bytes for cost in costs) / 1024,
        "activation_kib_sum": sum(activations) / 1024,
        "activation_kib_max": jnp.max(jnp.asarray(activations)) / 1024,
    }


def layer_costs(model: nn.Module, variables: Mapping, example: jax.Array, **call) -> tuple[LayerCost, ...]:
    """Costs of all layers of a model, in the order of the network.

    Args:
      model: a module built of qflax layers.
      variables: its variables, real or abstract (`jax.eval_shape`); with abstract ones the bits are too.
      example: input [1, ...]; its values do not matter.
      **call: arguments of the model, such as `train=False`.
    """
    return cost_function(model, example, **call)(variables)


def cost_function(model: nn.Module, example: jax.Array, **call) -> Callable[[Mapping], tuple[LayerCost, ...]]:
    """`layer_costs` as a function of the variables, which is compiled once."""

    def forward(variables):
        return sown_costs(model.apply(variables, example, mutable=[COST], **call)[1])

    compiled = jax.jit(forward)  # So that only what the bits depend on is computed.

    def costs_of(variables):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
            return jax.eval_shape(forward, variables)
        # As Python numbers: products of int32 would overflow.
        return jax.tree.map(lambda x: x.item() if x.ndim == 0 else x, jax.device_get(compiled(variables)))

    return costs_of
