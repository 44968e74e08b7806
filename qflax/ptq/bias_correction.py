"""Bias correction: quantization shall not shift the mean output of any channel.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), section 4.2
and appendix D.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.errors import require
from qflax.layers import AveragePool, Conv, Dense
from qflax.ptq.taps import apply_with_hooks, run
from qflax.ptq.variables import changed, leaf, norm_of
from qflax.ptq.walk import Walk
from qflax.ptq.wiring import Chain, Wiring
from qflax.quantizers import value_of


def correct_biases(
    model: nn.Module,
    variables: Mapping,
    reference: nn.Module,
    reference_variables: Mapping,
    batches: Iterable[jax.Array],
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """Changes biases so that each layer's mean outputs are those of the float network, channel by channel.

    From data, layer after layer, each behind corrected ones (appendix D). Where a layer has no bias but a
    batch norm, that one's running mean is changed; where it has neither, it is left as it is. So are layers
    that are called several times, within a lifted transformation (`nn.remat`, `nn.scan`), or that are
    neither `Conv` nor `Dense`.

    Args:
      model: the quantized network, called with `train=False`.
      variables: its variables.
      reference: the float network, of the same layers.
      reference_variables: its variables.
      batches: model inputs [batch, ...]; at least one; passed over several times. Of all of them what one
        block of the network gets is held in memory, up to 4 GiB; beyond, more is computed again.
      progress: told of the quantized layers that are left alone.
    """
    example = next(iter(batches))[:1]
    chains = _correctable(Wiring(reference, reference_variables, example).chains, variables)
    paths = [chain.layer for chain in chains]
    walk = Walk(model, variables, batches, paths)
    layers = [path.removesuffix("/weights") for path in walk.modules if path.endswith("/weights")]
    others = [path for path in layers if path not in paths]
    if others:
        progress(f"bias correction leaves alone {', '.join(others)}")
    if not paths:
        return dict(variables)
    goal = _mean(_mean_outputs(reference, paths), reference_variables, ((x, {}) for x in batches))
    means_of = functools.cache(functools.partial(_mean_outputs, model))
    for chain in chains:
        function = means_of(walk.block_of(chain.layer))
        means = _mean(function, variables, walk.to(chain.layer, variables))
        variables = _without_shift(variables, chain, means[chain.layer] - goal[chain.layer])
    return dict(variables)


def correct_biases_analytically(
    model: nn.Module,
    variables: Mapping,
    reference: nn.Module,
    reference_variables: Mapping,
    example: jax.Array,
) -> dict:
    """The same without data, for what the rounding of weights shifts (section 4.2.1).

    An input that comes through batch norm and ReLU counts as a normal distribution, clipped at zero, of the
    norm's mean and spread (eq. 19). Layers with other inputs are left as they are, and convolutions with a
    mask or a dilated input.

    Args:
      model, variables, reference, reference_variables: see `correct_biases`.
      example: any input [1, ...].

    Raises:
      UserError: there is no layer behind a norm.
    """
    wiring = Wiring(reference, reference_variables, example)
    chains = {chain.layer: chain for chain in _correctable(wiring.chains, variables)}
    sources = [
        c
        for c in wiring.chains
        if c.norm is not None
        and c.consumer in chains
        and _keeps_mean(c, wiring)
        and _uses_all_weights(wiring.modules[c.consumer])
    ]
    require(
        bool(sources),
        "analytic bias correction: no layer gets what comes through a batch norm; use 'bias_correction', "
        "which takes the means from data",
    )
    kernels = _kernels(model, variables, [c.consumer for c in sources], example)
    for source in sources:
        layer = source.consumer
        error = kernels[layer] - leaf(reference_variables["params"], layer)["kernel"]
        groups = getattr(wiring.modules[layer], "feature_group_count", 1)
        mean = _mean_input(source, reference_variables)
        variables = _without_shift(variables, chains[layer], _response(error, mean, groups))
    return dict(variables)


def _correctable(chains: Sequence[Chain], variables: Mapping) -> list[Chain]:
    """Those whose mean output can be moved."""
    return [c for c in chains if c.norm is not None or "bias" in leaf(variables["params"], c.layer)]


def _without_shift(variables: Mapping, chain: Chain, shift: jax.Array) -> dict:
    if "bias" in leaf(variables["params"], chain.layer):
        return changed(variables, "params", chain.layer, bias=lambda bias: bias - shift)
    return changed(variables, "batch_stats", chain.norm, mean=lambda mean: mean + shift)


def _mean_outputs(model: nn.Module, paths: Sequence[str]) -> Callable:
    """Function (variables, batch, given) -> mean outputs [features] by path, see `run`."""

    @jax.jit
    def of_batch(variables, batch, given):
        outputs = run(model, variables, batch, given=given, outputs=paths)[1]
        return {path: jnp.mean(jnp.float32(y), tuple(range(y.ndim - 1))) for path, y in outputs.items()}

    return of_batch


def _mean(function: Callable, variables: Mapping, places: Iterable[tuple[jax.Array, Mapping]]) -> dict:
    """Mean over batches of what it returns."""
    results = [function(variables, batch, given) for batch, given in places]
    return jax.tree.map(lambda *means: sum(means) / len(means), *results)


def _keeps_mean(chain: Chain, wiring: Wiring) -> bool:
    """Whether the mean that the next layer gets follows from the norm, by way of ReLU and averages alone."""
    activation = chain.activation
    first = [path for path in (chain.norm, activation) if path is not None]
    known = activation is None or wiring.modules[activation].function is nn.relu
    pools = chain.behind[len(first) :]
    return (
        known
        and list(chain.behind[: len(first)]) == first
        and all(isinstance(wiring.modules[path], AveragePool) for path in pools)
    )


def _uses_all_weights(layer: Conv | Dense) -> bool:
    """Whether every output, but at borders, is of all weights."""
    dilation = getattr(layer, "input_dilation", None) or 1
    return getattr(layer, "mask", None) is None and bool(np.all(np.equal(dilation, 1)))


def _mean_input(chain: Chain, variables: Mapping) -> jax.Array:
    """Of a normal distribution with the norm's mean and spread, clipped by a ReLU (eq. 19)."""
    scale, mean = norm_of(variables, chain.norm)
    spread = jnp.maximum(jnp.abs(scale), 1e-12)
    if chain.activation is None:
        return mean
    normal = jax.scipy.stats.norm
    return spread * normal.pdf(mean / spread) + mean * normal.cdf(mean / spread)


def _kernels(model: nn.Module, variables: Mapping, paths: Sequence[str], example: jax.Array) -> dict:
    """The quantized kernels, as the layers use them."""

    @jax.jit
    def function(variables):
        found = {path: leaf(variables["params"], path)["kernel"] for path in paths}

        def hook_of(path):
            def hook(call, kernel, *rest):
                quantized = call(kernel, *rest)
                found[path] = value_of(quantized)
                return quantized

            return hook

        hooks = {f"{path}/weights": hook_of(path) for path in paths}
        apply_with_hooks(model, variables, example, hooks, train=False)
        return found

    return function(variables)


def _response(kernel: jax.Array, mean: jax.Array, groups: int) -> jax.Array:
    """What a kernel makes of inputs that are everywhere `mean` [in]: [features]."""
    taps = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)  # [in / groups, features]
    parts = taps.reshape(len(taps), groups, -1)
    return jnp.einsum("igf,gi->gf", parts, mean.reshape(groups, -1)).reshape(-1)
