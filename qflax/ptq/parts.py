"""The parts in which a network is reconstructed: layers, or blocks."""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from qflax.errors import require
from qflax.layers import Conv, Dense
from qflax.ptq.taps import record_calls
from qflax.ptq.wiring import Wiring
from qflax.quantizers import AccumulatorAware, Quantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What is reconstructed at once.

    Attributes:
      start: path of the module that gets the part's input.
      end: path of the module that returns its output.
      kernels: paths of the layers whose rounding is learned.
      activations: paths of the quantizers inside that take part.
      unquantized: paths of the modules whose own activations and outputs pass as they are.
    """

    start: str
    end: str
    kernels: tuple[str, ...]
    activations: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()


def layer_parts(model: nn.Module, reference: nn.Module, variables: Mapping, example: jax.Array) -> list[Part]:
    """Single layers, each with the norm and the activation function behind it (AdaRound, section 3.5)."""
    learnable = _learnable_kernels(model, variables, example)
    chains = Wiring(reference, variables, example).chains
    own = [chain for chain in chains if chain.layer in learnable]
    parts = []
    for chain in own:
        modules = tuple(path for path in (chain.layer, chain.norm, chain.activation) if path is not None)
        parts.append(Part(start=chain.layer, end=modules[-1], kernels=(chain.layer,), unquantized=modules))
    return parts


def block_parts(model: nn.Module, reference: nn.Module, variables: Mapping, example: jax.Array) -> list[Part]:
    """The modules that the network consists of, each with what alone its output passes through (BRECQ)."""
    learnable = _learnable_kernels(model, variables, example)
    wiring = Wiring(reference, variables, example)
    calls = record_calls(model, variables, example)
    quantizers = [c.path for c in calls if isinstance(c.module, Quantizer) and not c.lifted]
    quantizers = [path for path in dict.fromkeys(quantizers) if not path.endswith("/weights")]
    chains = {chain.layer: chain for chain in wiring.chains}
    parts = []
    for start in blocks(list(wiring.modules), learnable):
        inside = tuple(path for path in learnable if f"{path}/".startswith(f"{start}/"))
        behind = chains[start].behind if start in chains else ()
        own = [path for path in quantizers if path.startswith(f"{start}/")]
        own += [path for path in quantizers if path.rpartition("/")[0] in behind]
        end = behind[-1] if behind else start
        parts.append(Part(start=start, end=end, kernels=inside, activations=tuple(own)))
    return parts


def blocks(paths: Sequence[str], kernels: Sequence[str]) -> list[str]:
    """The outermost modules with kernels, below a module that holds all of them.

    Args:
      paths: of all modules.
      kernels: paths of layers.
    """
    prefix = ""
    while True:
        depth = prefix.count("/") + 1
        children = list(dict.fromkeys("/".join(k.split("/")[:depth]) for k in kernels))
        if len(children) != 1 or children[0] in kernels:
            return [path for path in paths if path in children]
        prefix = f"{children[0]}/"


def _learnable_kernels(model: nn.Module, variables: Mapping, example: jax.Array) -> list[str]:
    """Layers whose kernels are what their quantizers see, on a grid of their own, in the order of the
    network.
    """
    calls = [call for call in record_calls(model, variables, example) if not call.lifted]
    layers = {call.path for call in calls if isinstance(call.module, Conv | Dense)}
    weights = [call for call in calls if isinstance(call.module, Quantizer) and call.module.weights]
    paths = [
        path
        for call in weights
        if not isinstance(call.module.spec, AccumulatorAware)
        and (path := call.path.removesuffix("/weights")) in layers
    ]
    require(
        bool(paths),
        "learned rounding: no convolution or dense layer has weights on a grid of their own (kind uniform, "
        "minifloat or mixed_precision); leave it out of the recipe",
    )
    return list(dict.fromkeys(paths))
