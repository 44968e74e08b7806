"""Corrections of a quantized network from data: norm statistics and biases."""

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.layers.conv import Conv
from qflax.layers.cost import layer_costs
from qflax.layers.dense import Dense
from qflax.quantizers import QuantizedArray, value_of

_STATISTICS = "batch_stats"


def reestimate_norms(model: nn.Module, variables: Mapping, batches: Iterable[jax.Array]) -> dict:
    """Sets batch norms' running statistics to the mean of those of `batches`.

    Where a norm follows a layer this corrects the shift of the layer's outputs that quantization causes,
    and their spread (Sun et al. 2019, "Hybrid 8-bit floating point", section 4.2).

    Args:
      model: called with `train=True`; its norms must have momentum 0, so that they return a batch's own
        statistics.
      variables: its variables; without norms they come back as they are.
      batches: model inputs [batch, ...]; at least one.
    """
    if not variables.get(_STATISTICS):
        return dict(variables)

    @jax.jit
    def statistics_of(variables, batch):
        return model.apply(variables, batch, train=True, mutable=[_STATISTICS])[1][_STATISTICS]

    total, count = None, 0
    for batch in batches:
        new, count = statistics_of(variables, batch), count + 1
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {**variables, _STATISTICS: jax.tree.map(lambda x: x / count, total)}


def correct_biases(
    model: nn.Module,
    variables: Mapping,
    reference: nn.Module,
    reference_variables: Mapping,
    batches: Iterable[jax.Array],
) -> dict:
    """Changes biases so that each layer's mean outputs are those of the float network, channel by channel.

    Layer after layer, each behind corrected ones (Nagel et al. 2019, section 4.2, from data). Layers
    without a bias are left to `reestimate_norms`.

    Args:
      model: the quantized network, called with `train=False`.
      variables: its variables.
      reference: the float network, of the same layers.
      reference_variables: its variables.
      batches: model inputs [batch, ...]; at least one; passed over several times.
    """
    batches = list(batches)
    costs = layer_costs(model, variables, batches[0][:1], train=False)
    goal, means_of = _mean_outputs(reference)(reference_variables, batches), _mean_outputs(model)
    for path in (cost.path.split("/") for cost in costs if cost.biases):
        shift = _at(goal, path) - _at(means_of(variables, batches), path)
        bias = _at(variables["params"], path)["bias"] + shift
        variables = {**variables, "params": _replaced(variables["params"], [*path, "bias"], bias)}
    return dict(variables)


def _mean_outputs(model: nn.Module) -> Callable:
    """Function (variables, batches) -> tree of the mean outputs [features] of layers with a bias."""

    def has_bias(module, _):
        return isinstance(module, Conv | Dense) and module.use_bias

    @jax.jit
    def of_batch(variables, batch):
        options = {"capture_intermediates": has_bias, "mutable": ["intermediates"]}
        outputs = model.apply(variables, batch, train=False, **options)[1].get("intermediates", {})
        return jax.tree.map(_channel_means, outputs, is_leaf=lambda y: isinstance(y, QuantizedArray))

    def of_batches(variables, batches):
        results = [of_batch(variables, batch) for batch in batches]
        return jax.tree.map(lambda *means: sum(means) / len(means), *results)

    return of_batches


def _channel_means(y: jax.Array | QuantizedArray) -> jax.Array:
    return jnp.mean(value_of(y), tuple(range(value_of(y).ndim - 1)))


def _at(tree: Mapping, path: Sequence[str]) -> typing.Any:
    for name in path:
        tree = tree[name]
    return tree["__call__"][0] if "__call__" in tree else tree


def _replaced(tree: Mapping, path: Sequence[str], value: jax.Array) -> dict:
    if not path:
        return value
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
