"""Which values of a network are integers behind a scale, in which range, and which layers sum them up."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from qflax.errors import UserError, one_line, require
from qflax.verify.biases import Biases
from qflax.verify.executor import ELEMENTARY
from qflax.verify.extremes import LARGEST_CODE, IntegerLayer
from qflax.verify.formats import IntegerFormat
from qflax.verify.grid import (
    WHOLE,
    Grid,
    aligned,
    constant_grid,
    joined,
    nearly_whole,
    reshaped,
    varies,
    whole,
)
from qflax.verify.limits import MALFORMED
from qflax.verify.network import Network, Node

_LARGEST = 2.0**127  # Some float32 numbers are larger, but none twice as large.
_SMALLEST_SCALE = 2.0**-126  # Below it float32 has fewer bits.
_WIDEST_INPUT = 2**62  # Times weights and their number, that is a number of float32 still.
_CERTAIN = 2**20  # Times a scale, in float32, that is rounded to no neighbour's product.
_KEPT = 2**24  # Elements of all scales together.


class Analysis:
    """Follows the integers through a network.

    Attributes:
      grids: number of a value -> its grid, where it has one.
      layers: convolutions and dense layers of integers.
      float_layers: the others.
      inexact: nodes whose last bit depends on who executes them: sums of what is not integers, or of more
        than float32 holds, elementary functions, and what is `loose`.
      doubtful: numbers of values that are made of what these give.

    Raises:
      UserError: for weights that are no integers of exact sums, and for what a file should not have.
    """

    def __init__(self, network: Network, bits: int | None = None):
        """`bits`: see `IntegerLayer.asked`."""
        self.network, self._bits = network, bits
        self.grids: dict[int, Grid] = {}
        self.layers: list[IntegerLayer] = []
        self.float_layers: list[Node] = []
        self.inexact: list[Node] = []
        self.doubtful: set[int] = set()
        self._biases, self._kept = Biases(), 0
        for number, fmt in network.constants.items():
            self._set(number, constant_grid(network.fixed[number], fmt))
        for node in network.nodes:
            known = len(self.inexact)
            try:
                self._follow(node)
            except MALFORMED as error:
                raise UserError(
                    f"{network.path}: integers at {node.operation} of {node.layer!r}: {one_line(repr(error))}"
                ) from error
            if len(self.inexact) > known or not self.doubtful.isdisjoint(node.inputs):
                self.doubtful.add(node.output)

    def _follow(self, node: Node) -> None:
        grid = getattr(self, f"_{node.operation}", self._nothing)(node)
        if node.output not in self.network.fixed:
            if node.loose:
                self.inexact.append(node)
            if node.stored:
                self._require_stored(node, grid)
        if node.output in self.network.fixed and (grid is None or not grid.bounded):
            grid = constant_grid(self.network.fixed[node.output])
        self._set(node.output, grid)

    def _set(self, number: int, grid: Grid | None) -> None:
        shape = self.network.shapes[number]
        if grid is None or 0 in shape or grid.bounded and max(-grid.low, grid.high) > _LARGEST:
            return  # Python's integers may be of any size.
        grid = grid.moved(lambda array: aligned(array, len(shape))).rounded()
        largest = max(-grid.low, grid.high, 1) if grid.bounded else 1
        if not np.all((grid.scale >= _SMALLEST_SCALE) & (grid.scale * largest < _LARGEST)):
            return
        self._kept += grid.scale.size + (0 if grid.channels is None else grid.channels.size)
        require(self._kept <= _KEPT, f"{self.network.path}: scales of more than {_KEPT:,} elements together")
        self.grids[number] = grid

    def _require_stored(self, node: Node, grid: Grid | None) -> None:
        low, high = node.stored.lowest, node.stored.highest
        require(
            grid is not None and grid.exact and low <= grid.low <= grid.high <= high,
            f"{self.network.path}: {node.operation} of {node.layer!r} is computed in integers of "
            f"{low:,} ... {high:,} and may leave them: it would wrap around",
        )

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
        if zero_point is None or not zero_point.size or not whole(zero_point):
            return None
        # As float32 has them: it rounds 2^31 - 1 up.
        low = int(np.float32(fmt.lowest) - np.float32(zero_point.max()))
        high = int(np.float32(fmt.highest) - np.float32(zero_point.min()))
        x, scale = self._input(node), self.network.fixed.get(node.inputs[1])
        if x is None or scale is None or not (x.plain and (scale == 1).all()) or zero_point.any():
            return Grid(low=low, high=high, bits=fmt.bits)
        if fmt.bipolar:
            return Grid(low=low, high=high, bits=fmt.bits)
        # Whole numbers already: the same, but for those that are clipped.
        channels = x.channels if low <= x.low and x.high <= high else None
        low, high = (min(max(end, low), high) for end in (x.low, x.high))
        return dataclasses.replace(x, low=low, high=high, bits=fmt.bits, channels=channels)

    def _round(self, node: Node) -> Grid:
        x = self._input(node)
        return x if x is not None and x.plain else WHOLE

    _floor = _ceil = _round

    def _negative(self, node: Node) -> Grid | None:
        x = self._input(node)
        return x and x.within(-x.high, -x.low)

    def _absolute(self, node: Node) -> Grid | None:
        x = self._input(node)
        return x and x.within(0, max(-x.low, x.high))

    def _sign(self, node: Node) -> Grid:
        del node
        return Grid(low=-1, high=1)

    def _conv(self, node: Node) -> Grid | None:
        x, kernel, array = self._input(node), self._input(node, 1), self.network.fixed.get(node.inputs[1])
        known = array is not None and x is not None and kernel is not None and kernel.bits is not None
        matrix = known and array.ndim == (4 if node.operation == "conv" else 2)
        if not (matrix and x.uniform and max(-x.low, x.high) <= _WIDEST_INPUT and _per_output(kernel.scale)):
            self.float_layers.append(node)
            self.inexact.append(node)
            return None
        layer = IntegerLayer(
            node=node,
            codes=self._codes(node, array, kernel),
            weight_bits=kernel.bits,
            x_low=min(x.low, 0),
            x_high=max(x.high, 0),
            scale=(x.scale.item() * kernel.scale).reshape(-1),
            asked=self._bits,
        )
        self.layers.append(layer)
        low, high = layer.sums()
        channels = self._biases.channels_of(layer)
        grid = Grid(low=min(low), high=max(high), scale=layer.scale, channels=channels)
        if not (grid.exact and x.exact):
            self.inexact.append(node)
        return grid

    _dense = _conv

    def _codes(self, node: Node, array: np.ndarray, kernel: Grid) -> np.ndarray:
        quotients, place = array / kernel.scale, f"{self.network.path}: {node.layer}"
        far = ~nearly_whole(quotients)
        require(not far.any(), f"{place}: {far.sum()} weights are no multiples of their scale")
        codes, limit = np.rint(quotients), LARGEST_CODE if kernel.plain else _CERTAIN
        largest = np.abs(codes).max()
        require(
            largest <= limit,
            f"{place}: weights of up to {largest:.0f}; sums are exact for at most {limit}"
            + ("" if kernel.plain else ", behind a scale"),
        )
        return codes.astype(np.int64)

    def _add(self, node: Node, sign: int = 1) -> Grid | None:
        operands = self._operands(node)
        if operands is None:
            return None
        (a, b), (first, last) = operands
        fixed, bits, channels = self.network.fixed, None, None
        if last in fixed:
            bits, channels = a.bits, a.channels
            if channels is not None:
                self._biases.take(a, b, sign * fixed[last], node.output)
        elif first in fixed and b.channels is not None:  # The constant less the sums.
            self._biases.take(b, a, -fixed[first], None)
        low, high = (b.low, b.high) if sign > 0 else (-b.high, -b.low)
        return Grid(low=a.low + low, high=a.high + high, scale=a.scale, bits=bits, channels=channels)

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
        (a, b), (_, last) = operands
        grid = a.within(choice(a.low, b.low), choice(a.high, b.high))
        return dataclasses.replace(grid, bits=a.bits if last in self.network.fixed else None)

    def _operands(self, node: Node) -> tuple[tuple[Grid, Grid], Sequence[int]] | None:
        """Two operands of one scale, where the order is free a constant one last; and their numbers."""
        numbers, fixed = node.inputs, self.network.fixed
        if any(number not in self.grids for number in numbers):
            return None
        if node.operation != "subtract":
            numbers = sorted(numbers, key=lambda number: self._rank(number, number in fixed))
        ndim = len(self.network.shapes[node.output])
        a, b = (self.grids[number].moved(lambda array: aligned(array, ndim)) for number in numbers)
        if numbers[1] in fixed:
            b = self._rescaled(numbers[1], b, a)
        elif numbers[0] in fixed:
            a = self._rescaled(numbers[0], a, b)
        return ((a, b), numbers) if a.shares_scale_with(b) else None

    def _rank(self, number: int, fixed: bool) -> tuple[bool, ...]:
        """By it the operand comes first that has what is to be kept."""
        return fixed, self.grids[number].channels is None, self.grids[number].bits is None

    def _rescaled(self, number: int, grid: Grid, other: Grid) -> Grid:
        """A constant of integers in units of another scale, if it is of whole ones."""
        array, scale = self.network.fixed[number], other.scale
        integers = grid.bits is not None or other.plain or not array.any()
        if grid.shares_scale_with(other) or not integers:
            return grid
        quotients = array / scale
        if not nearly_whole(quotients).all():
            return grid
        codes = np.rint(quotients)
        return Grid(low=int(codes.min()), high=int(codes.max()), scale=scale, bits=grid.bits)

    def _multiply(self, node: Node, invert: bool = False) -> Grid | None:
        for i, j in ((0, 1),) if invert else ((0, 1), (1, 0)):
            grid, factor = self._input(node, i), self.network.fixed.get(node.inputs[j])
            if grid is None or factor is None or not (np.isfinite(factor) & (factor > 0)).all():
                continue
            if node.inputs[i] in self.network.fixed and grid.bits is None:
                continue
            if (factor == 1).all():
                return grid
            other = self._input(node, j)
            if not invert and other is not None and other.bits is not None:
                continue  # Of integers itself, and no scale.
            ndim = len(self.network.shapes[node.output])
            factor = aligned(factor.astype(np.float64), ndim)
            scale = aligned(grid.scale, ndim)
            if not (np.frexp(factor)[0] == 0.5).all():
                grid = grid.blurred()
            return dataclasses.replace(grid, scale=scale / factor if invert else scale * factor)
        a, b = (self._input(node, i) for i in range(2))
        return None if invert or a is None or b is None else _product(a, b)

    def _divide(self, node: Node) -> Grid | None:
        return self._multiply(node, invert=True)

    def _max_pool(self, node: Node) -> Grid | None:
        beside = zip(node.attributes["padding"], node.attributes["window"], strict=True)
        inside = all(max(border) < size for border, size in beside)  # Else some are of minus infinity alone.
        return self._along(node, (1, 2)) if inside else None

    def _max(self, node: Node) -> Grid | None:
        axes = node.attributes["axes"]
        grid = self._along(node, axes)
        return grid and grid.moved(lambda array: array.squeeze(axes))

    def _sum_pool(self, node: Node) -> Grid | None:
        return self._summed(node, self._along(node, (1, 2)), math.prod(node.attributes["window"]))

    def _sum(self, node: Node) -> Grid | None:
        shape = self.network.shapes[node.inputs[0]]
        return self._summed(node, self._max(node), math.prod(shape[axis] for axis in node.attributes["axes"]))

    def _summed(self, node: Node, grid: Grid | None, count: int) -> Grid | None:
        """`count` values each, or fewer at the border."""
        grid = grid and grid.within(min(grid.low, 0) * count, max(grid.high, 0) * count)
        if grid is None or not grid.exact:
            self.inexact.append(node)
        return grid

    def _along(self, node: Node, axes: Sequence[int]) -> Grid | None:
        """The input's grid, if it has one scale all along some axes."""
        grid = self._input(node)
        if grid is None or varies(grid.scale, axes):
            return None
        lost = grid.channels is None or varies(grid.channels, axes)
        return dataclasses.replace(grid, bits=None, channels=None if lost else grid.channels)

    def _reshape(self, node: Node) -> Grid | None:
        grid, shapes = self._input(node), self.network.shapes
        before, after = shapes[node.inputs[0]], shapes[node.output]
        return grid and grid.moved(lambda array: reshaped(array, before, after))

    def _slice(self, node: Node) -> Grid | None:
        grid, bounds = self._input(node), [node.attributes[name] for name in ("start", "stop", "step")]

        def move(array: np.ndarray) -> np.ndarray:
            places = zip(*bounds, array.shape, strict=True)
            return array[tuple(slice(*place[:3]) if place[3] > 1 else slice(None) for place in places)]

        return grid and grid.moved(move)

    def _pad(self, node: Node) -> Grid | None:
        grid, padding = self._input(node), node.attributes["padding"]

        def move(array: np.ndarray) -> np.ndarray:
            pairs = zip(padding, array.shape, strict=True)
            return np.pad(array, [pair if size > 1 else (0, 0) for pair, size in pairs], "edge")

        if grid is None:
            return None
        grid = dataclasses.replace(grid, low=min(grid.low, 0), high=max(grid.high, 0), bits=None)
        return grid.moved(move)

    def _transpose(self, node: Node) -> Grid | None:
        grid, permutation = self._input(node), node.attributes["permutation"]
        return grid and grid.moved(lambda array: array.transpose(permutation))

    def _concatenate(self, node: Node) -> Grid | None:
        grids = [self.grids.get(number) for number in node.inputs]
        if any(grid is None for grid in grids):
            return None
        shapes, axis = [self.network.shapes[number] for number in node.inputs], node.attributes["axis"]
        channels, scale = None, grids[0].scale
        if not (grids[0].uniform and all(grid.shares_scale_with(grids[0]) for grid in grids)):
            scale = joined([grid.scale for grid in grids], shapes, axis)
        if any(grid.channels is not None for grid in grids):
            nowhere = np.full((1,) * len(shapes[0]), -1)
            parts = [nowhere if grid.channels is None else grid.channels for grid in grids]
            channels = joined(parts, shapes, axis)
        low, high = min(grid.low for grid in grids), max(grid.high for grid in grids)
        return Grid(low=low, high=high, scale=scale, channels=channels)


def _product(a: Grid, b: Grid) -> Grid | None:
    if not (a.bounded and b.bounded):
        return WHOLE if a.plain and b.plain else None
    corners = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Grid(low=min(corners), high=max(corners), scale=a.scale * b.scale)


def _per_output(scale: np.ndarray) -> bool:
    """Whether a kernel's scale differs between output channels at most."""
    return scale.size == 1 or scale.size == scale.shape[-1]
