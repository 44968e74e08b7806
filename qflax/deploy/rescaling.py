"""Integer-only networks: rescaling by multiplier and shift, for processors without floating point.

Between two quantizers of an integer network there are only sums of integers v, scales and offsets, so that
what a quantizer rounds is `sum_i a_i v_i + b`. With multipliers m_i = round(a_i / scale 2^n) and an offset c
in the same units its code is `(sum_i m_i v_i + c + 2^(n-1)) >> n`, clipped (Jacob et al. 2018, "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.2). A ReLU is the
clipping's lower end.
"""

import dataclasses
import math

import numpy as np

from qflax.deploy.graph import Graph, Node
from qflax.deploy.ranges import Range, integer_ranges
from qflax.deploy.simplify import used_nodes
from qflax.errors import require

_MULTIPLIER_BITS = 31
_MOST = 61  # Bits to shift by, so that int64 holds what half of the last one is added to.
_STRUCTURAL = ("slice", "pad", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class _Affine:
    """sum of factors times integer values, plus an offset; of that at least 0 if `rectified`."""

    terms: tuple[tuple[str, np.ndarray], ...]
    offset: np.ndarray
    rectified: bool = False

    def scaled(self, factor: np.ndarray) -> "_Affine":
        terms = tuple((name, a * factor) for name, a in self.terms)
        return dataclasses.replace(self, terms=terms, offset=self.offset * factor)

    def plus(self, other: "_Affine") -> "_Affine":
        return _Affine(self.terms + other.terms, self.offset + other.offset)


def integer_only(graph: Graph, inputs: Range = (0, 255)) -> Graph:
    """A graph in which nothing but the output's own scale is floating point.

    Quantize nodes become nodes of the operation `rescale`, of integer values, with the attributes
    `multipliers` and `offset` (int64 arrays), `shift`, `lowest` and `highest`.

    Args:
      graph: a network of integers.
      inputs: range of the input, whole numbers.

    Raises:
      UserError: a quantizer of minifloats, or one whose input is more than sums of scaled integers.
    """
    ranges = {**integer_ranges(graph), graph.input: inputs}
    walk = _Rescaling(graph, ranges)
    for node in graph.nodes:
        walk.visit(node)
    return dataclasses.replace(
        graph, nodes=used_nodes(walk.nodes, graph.output), constants=dict(graph.constants)
    )


class _Rescaling:
    def __init__(self, graph: Graph, ranges: dict[str, Range]):
        self.graph, self.ranges, self.nodes = graph, ranges, []
        self.forms: dict[str, _Affine | None] = {graph.input: _integer(graph.input)}

    def visit(self, node: Node) -> None:
        """Adds what stands for a node."""
        if node.operation == "quantize":
            self.nodes.append(self._rescale(node))
            self.forms[node.output] = _integer(node.output)
            return
        self.nodes.append(node)
        if node.output in self.ranges:
            self.forms[node.output] = _integer(node.output)
        else:
            self.forms[node.output] = self._affine(node)

    def _operand(self, name: str) -> _Affine | None:
        if name in self.graph.constants:
            return _Affine((), self.graph.constants[name].array.astype(np.float64))
        return self.forms.get(name)

    def _affine(self, node: Node) -> _Affine | None:
        operands = [self._operand(name) for name in node.inputs]
        if any(form is None or form.rectified for form in operands):
            return None
        x, operation = operands[0], node.operation
        other = operands[1] if len(operands) > 1 else None
        if operation == "multiply" and not x.terms:
            x, other = other, x
        if operation in ("multiply", "divide") and not other.terms:
            return x.scaled(other.offset if operation == "multiply" else 1 / other.offset)
        if operation == "add":
            return x.plus(other)
        if operation == "subtract":
            return x.plus(other.scaled(np.float64(-1)))
        if operation == "negative":
            return x.scaled(np.float64(-1))
        if operation == "maximum" and not other.terms and not np.any(other.offset):
            return dataclasses.replace(x, rectified=True)
        return self._moved(node, x) if operation in _STRUCTURAL else None

    def _moved(self, node: Node, x: _Affine) -> _Affine | None:
        """Elements are moved before they are scaled, where all have one scale and no offset."""
        if np.any(x.offset) or any(a.size > 1 for _, a in x.terms):
            return None
        terms = []
        for i, (name, a) in enumerate(x.terms):
            output = f"{node.output}.{i}"
            self.nodes.append(dataclasses.replace(node, inputs=(name,), output=output))
            low, high = self.ranges[name]
            self.ranges[output] = min(low, 0), max(high, 0)
            terms.append((output, a))
        return _Affine(tuple(terms), x.offset)

    def _rescale(self, node: Node) -> Node:
        where, x = node.layer or node.output, self.forms.get(node.inputs[0])
        require(
            x is not None and bool(x.terms) and node.output in self.ranges,
            f"{where}: rescaling='integer' needs sums of scaled integers before each quantizer, and here is "
            "something else (a minifloat, a float layer, a function but ReLU); use rescaling='float'",
        )
        scale, zero_point = (self.graph.constants[name].array.astype(np.float64) for name in node.inputs[1:])
        rounding, fmt = node.attributes["rounding"], node.attributes["format"]
        require(
            rounding in ("half_even", "floor") and not fmt.bipolar,
            f"{where}: rescaling='integer' rounds to the nearest or down, not {rounding} nor to -1 and +1; "
            "use rescaling='float'",
        )
        form = x.scaled(1 / scale)
        shift = self._shift(form)
        half = 2.0 ** (shift - 1) if rounding == "half_even" else 0.0
        lowest = fmt.lowest - zero_point
        return dataclasses.replace(
            node,
            operation="rescale",
            inputs=tuple(name for name, _ in form.terms),
            attributes={
                "multipliers": tuple(_fixed(a, shift) for _, a in form.terms),
                "offset": _fixed(form.offset, shift) + np.int64(half),
                "shift": shift,
                "lowest": np.int64(np.maximum(lowest, 0) if x.rectified else lowest),
                "highest": np.int64(fmt.highest - zero_point),
            },
        )

    def _shift(self, form: _Affine) -> int:
        """The largest n up to 61 with multipliers of 31 bits and sums within 62."""
        largest = max(float(np.max(np.abs(a))) for _, a in form.terms)
        total = float(np.max(np.abs(form.offset)))
        for name, a in form.terms:
            total += float(np.max(np.abs(a))) * max(map(abs, self.ranges[name]))
        return max(1, min(_MOST, _MULTIPLIER_BITS - 1 - _exponent(largest), _MOST - _exponent(total)))


def _exponent(x: float) -> int:
    """Of the least power of two that is not below it; one of no consequence for what is next to nothing."""
    return math.ceil(math.log2(max(x, 2.0**-_MOST)))


def _integer(name: str) -> _Affine:
    return _Affine(((name, np.ones(())),), np.zeros(()))


def _fixed(x: np.ndarray, shift: int) -> np.ndarray:
    return np.int64(np.round(np.float64(x) * 2.0**shift))
