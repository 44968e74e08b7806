"""What was found out about a network, and the text of it."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A convolution or dense layer; where its sums are not of integers, what is said of them is None.

    Attributes:
      layer: path of modules, or the node's name.
      kind: `conv` or `dense`.
      depth: products in a sum.
      promised: accumulator bits that the file promises, or fewer that were asked for; of a layer of integers
        without either, 32.
      weight_bits: of the integer weights.
      inputs: least and greatest integer input.
      extremes: least and greatest integer that the accumulator can hold.
      needed: bits for those.
      holds: whether `needed` is at most `promised`.
      attained: whether extreme inputs give the extreme sums in such an accumulator.
      seen: least and greatest sum for the data, or None without data.
    """

    layer: str
    kind: str
    depth: int
    promised: int | None
    weight_bits: int | None = None
    inputs: tuple[int, int] | None = None
    extremes: tuple[int, int] | None = None
    needed: int | None = None
    holds: bool | None = None
    attained: bool | None = None
    seen: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `verify` found out.

    Attributes:
      path: of the file.
      dialect: `packed`, `QONNX`, or `ONNX` as of QCDQ files.
      layers: in the order of execution.
      probe: the result of the comparison with the trained network, in words.
      probe_difference: largest one of the outputs; None without a probe.
      notes: what else was or could not be done, a line each.
      failures: what is wrong, a line each.
      accuracy: top-1, of `examples`; None without data.
      classes: that were found, of each image.
    """

    path: pathlib.Path
    dialect: str
    layers: tuple[LayerReport, ...]
    probe: str
    probe_difference: float | None
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    accuracy: float | None = None
    classes: tuple[int, ...] = ()

    @property
    def examples(self) -> int:
        """Number of images."""
        return len(self.classes)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; what could not be proven is not."""
        return not self.failures

    @property
    def integer_layers(self) -> tuple[LayerReport, ...]:
        """Those whose sums are of integers."""
        return tuple(layer for layer in self.layers if layer.holds is not None)

    @property
    def verdict(self) -> str:
        """The last word."""
        if not self.ok:
            return f"NOT verified: {len(self.failures)} failure{'s' if len(self.failures) > 1 else ''}"
        if self.integer_layers:
            return "verified"
        agrees = "" if self.probe_difference is None else "agrees with what was recorded; "
        return f"{agrees}no layer of integers, so nothing was proven"


_HEADER = (
    *("layer", "kind", "depth", "weight bits", "inputs", "sums", "bits needed", "promised"),
    *("holds", "attained", "seen"),
)


def table(report: Report) -> str:
    """A line per layer, then what was found in words, and the verdict."""
    rows = [_HEADER, *(_row(layer) for layer in report.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    shown = [i for i, name in enumerate(_HEADER) if name != "seen" or report.examples]
    lines = [f"{report.path}: {report.dialect}"]
    lines += ["  ".join(_cell(row[i], widths[i], i) for i in shown).rstrip() for row in rows]
    integers = report.integer_layers
    held, others = (
        sum(layer.holds and layer.attained for layer in integers),
        len(report.layers) - len(integers),
    )
    lines.append(
        f"accumulators: {held} of {len(integers)} layers of integers proven"
        + (f"; {others} other layers" if others else "")
    )
    lines.append(f"probe: {report.probe}")
    if report.accuracy is not None:
        lines.append(f"accuracy: {report.accuracy:.2%} of {report.examples:,} images")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"FAILED: {failure}" for failure in report.failures]
    return "\n".join((*lines, report.verdict))


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.layer,
        layer.kind,
        f"{layer.depth:,}",
        _text(layer.weight_bits),
        _text(layer.inputs),
        _text(layer.extremes),
        _text(layer.needed),
        _text(layer.promised),
        _text(layer.holds),
        _text(layer.attained),
        _text(layer.seen),
    )


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, tuple):
        return f"{value[0]:,} ... {value[1]:,}"
    return str(value)


def _cell(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column < 2 else text.rjust(width)
