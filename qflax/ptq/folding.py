"""Folding of batch norms into the layers before them.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2.
"""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.errors import require
from qflax.numerics import full_precision
from qflax.ptq.taps import apply_with_hooks
from qflax.ptq.wiring import Wiring

_COLLECTIONS = ("params", "batch_stats")
_SAME = 1e-3  # Of the largest output: kernels times gains are rounded, and so are all sums of theirs.


@full_precision()
def fold_norms(model: nn.Module, variables: Mapping, example: jax.Array) -> dict:
    """Weights of the same network without norms, whose layers have a bias instead.

    kernel * g and bias = beta + (bias - mean) g, with g = gamma / sqrt(variance + epsilon).

    Args:
      model: the float network with norms.
      variables: its variables.
      example: input [1, ...], on which the two networks are compared; not of zeros.

    Returns:
      `params` and `batch_stats` without the norms; other collections are left out.

    Raises:
      UserError: a norm follows no layer, or its layer's output goes elsewhere, too.
    """
    wiring = Wiring(model, variables, example)
    trees = {name: flatten_dict(variables.get(name, {}), sep="/") for name in _COLLECTIONS}
    layers = {chain.norm: chain.layer for chain in wiring.chains if chain.norm is not None}
    norms = [path for path, module in wiring.modules.items() if isinstance(module, nn.BatchNorm)]
    _require_foldable([path for path in norms if path not in layers])
    params, statistics = trees["params"], trees["batch_stats"]
    folded = {}
    for norm, layer in layers.items():
        gain = jax.lax.rsqrt(statistics[f"{norm}/var"] + wiring.modules[norm].epsilon)
        gain *= params.get(f"{norm}/scale", 1.0)
        bias = params.get(f"{layer}/bias", 0.0) - statistics[f"{norm}/mean"]
        folded[f"{layer}/kernel"] = params[f"{layer}/kernel"] * gain
        folded[f"{layer}/bias"] = params.get(f"{norm}/bias", 0.0) + bias * gain
    _require_foldable(_changing(model, trees, folded, layers, example))
    kept = {
        name: {path: x for path, x in tree.items() if path.rpartition("/")[0] not in layers}
        for name, tree in {**trees, "params": {**params, **folded}}.items()
    }
    return {name: unflatten_dict(tree, sep="/") for name, tree in kept.items()}


def _require_foldable(others: Sequence[str]) -> None:
    require(
        not others,
        f"{', '.join(others[:3])}: a norm that cannot be folded, as it does not follow a convolution or "
        "dense layer of its own; keep the norms (config.norm='batch')",
    )


def _changing(
    model: nn.Module,
    trees: Mapping[str, Mapping],
    folded: Mapping[str, jax.Array],
    layers: Mapping[str, str],
    example: jax.Array,
) -> list[str]:
    """Norms without which the outputs are others: plain JAX operations read what goes into them, too."""
    params = trees["params"]

    @jax.jit
    def outputs(chosen):
        own, hooks = dict(params), {}
        for i, (norm, layer) in enumerate(layers.items()):
            pick = functools.partial(jnp.where, chosen[i])
            hooks[norm] = lambda call, x, *rest, pick=pick: pick(x, call(x, *rest))
            for path in (f"{layer}/kernel", f"{layer}/bias"):
                if path in params:
                    own[path] = pick(folded[path], params[path])
                else:
                    added = pick(folded[path], 0.0)
                    hooks[layer] = lambda call, x, added=added: call(x) + added
        variables = {"batch_stats": trees["batch_stats"], "params": own}
        variables = {name: unflatten_dict(tree, sep="/") for name, tree in variables.items()}
        return apply_with_hooks(model, variables, example, hooks, train=False)

    none = np.zeros(len(layers), bool)
    expected = np.asarray(outputs(none))
    tolerance = _SAME * max(float(np.max(np.abs(expected))), 1e-6)

    def same(chosen):
        return bool(np.max(np.abs(np.asarray(outputs(chosen)) - expected)) <= tolerance)

    if same(~none):
        return []
    alone = [norm for i, norm in enumerate(layers) if not same(np.arange(len(layers)) == i)]
    return alone or list(layers)
