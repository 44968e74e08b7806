"""Cross-layer equalization: channels between two layers get like ranges.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), section
4.1.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.errors import require
from qflax.ptq.taps import run
from qflax.ptq.variables import changed, leaf, norm_of
from qflax.ptq.wiring import Chain, Wiring
from qflax.quantizers.statistics import SMALLEST_RANGE

_SWEEPS = 20
_CONVERGED = 1e-3  # Of the largest change of a channel's scale, as a natural logarithm.


def equalize(model: nn.Module, variables: Mapping, batch: jax.Array) -> dict:
    """The same network with the ranges of both kernels equal in every channel between two layers.

    With ranges r1 of what a layer (with its norm) makes and r2 of what the next one does with it, the channel
    is divided by s = sqrt(r1 / r2) in the one and multiplied by it in the other (eq. 11), over and over until
    nothing changes. What lies between the two does not become larger by it than the largest channel was: s is
    not below the channel's part of that. (The paper has biases that have become large absorbed by the next
    layer, section 4.1.3, which is not exact at an image's border.) ReLUs and pooling between them pass the
    factor on; pairs between which anything else happens are left as they are, and those whose norm has no
    scale.

    Args:
      model: the float network, called with `train=False`.
      variables: its variables.
      batch: real inputs [batch, ...], on which every pair is tried.

    Raises:
      UserError: there is no such pair of layers.
    """
    wiring = Wiring(model, variables, batch[:1])
    pairs = [chain for chain in wiring.chains if chain.consumer is not None]
    pairs = [pair for pair in pairs if pair.norm is None or wiring.modules[pair.norm].use_scale]
    pairs = _passing(model, variables, batch, pairs, wiring)
    require(
        bool(pairs),
        "equalization: no two layers follow each other with nothing but norm, ReLU and pooling between "
        "them; leave it out of the recipe",
    )
    sizes = _sizes(model, variables, batch, pairs)
    limits = {path: jnp.max(size) for path, size in sizes.items()}
    for _ in range(_SWEEPS):
        largest = 0.0
        for pair in pairs:
            least = sizes[pair.layer] / jnp.maximum(limits[pair.layer], SMALLEST_RANGE)
            factor = jnp.maximum(_factor(variables, pair, wiring), least)
            sizes[pair.layer] /= factor
            variables = _scaled(variables, pair, factor, wiring)
            largest = max(largest, float(jnp.max(jnp.abs(jnp.log(factor)))))
        if largest < _CONVERGED:
            break
    return dict(variables)


def _passing(model, variables, batch, pairs, wiring) -> list[Chain]:
    """Pairs for which a factor, moved from one layer to the other, leaves the outputs as they were."""
    outputs = jax.jit(lambda variables: model.apply(variables, batch, train=False))
    expected, kept = np.asarray(outputs(variables)), []
    tolerance = 1e-3 * max(float(np.max(np.abs(expected))), 1e-6)
    rng = np.random.default_rng(0)
    for pair in pairs:
        channels = leaf(variables["params"], pair.layer)["kernel"].shape[-1]
        factor = jnp.asarray(np.exp2(rng.integers(-2, 3, channels)), jnp.float32)
        found = np.asarray(outputs(_scaled(variables, pair, factor, wiring)))
        if np.max(np.abs(found - expected)) <= tolerance:
            kept.append(pair)
    return kept


def _sizes(model, variables, batch, pairs) -> dict[str, jax.Array]:
    """The largest magnitude of every channel between two layers [channels], by the path of the first one."""
    ends = {pair.layer: pair.norm or pair.layer for pair in pairs}

    @jax.jit
    def of(variables, batch):
        outputs = run(model, variables, batch, outputs=list(ends.values()))[1]
        return {path: jnp.max(jnp.abs(y), tuple(range(y.ndim - 1))) for path, y in outputs.items()}

    largest = of(variables, batch)
    return {layer: largest[end] for layer, end in ends.items()}


def _factor(variables: Mapping, pair: Chain, wiring: Wiring) -> jax.Array:
    """s [channels]; 1 where one of the ranges is empty."""
    kernel = leaf(variables["params"], pair.layer)["kernel"]
    first = jnp.max(jnp.abs(kernel), tuple(range(kernel.ndim - 1)))
    if pair.norm is not None:
        variance = leaf(variables["batch_stats"], pair.norm)["var"] + wiring.modules[pair.norm].epsilon
        first *= jnp.abs(norm_of(variables, pair.norm)[0]) * jax.lax.rsqrt(variance)
    kernel = _by_input(leaf(variables["params"], pair.consumer)["kernel"], pair, wiring)
    second = jnp.max(jnp.abs(kernel), (0, 3)).T.reshape(-1)
    both = (first > 0) & (second > 0)
    return jnp.sqrt(jnp.where(both, first, 1.0) / jnp.where(both, second, 1.0))


def _scaled(variables: Mapping, pair: Chain, factor: jax.Array, wiring: Wiring) -> dict:
    """Divides the channels in the first layer and multiplies them in the second one."""
    if pair.norm is not None:
        where, names = pair.norm, ("scale", "bias")
    else:
        where, names = pair.layer, ("kernel", "bias")
    names = [name for name in names if name in leaf(variables["params"], where)]
    variables = changed(variables, "params", where, **dict.fromkeys(names, lambda x: x / factor))

    def multiplied(kernel):
        parts = _by_input(kernel, pair, wiring)
        return (parts * factor.reshape(parts.shape[2], -1).T[:, :, None]).reshape(kernel.shape)

    return changed(variables, "params", pair.consumer, kernel=multiplied)


def _by_input(kernel: jax.Array, pair: Chain, wiring: Wiring) -> jax.Array:
    """[places, in / groups, groups, features / groups]."""
    groups = getattr(wiring.modules[pair.consumer], "feature_group_count", 1)
    return kernel.reshape(-1, kernel.shape[-2], groups, kernel.shape[-1] // groups)
