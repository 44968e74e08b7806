"""Which constants are added to the sums of layers: accumulators hold them, too."""

import bisect

import numpy as np

from qflax.verify.extremes import IntegerLayer
from qflax.verify.grid import Grid

_DOUBT = 2.0**-23  # Relative, of a float32 product of integers and scales that is divided by these.


class Biases:
    """Numbers the output channels of all layers, and notes what is added to each of them.

    Constants are followed until something else happens to the sums. Where a channel has several, one after
    the other or for different places, it is as if an accumulator met the lowest of each in any order, and the
    highest.
    """

    def __init__(self):
        self._layers: list[IntegerLayer] = []
        self._firsts: list[int] = []
        self._count = 0

    def channels_of(self, layer: IntegerLayer) -> np.ndarray:
        """Numbers of a new layer's output channels."""
        self._layers.append(layer)
        self._firsts.append(self._count)
        self._count += layer.codes.shape[-1]
        return np.arange(self._firsts[-1], self._count)

    def take(self, sums: Grid, added: Grid, array: np.ndarray, output: int | None) -> None:
        """Counts a constant that is added to sums.

        Args:
          sums: has `channels`.
          added: of the constant, of the scale of the sums.
          array: the constant.
          output: number of the value that is the sums with the constant; None if it is not quite.
        """
        codes = array / added.scale
        doubt = 0 if added.plain else _DOUBT * np.abs(codes)
        low, high = np.rint(codes - doubt), np.rint(codes + doubt)
        channels, low, high = np.broadcast_arrays(sums.channels, low, high)
        known = channels >= 0
        if not known.any():
            return
        if output is not None and known.all():
            self._note(channels, output, sums.scale)
        channels, low, high = channels[known], low[known], high[known]
        first = int(channels.min())
        lowest, highest = np.zeros((2, int(channels.max()) - first + 1))
        np.minimum.at(lowest, channels - first, low)
        np.maximum.at(highest, channels - first, high)
        for i in np.flatnonzero(lowest - highest).tolist():
            layer, channel = self._owner(first + i)
            layer.bias_low[channel] += int(lowest[i])
            layer.bias_high[channel] += int(highest[i])

    def _note(self, channels: np.ndarray, output: int, scale: np.ndarray) -> None:
        """Of values that are one layer's, they are what its accumulator holds."""
        (layer, _), (last, _) = (self._owner(int(number)) for number in (channels.min(), channels.max()))
        if layer is last:
            layer.outputs[output] = scale

    def _owner(self, number: int) -> tuple[IntegerLayer, int]:
        """The layer and its channel."""
        index = bisect.bisect_right(self._firsts, number) - 1
        return self._layers[index], number - self._firsts[index]
