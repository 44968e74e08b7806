"""Which layer feeds which, found by tracing a model."""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from qflax.layers import Activation, AveragePool, Conv, Dense, MaxPool, Quantize
from qflax.ptq.taps import ModuleCall, record_calls

# What a float network passes channel by channel, which are its last axis.
_PASSING = (nn.BatchNorm, Activation, AveragePool, MaxPool, Quantize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """A layer with a kernel, and what alone its outputs pass through.

    Attributes:
      layer: path of the `Conv` or `Dense`.
      norm: path of the batch norm directly behind it, or None.
      activation: path of the activation layer behind these, or None.
      behind: paths of all modules that the outputs pass, before another layer or before where the array
        goes to several places.
      consumer: path of the layer that alone gets what comes out then, or None.
    """

    layer: str
    norm: str | None
    activation: str | None
    behind: tuple[str, ...]
    consumer: str | None

    @property
    def last(self) -> str:
        """Path of the last module behind the layer, or of the layer itself."""
        return (self.layer, *self.behind)[-1]


class Wiring:
    """The modules of a model and the arrays between them.

    An array that plain JAX operations read, too, is not seen to go there: what is built on a chain must
    hold for the whole network, and is tried on it where it changes several layers.

    Attributes:
      modules: path -> module, in the order in which they are called first.
      chains: of every `Conv` and `Dense`, in the order of the network; those called several times, or within
        a lifted transformation, have none, and other modules called several times end one.
    """

    def __init__(self, model: nn.Module, variables: Mapping, example: jax.Array):
        """Traces the model without quantizers, whose arrays keep their identity between layers.

        Args:
          model: a float network, called with `train=False`.
          variables: of it, real or abstract.
          example: input [batch, ...].
        """
        self._calls = record_calls(model, variables, example)
        self.modules = {call.path: call.module for call in self._calls}
        kernels = [call for call in self._calls if isinstance(call.module, Conv | Dense) and not call.lifted]
        self.chains = tuple(self._chain(call) for call in kernels if self._once(call))

    def _chain(self, call: ModuleCall) -> Chain:
        found = {nn.BatchNorm: None, Activation: None}
        layer, behind = call.path, []
        while True:
            consumers = self._consumers(call)
            following = consumers[0] if len(consumers) == 1 and self._once(consumers[0]) else None
            if following is None or not _passes(following):
                kernel = following is not None and isinstance(following.module, Conv | Dense)
                break
            kind = next((kind for kind in found if isinstance(following.module, kind)), None)
            if kind is not None:
                if found[kind] is not None or (kind is nn.BatchNorm and call.path != layer):
                    kernel = False
                    break
                found[kind] = following.path
            behind.append(following.path)
            call = following
        return Chain(
            layer=layer,
            norm=found[nn.BatchNorm],
            activation=found[Activation],
            behind=tuple(behind),
            consumer=following.path if kernel else None,
        )

    def _once(self, call: ModuleCall) -> bool:
        return sum(other.path == call.path for other in self._calls) == 1

    def _consumers(self, call: ModuleCall) -> Sequence[ModuleCall]:
        """The innermost modules that get what `call` returned, without those that hand it on as it is."""
        own = f"{call.path}/"
        users = [
            other
            for other in self._calls
            if call.output in other.inputs
            and other.output != call.output
            and other is not call
            and not other.path.startswith(own)
        ]
        return [user for user in users if not any(o.path.startswith(f"{user.path}/") for o in users)]


def _passes(call: ModuleCall) -> bool:
    """Whether each channel of what comes out is made of the same one of what goes in."""
    of_channels = not isinstance(call.module, nn.BatchNorm) or call.module.axis in (-1, call.ndim - 1)
    return isinstance(call.module, _PASSING) and of_channels
