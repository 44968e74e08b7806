"""Folding of batch norms into the layers before them.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.errors import require
from qflax.ptq.variables import leaf
from qflax.ptq.wiring import Wiring

_COLLECTIONS = ("params", "batch_stats")


def fold_norms(model: nn.Module, variables: Mapping, example: jax.Array) -> dict:
    """Weights of the same network without norms, whose layers have a bias instead.

    kernel * g and bias = beta + (bias - mean) g, with g = gamma / sqrt(variance + epsilon).

    Args:
      model: the float network with norms.
      variables: its variables.
      example: input [1, ...].

    Returns:
      `params` and `batch_stats` without the norms; other collections are left out.

    Raises:
      UserError: a norm follows no layer, or its layer's output goes elsewhere, too.
    """
    wiring = Wiring(model, variables, example)
    trees = {name: flatten_dict(variables.get(name, {}), sep="/") for name in _COLLECTIONS}
    layers = {chain.norm: chain.layer for chain in wiring.chains if chain.norm is not None}
    norms = [path for path, module in wiring.modules.items() if isinstance(module, nn.BatchNorm)]
    alone = [path for path in norms if path not in layers]
    require(
        not alone,
        f"{', '.join(alone[:3])}: a norm that cannot be folded, as it does not follow a convolution or dense "
        "layer of its own; keep the norms (config.norm='batch')",
    )
    for norm, layer in layers.items():
        own, statistics = leaf(variables["params"], norm), leaf(variables["batch_stats"], norm)
        gain = own.get("scale", 1.0) * jax.lax.rsqrt(statistics["var"] + wiring.modules[norm].epsilon)
        bias = trees["params"].get(f"{layer}/bias", 0.0)
        trees["params"][f"{layer}/kernel"] = trees["params"][f"{layer}/kernel"] * gain
        trees["params"][f"{layer}/bias"] = jnp.asarray(
            own.get("bias", 0.0) + (bias - statistics["mean"]) * gain
        )
    kept = {
        name: {path: x for path, x in tree.items() if path.rpartition("/")[0] not in layers}
        for name, tree in trees.items()
    }
    return {name: unflatten_dict(tree, sep="/") for name, tree in kept.items()}
