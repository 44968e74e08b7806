"""Everything that can be proven or tried about the network of a file."""

import pathlib

import numpy as np

from qflax.errors import UserError, one_line, require
from qflax.untrusted import open_file
from qflax.verify import packed, qonnx
from qflax.verify.executor import run
from qflax.verify.extremes import IntegerLayer, width
from qflax.verify.limits import MALFORMED
from qflax.verify.network import Network, Node
from qflax.verify.probe import probe_inputs, spread
from qflax.verify.ranges import Analysis
from qflax.verify.report import LayerReport, Report

TOLERANCE = 1e-4  # Of the largest output, where the last bit of a sum depends on who executes it.
BATCH = 100
_UNIT = (0.0, 1.0)  # Range of inputs for files that do not tell.


def load(path: pathlib.Path) -> Network:
    """The network of a packed or ONNX file (QONNX, QCDQ); UserError if it is neither, or damaged."""
    require(
        not path.is_dir(),
        f"{path}: is a folder; export a workdir first (qflax export {path} --output=FILE), then verify that",
    )
    try:
        with open_file(path) as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return packed.read(path) if start == b"PK" else qonnx.read(path)


def verify(
    path: pathlib.Path,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    *,
    bits: int | None = None,
    require_proof: bool = False,
) -> Report:
    """Reads a network and checks what it promises.

    Args:
      path: of a packed, QONNX or QCDQ file.
      images: uint8 [n, height, width, channels] to measure the accuracy on, or None. They are spread over the
        range of the probe's inputs; over 0 ... 1 in files of other tools.
      labels: whole numbers [n].
      bits: of accumulators that all layers of integers must fit, besides what the file promises; None is what
        it promises alone, or 32.
      require_proof: whether layers of which nothing can be proven are failures.

    Raises:
      UserError: if the file cannot be read, the data does not fit it, or for other than 2 to 64 `bits`.
    """
    require(bits is None or 2 <= bits <= 64, f"accumulator_bits={bits}: an accumulator has 2 to 64")
    network = load(path)
    try:
        with np.errstate(all="ignore"):
            return _checked(network, Analysis(network, bits), images, labels, require_proof)
    except MALFORMED as error:  # Of what no reader took exception to.
        raise UserError(f"{path}: cannot be verified: {one_line(repr(error))}") from error


def _checked(
    network: Network,
    analysis: Analysis,
    images: np.ndarray | None,
    labels: np.ndarray | None,
    require_proof: bool,
) -> Report:
    failures, notes = [], []
    probe, difference = _compare_with_trained(network, analysis, failures)
    if network.dialect != "packed":
        _compare_with_package(network, analysis, failures, notes)
    accuracy, classes, seen = None, (), {}
    if images is not None:
        classes, seen = _measure(network, analysis, images, labels)
        accuracy = float(np.mean(np.equal(classes, labels)))
        if network.inputs is None:
            notes.append("the file does not tell the range of its inputs: images were spread over 0 ... 1")
    rows = [_layer_report(layer, seen.get(layer), failures) for layer in analysis.layers]
    rows += [_float_report(network, node, failures, require_proof) for node in analysis.float_layers]
    if require_proof and not rows:
        failures.append("there is no layer to prove anything of")
    order = {node.output: index for index, node in enumerate(network.nodes)}
    rows.sort(key=lambda row: order[row[0]])
    return Report(
        path=network.path,
        dialect=network.dialect,
        layers=tuple(row for _, row in rows),
        probe=probe,
        probe_difference=difference,
        notes=tuple(notes),
        failures=tuple(failures),
        accuracy=accuracy,
        classes=classes,
    )


def _layer_report(
    layer: IntegerLayer, seen: tuple[int, int] | None, failures: list[str]
) -> tuple[int, LayerReport]:
    low, high = layer.extremes()
    low, high = min(low), max(high)
    needed, promised, name = width(low, high), layer.promised, layer.node.layer
    holds, attained = needed <= promised, layer.attained()
    if not holds:
        failures.append(
            f"{name}: does not hold: sums of {low:,} ... {high:,} need {needed} bits, not {promised}"
        )
    elif not attained:
        failures.append(f"{name}: extreme inputs do not give the sums {low:,} ... {high:,}")
    if seen and not low <= seen[0] <= seen[1] <= high:
        failures.append(
            f"{name}: sums of {seen[0]:,} ... {seen[1]:,} were seen outside of {low:,} ... {high:,}"
        )
    return layer.node.output, LayerReport(
        layer=name,
        kind=layer.node.operation,
        depth=layer.depth,
        promised=promised,
        weight_bits=layer.weight_bits,
        inputs=(layer.x_low, layer.x_high),
        extremes=(low, high),
        needed=needed,
        holds=holds,
        attained=attained,
        seen=seen,
    )


def _float_report(
    network: Network, node: Node, failures: list[str], require_proof: bool
) -> tuple[int, LayerReport]:
    if node.promised or require_proof:
        asked = f"{node.promised} bits are promised" if node.promised else "a proof is required"
        failures.append(f"{node.layer}: {asked}, but it does not sum integers of a known range")
    shape = network.shapes[node.inputs[1]]
    depth = int(np.prod(shape[:-1] if node.inputs[1] in network.fixed else shape[-2:-1]))
    row = LayerReport(layer=node.layer, kind=node.operation, depth=depth, promised=node.promised)
    return node.output, row


def _compare_with_trained(
    network: Network, analysis: Analysis, failures: list[str]
) -> tuple[str, float | None]:
    """The probe's result in words, and the largest difference of an output."""
    probe = network.probe
    if probe is None:
        return "the file has no outputs of the trained network to compare with", None
    x = probe_inputs(len(probe.outputs), network.shape, probe.low, probe.high)
    watched, sums = {network.nodes[index].output: index for index in probe.sums}, {}

    def observe(number: int, array: np.ndarray) -> None:
        if number in watched:
            index = watched[number]
            sums[index] = sums.get(index, 0.0) + float(array.astype(np.float64).sum())

    y = run(network, x, observe).reshape(probe.outputs.shape)
    result, difference, same = _compared(y, probe.outputs, network, analysis)
    other = [index for index, value in probe.sums.items() if sums.get(index, value) != value]
    certain = [index for index in other if network.nodes[index].output not in analysis.doubtful]
    different = min(certain or other, default=None)
    if not same or certain:
        where = ""
        if probe.sums:
            where = f"; first different in {_place(network, different)}"
        failures.append(f"probe: not as the trained network: {result}{where}")
    return result, difference


def _compared(
    y: np.ndarray, expected: np.ndarray, network: Network, analysis: Analysis
) -> tuple[str, float, bool]:
    """In words, the largest difference, and whether it is small enough."""
    finite = np.isfinite(y) & np.isfinite(expected)
    if not np.array_equal(y[~finite], expected[~finite], equal_nan=True):
        return f"{len(y)} examples, other outputs are not finite", float("nan"), False
    y, expected = (np.where(finite, array, 0).astype(np.float64) for array in (y, expected))
    difference = float(np.abs(y - expected).max())
    if difference == 0:
        return f"{len(y)} examples, all outputs are equal", difference, True
    text = f"{len(y)} examples, largest difference {difference:.3g}"
    if network.output not in analysis.doubtful:
        return f"{text}, though all arithmetic is exact", difference, False
    limit = TOLERANCE * float(np.abs(expected).max())
    node = analysis.inexact[0]
    reason = f"{node.operation} of {node.layer!r} is not exact"
    return f"{text}, limit {limit:.3g} as {reason}", difference, difference <= limit


def _place(network: Network, index: int | None) -> str:
    """Names the layers between the last sums that agree and a node; None is the network's output."""
    producers = {node.output: i for i, node in enumerate(network.nodes)}
    start = producers[network.output] if index is None else index
    names, rest, visited = {}, [start], set()  # Names in order.
    while rest:
        i = rest.pop()
        visited.add(i)
        names[network.nodes[i].layer or network.nodes[i].operation] = None
        sources = [producers[number] for number in network.nodes[i].inputs if number in producers]
        rest += [j for j in sources if j not in network.probe.sums and j not in visited]
    name, *others = names
    return name + (f" (computed from {', '.join(others)})" if others else "")


def _compare_with_package(
    network: Network, analysis: Analysis, failures: list[str], notes: list[str]
) -> None:
    """Executes the file with another package too, if it is there."""
    package = qonnx.PACKAGES[network.dialect]
    low, high = network.inputs or _UNIT
    count = len(network.probe.outputs) if network.probe else 2
    x = probe_inputs(count, network.shape, low, high)
    try:
        y = qonnx.execute(network.path, x)
    except ImportError:
        notes.append(f"the package {package} is not installed: the file was not executed with it")
        return
    except Exception as error:  # Whatever another program may raise.
        failures.append(f"{package} cannot execute the file: {one_line(repr(error))}")
        return
    result, _, same = _compared(run(network, x).reshape(len(x), -1), y.reshape(len(x), -1), network, analysis)
    (notes if same else failures).append(f"executed with {package}: {result}")


def _measure(
    network: Network, analysis: Analysis, images: np.ndarray, labels: np.ndarray
) -> tuple[tuple[int, ...], dict[IntegerLayer, tuple[int, int]]]:
    """The class of every image, and the least and greatest sum of every layer of integers."""
    require(
        images.dtype == np.uint8
        and images.shape[1:] == network.shape
        and np.shape(labels) == (len(images),)
        and len(images) > 0,
        f"{network.path}: takes images of {list(network.shape)}, uint8, with a label each; "
        f"the data has {images.dtype} {list(images.shape)} and labels {list(np.shape(labels))}",
    )
    low, high = network.inputs or _UNIT
    owners = {number: layer for layer in analysis.layers for number in layer.outputs}
    seen: dict[IntegerLayer, list[int]] = {}

    def observe(number: int, array: np.ndarray) -> None:
        if number in owners:
            layer = owners[number]
            sums = np.rint(array / layer.outputs[number])
            require(
                bool(np.isfinite(sums).all()), f"{network.path}: {layer.node.layer}: a sum is not a number"
            )
            seen.setdefault(layer, []).extend((int(sums.min()), int(sums.max())))

    classes = []
    for i in range(0, len(images), BATCH):
        y = run(network, spread(images[i : i + BATCH], low, high), observe)
        classes += y.reshape(len(y), -1).argmax(-1).tolist()
    return tuple(classes), {layer: (min(sums), max(sums)) for layer, sums in seen.items()}
