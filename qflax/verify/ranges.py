"""Which values of a network are integers behind a scale, in which range, and which layers sum them up."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from qflax.errors import require
from qflax.verify.executor import ELEMENTARY, EXACT_FLOAT32
from qflax.verify.extremes import IntegerLayer
from qflax.verify.formats import Format, IntegerFormat
from qflax.verify.network import Network, Node

_LARGEST = 2**62  # Integers that int64 holds, with a bit to spare.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Values that are `scale` times integers.

    Attributes:
      low, high: least and greatest integer.
      scale: positive float64, a scalar or an array that broadcasts against the values, of as many axes.
      bits: of the integers where a quantizer made them, else None.
      layer: the layer whose sums these are, before anything but a bias was added, and the axis of its output
        channels; else None.
    """

    low: int
    high: int
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.float64(1))
    bits: int | None = None
    layer: tuple[IntegerLayer, int] | None = None

    @property
    def uniform(self) -> bool:
        """Whether there is one scale for all values."""
        return self.scale.size == 1

    @property
    def exact(self) -> bool:
        """Whether float32 holds all of the values, being integers."""
        return bool(np.all(self.scale == 1)) and max(-self.low, self.high) <= EXACT_FLOAT32

    def plain(self, low: int, high: int) -> "Grid":
        """Values that were made of these, on the same grid; without what only these are."""
        return Grid(low=low, high=high, scale=self.scale)


class Analysis:
    """Follows the integers through a network.

    Attributes:
      grids: number of a value -> its grid, where it has one.
      layers: convolutions and dense layers of integers.
      float_layers: the others.
      inexact: nodes whose last bit depends on who executes them: sums of what is not integers, or of more
        than float32 holds, and elementary functions.
    """

    def __init__(self, network: Network):
        self.network = network
        self.grids: dict[int, Grid] = {}
        self.layers: list[IntegerLayer] = []
        self.float_layers: list[Node] = []
        self.inexact: list[Node] = []
        for number, fmt in network.constants.items():
            self._set(number, _constant_grid(network.fixed[number], fmt))
        for node in network.nodes:
            self._set(node.output, getattr(self, f"_{node.operation}", self._nothing)(node))

    def _set(self, number: int, grid: Grid | None) -> None:
        if grid is None or max(-grid.low, grid.high) > _LARGEST:
            return
        if np.all((grid.scale > 0) & (grid.scale < np.inf)):
            self.grids[number] = grid

    def _nothing(self, node: Node) -> None:
        whole_power = node.operation == "power" and node.attributes["exponent"] in (0, 1, 2, 3)
        if node.operation in ELEMENTARY or node.operation == "power" and not whole_power:
            self.inexact.append(node)

    def _input(self, node: Node, index: int = 0) -> Grid | None:
        return self.grids.get(node.inputs[index])

    def _quantize(self, node: Node) -> Grid | None:
        fmt, zero_point = node.attributes["format"], np.zeros(1)
        if not isinstance(fmt, IntegerFormat):
            return None
        if len(node.inputs) == 3:
            zero_point = self.network.fixed.get(node.inputs[2])
        if zero_point is None or not _whole(zero_point):
            return None
        low, high = fmt.lowest - int(zero_point.max()), fmt.highest - int(zero_point.min())
        return Grid(low=low, high=high, bits=fmt.bits)

    def _round(self, node: Node) -> Grid | None:
        x = self._input(node)
        return x if x is not None and np.all(x.scale == 1) else None

    _floor = _ceil = _round

    def _conv(self, node: Node) -> Grid | None:
        x, kernel, array = self._input(node), self._input(node, 1), self.network.fixed.get(node.inputs[1])
        known = array is not None and x is not None and kernel is not None and kernel.bits is not None
        matrix = known and array.ndim == (4 if node.operation == "conv" else 2)
        if not (matrix and x.uniform and _per_output(kernel.scale)):
            self.float_layers.append(node)
            self.inexact.append(node)
            return None
        layer = IntegerLayer(
            node=node,
            codes=self._codes(node, array / kernel.scale),
            weight_bits=kernel.bits,
            x_low=min(x.low, 0),
            x_high=max(x.high, 0),
            scale=(x.scale.item() * kernel.scale).reshape(-1),
        )
        self.layers.append(layer)
        low, high = layer.sums()
        axis = len(self.network.shapes[node.output]) - 1
        grid = Grid(low=min(low), high=max(high), scale=_aligned(layer.scale, axis + 1), layer=(layer, axis))
        if not (grid.exact and x.exact):
            self.inexact.append(node)
        return grid

    def _codes(self, node: Node, quotients: np.ndarray) -> np.ndarray:
        codes = np.rint(quotients)
        far = ~(np.abs(quotients - codes) <= 1e-3 + 1e-6 * np.abs(codes))
        require(
            not far.any(),
            f"{self.network.path}: {node.layer}: {far.sum()} weights are no multiples of their scale",
        )
        return codes.astype(np.int64)

    _dense = _conv

    def _add(self, node: Node, sign: int = 1) -> Grid | None:
        operands = self._operands(node)
        if operands is None:
            return None
        a, b, number = operands
        low, high = (b.low, b.high) if sign > 0 else (-b.high, -b.low)
        if a.layer is not None and number in self.network.fixed:
            bias = _aligned(self.network.fixed[number], len(self.network.shapes[node.output]))
            _take_bias(*a.layer, sign * np.rint(bias / b.scale), node.output)
        return a.plain(a.low + low, a.high + high)

    def _subtract(self, node: Node) -> Grid | None:
        return self._add(node, -1)

    def _maximum(self, node: Node) -> Grid | None:
        return self._chosen(node, max)

    def _minimum(self, node: Node) -> Grid | None:
        return self._chosen(node, min)

    def _chosen(self, node: Node, choice: Callable[[int, int], int]) -> Grid | None:
        operands = self._operands(node)
        if operands is None:
            return None
        a, b, _ = operands
        return a.plain(choice(a.low, b.low), choice(a.high, b.high))

    def _operands(self, node: Node) -> tuple[Grid, Grid, int] | None:
        """Two operands of one scale, the constant one last where the order is free; number of the last."""
        numbers = node.inputs
        if node.operation != "subtract" and numbers[0] in self.network.fixed:
            numbers = numbers[::-1]
        a, b = (self.grids.get(number) for number in numbers)
        if a is None or b is None:
            return None
        if b.low == b.high == 0:  # Zero is on every grid.
            b = dataclasses.replace(b, scale=a.scale)
        ndim = len(self.network.shapes[node.output])
        a, b = (dataclasses.replace(grid, scale=_aligned(grid.scale, ndim)) for grid in (a, b))
        return (a, b, numbers[1]) if np.allclose(a.scale, b.scale, rtol=1e-6, atol=0) else None

    def _multiply(self, node: Node, invert: bool = False) -> Grid | None:
        for i, j in ((0, 1),) if invert else ((0, 1), (1, 0)):
            grid, factor = self._input(node, i), self.network.fixed.get(node.inputs[j])
            if grid is None or factor is None or not (np.isfinite(factor) & (factor > 0)).all():
                continue
            if node.inputs[i] in self.network.fixed and grid.bits is None:
                continue
            if (factor == 1).all():
                return grid
            ndim = len(self.network.shapes[node.output])
            factor = _aligned(factor.astype(np.float64), ndim)
            scale = _aligned(grid.scale, ndim)
            scale = scale / factor if invert else scale * factor
            return Grid(low=grid.low, high=grid.high, scale=scale, bits=grid.bits)
        return None

    def _divide(self, node: Node) -> Grid | None:
        return self._multiply(node, invert=True)

    def _max_pool(self, node: Node) -> Grid | None:
        grid = self._input(node)
        return grid and grid.plain(grid.low, grid.high)

    def _max(self, node: Node) -> Grid | None:
        return self._rearranged(node)

    def _sum_pool(self, node: Node) -> Grid | None:
        count = math.prod(node.attributes["window"])
        return self._summed(node, self._rearranged(node), count)

    def _sum(self, node: Node) -> Grid | None:
        shape = self.network.shapes[node.inputs[0]]
        return self._summed(
            node, self._rearranged(node), math.prod(shape[a] for a in node.attributes["axes"])
        )

    def _summed(self, node: Node, grid: Grid | None, count: int) -> Grid | None:
        """`count` values each, or fewer at the border."""
        grid = grid and grid.plain(min(grid.low, 0) * count, max(grid.high, 0) * count)
        if grid is None or not grid.exact:
            self.inexact.append(node)
        return grid

    def _rearranged(self, node: Node) -> Grid | None:
        grid = self._input(node)
        return dataclasses.replace(grid, layer=None) if grid and grid.uniform else None

    _reshape = _slice = _rearranged

    def _pad(self, node: Node) -> Grid | None:
        grid = self._rearranged(node)
        return grid and grid.plain(min(grid.low, 0), max(grid.high, 0))

    def _transpose(self, node: Node) -> Grid | None:
        grid, permutation = self._input(node), node.attributes["permutation"]
        if grid is None:
            return None
        scale = _aligned(grid.scale, len(permutation))
        layer = grid.layer and (grid.layer[0], permutation.index(grid.layer[1]))
        return dataclasses.replace(grid, scale=scale.transpose(permutation), layer=layer)

    def _concatenate(self, node: Node) -> Grid | None:
        grids = [self.grids.get(number) for number in node.inputs]
        if any(grid is None or not grid.uniform for grid in grids):
            return None
        scales = np.array([grid.scale.item() for grid in grids])
        if not np.allclose(scales, scales[0], rtol=1e-6, atol=0):
            return None
        low, high = min(grid.low for grid in grids), max(grid.high for grid in grids)
        return Grid(low=low, high=high, scale=np.float64(scales[0]))


def _take_bias(layer: IntegerLayer, axis: int, codes: np.ndarray, output: int) -> None:
    """Notes integers that are added to a layer's sums, if there is one for every output channel."""
    if layer.bias_output is None and codes.size in (1, codes.shape[axis]):
        layer.bias = np.broadcast_to(codes.reshape(-1), layer.codes.shape[-1:]).astype(np.int64)
        layer.bias_output = output


def _constant_grid(array: np.ndarray, fmt: Format | None) -> Grid | None:
    bits = fmt.bits if isinstance(fmt, IntegerFormat) else None
    if not array.size or bits is None and (fmt is not None or not _whole(array)):
        return None
    return Grid(low=int(array.min()), high=int(array.max()), bits=bits)


def _whole(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all() and np.array_equal(array, np.rint(array)))


def _aligned(array: np.ndarray, ndim: int) -> np.ndarray:
    """With axes of size 1 in front, as broadcasting would."""
    array = np.asarray(array)
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _per_output(scale: np.ndarray) -> bool:
    """Whether a kernel's scale differs between output channels at most."""
    return scale.size == 1 or scale.size == scale.shape[-1]
