"""Exports: a trained function as a file that computes the same."""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Callable, Mapping

import jax
import numpy as np

from qflax.deploy import packed
from qflax.deploy.graph import Graph
from qflax.deploy.lowering import evaluate, lower
from qflax.deploy.probe import probe_input, probe_metadata
from qflax.deploy.ranges import EXACT_IN_FLOAT32, integer_ranges
from qflax.deploy.runner import enough_bits, execute
from qflax.deploy.stablehlo import to_stablehlo
from qflax.errors import UserError, choose, require
from qflax.files import require_makeable, write_atomically
from qflax.numerics import on_cpu

_TOLERANCE = 1e-4  # Relative; float sums depend on their order.


def _save_qonnx(graph: Graph, file: pathlib.Path) -> None:
    from qflax.deploy.qonnx import to_qonnx

    write_atomically(file, to_qonnx(graph).SerializeToString())


def _save_qcdq(graph: Graph, file: pathlib.Path) -> None:
    from qflax.deploy.qcdq import to_qcdq

    write_atomically(file, to_qcdq(graph).SerializeToString())


def _save_stablehlo(graph: Graph, file: pathlib.Path) -> None:
    write_atomically(file, to_stablehlo(graph))


_SAVE = {
    "packed": packed.save,
    "qonnx": _save_qonnx,
    "qcdq": _save_qcdq,
    "stablehlo": _save_stablehlo,
}
FORMATS = tuple(_SAVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What came of an export.

    Attributes:
      graph: the network, with metadata.
      difference: largest difference on the probe between the outputs of the trained network, compiled as a
        whole, and of the graph.
      exact: whether the graph gives the very bits that the network's operations give, see `is_exact`. There
        is a difference all the same where XLA fuses some of them, see `export`.
    """

    graph: Graph
    difference: float
    exact: bool


@on_cpu()
def export(
    function: Callable[[typing.Any, jax.Array], jax.Array],
    variables: typing.Any,
    shape: tuple[int, ...],
    file: str | pathlib.Path,
    *,
    format: str,
    low: float = 0.0,
    high: float = 255.0,
    metadata: Mapping[str, typing.Any] | None = None,
) -> Export:
    """Writes a trained network to a file, once it is known to compute the same.

    Where the compiled network answers otherwise, it counts as it is computed operation by operation, which
    the graph must agree with. Layers of qflax are made so that there is no difference; in a user's own code
    XLA may fuse products with sums and make a division by a constant a product, so that last bits, and codes
    behind them, are others.

    Args:
      function: maps (variables, float32 [batch, *shape]) to an array [batch, ...], for any batch.
      variables: what was trained.
      shape: of one example.
      file: to write; it must not be there.
      format: one of `FORMATS`.
      low, high: range of inputs, for the probe.
      metadata: what else to record, of JSON's types.

    Returns:
      What came of it.

    Raises:
      UserError: unknown format, a file that is there, a network that the format cannot hold.
    """
    choose("format", format, FORMATS)
    file = pathlib.Path(file)
    require(not file.exists(), f"{file}: is there already; delete it, or choose another --output")
    require(file.parent.is_dir(), f"{file.parent}: no such folder; make it, or choose another --output")
    require_makeable(file.parent)
    variables = jax.device_get(variables)  # They may be bound to an accelerator.
    graph = lower(functools.partial(function, variables), shape)
    x = probe_input(shape, low, high)
    trained = np.asarray(jax.jit(function)(variables, x), np.float32)
    served, sums = _served(graph, x)
    if trained.shape != served.shape:
        raise UserError(
            f"{file}: not written: its outputs would be {served.shape}, and those of the trained network are "
            f"{trained.shape}; report this network"
        )
    difference, exact = _largest_difference(trained, served), is_exact(graph)
    allowed = 0.0 if exact else _TOLERANCE * float(np.max(np.abs(trained)))
    if not difference <= allowed:
        trained = evaluate(functools.partial(function, variables), x).astype(np.float32)
        with jax.disable_jit():
            served, sums = _served(graph, x)
        remaining = _largest_difference(trained, served)
        require(
            remaining <= allowed,
            f"{file}: not written: on the probe its outputs would differ from the trained network's by "
            f"{remaining:.3g}, and {allowed:.3g} is allowed; report this network, and let JAX have a CPU "
            "(JAX_PLATFORMS)",
        )
    probe = probe_metadata(low, high, trained, sums)
    graph = dataclasses.replace(graph, metadata={**(metadata or {}), "probe": probe})
    _SAVE[format](graph, file)
    return Export(graph=graph, difference=difference, exact=exact)


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)))


def is_exact(graph: Graph) -> bool:
    """Whether all sums are exact, and nothing but sums, products and roundings is computed.

    Exact are sums of integers that float32, in which networks are trained, holds.
    """
    ranges = {
        name: ends for name, ends in integer_ranges(graph).items() if max(map(abs, ends)) < EXACT_IN_FLOAT32
    }
    summed = ("conv", "dense", "sum", "sum_pool")
    inexact = ("exp", "log", "tanh", "logistic", "erf", "rsqrt", "sin", "cos", "power")
    return all(
        node.output in ranges if node.operation in summed else node.operation not in inexact
        for node in graph.nodes
    )


def _served(graph: Graph, x: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """The graph's outputs, and sums of integer codes by the node's place."""
    ranges = integer_ranges(graph)
    places = {
        i: node.output
        for i, node in enumerate(graph.nodes)
        if node.operation == "quantize" and node.output in ranges
    }

    def run(x):
        values = execute(graph, x)[0]
        return values[graph.output], {place: values[name] for place, name in places.items()}

    with enough_bits(graph):
        output, codes = jax.device_get(jax.jit(run)(x))
    # By NumPy, as int32 would not hold the sum of many wide codes.
    return output.astype(np.float32), {i: int(np.sum(c, dtype=np.int64)) for i, c in codes.items()}
