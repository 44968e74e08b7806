"""A walk through a network that is changed layer by layer: what lies behind is computed no more."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax

from qflax.ptq.parts import blocks
from qflax.ptq.taps import record_calls, run

_MOST_BYTES = 2**32  # Of arrays that are held.


class Walk:
    """A place in a network whose layers are changed one by one, each for what it gets behind changed ones.

    To run the whole network for every layer costs the square of its depth. Here the inputs of the block that
    holds the layer are kept, and what follows is computed from them. They stand in for what the network would
    compute again from its images, which it gets, too: nothing is assumed of how its blocks are connected.

    Attributes:
      modules: paths of all modules, in the order in which they are called first.
    """

    def __init__(
        self, model: nn.Module, variables: Mapping, batches: Iterable[jax.Array], layers: Sequence[str]
    ):
        """Finds the blocks.

        Args:
          model: called with `train=False`.
          variables: its variables, real or abstract.
          batches: its inputs [batch, ...], all of one shape; at least one; passed over several times.
          layers: paths of the layers that are changed, in the order of the network.
        """
        self._model, self._batches = model, batches
        self._start, self._given = None, [{} for _ in batches]
        calls = record_calls(model, variables, next(iter(batches))[:1])
        times = collections.Counter(call.path for call in calls)
        self.modules = tuple(times)
        order = {path: i for i, path in enumerate(self.modules)}
        known = {c.path for c in calls if times[c.path] == 1 and c.array_first and not c.lifted}
        self._starts = dict.fromkeys(layers)
        for start in blocks(self.modules, layers):
            own = [layer for layer in layers if f"{layer}/".startswith(f"{start}/")]
            # Its input stays as it is if none of its layers is called before it, by another method.
            if start in known and all(order[layer] >= order[start] for layer in own):
                self._starts.update(dict.fromkeys(own, start))

    def block_of(self, layer: str) -> tuple[str, ...]:
        """The layers that are run to from the same place, this one among them."""
        return tuple(other for other, start in self._starts.items() if start == self._starts[layer])

    def to(self, layer: str, variables: Mapping) -> Iterator[tuple[jax.Array, dict[str, jax.Array]]]:
        """Goes to the block of a layer, and yields for each batch `x` and `given` of `taps.run`.

        Args:
          layer: the next one, or the same again.
          variables: as changed so far; what lies before the block has to be as it will stay.
        """
        start = self._starts[layer]
        if start not in (None, self._start):
            self._go(start, variables)
        return zip(self._batches, self._given, strict=True)

    def _go(self, start: str, variables: Mapping) -> None:
        @jax.jit
        def inputs_of(variables, x, given):
            return run(self._model, variables, x, given=given, inputs=[start])[0]

        first = next(iter(self._batches)), self._given[0]
        shapes = jax.tree.leaves(jax.eval_shape(inputs_of, variables, *first))
        if len(self._given) * sum(shape.size * shape.dtype.itemsize for shape in shapes) > _MOST_BYTES:
            return
        for i, x in enumerate(self._batches):
            self._given[i] = inputs_of(variables, x, self._given[i])  # The earlier one is let go.
        self._start = start
