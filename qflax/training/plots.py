"""Plots that logs and reports share; matplotlib is needed (extra `report`).

Colours are Okabe and Ito's (2008), which can be told apart without seeing red or green; lines and marks
differ in style, too, so that a print in grey tells them apart as well.
"""

import functools
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qflax.layers import LayerCost

DARK, FAINT = "#222222", "#8a8a8a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", DARK)
MARKS, LINES = "osD^vPX", ("-", "--", "-.", ":")
_WIDTH = 8.0  # Inches.
_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def styled(plot: Callable[..., Figure | None]) -> Callable[..., Figure | None]:
    """A function whose figure has the style of this module, whatever the process uses elsewhere."""

    @functools.wraps(plot)
    def plot_styled(*args, **kwargs):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
            return plot(*args, **kwargs)

    return plot_styled


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure of a page's width and so many inches, and its axes [rows, columns]."""
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def new_layers_figure(paths: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with a line for each layer, the first one on top."""
    figure, ((axes,),) = new_figure(1.1 + 0.19 * len(paths))
    axes.set_yticks(range(len(paths)), [plain(_ending(path)) for path in paths], fontsize=7.5)
    axes.set_ylim(len(paths) - 0.3, -0.7)
    axes.grid(visible=False, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def plain(text: str) -> str:
    """Text that is drawn as it is: matplotlib reads $ as mathematics, and leaves out what begins with _."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _ending(path: str, most: int = 44) -> str:
    return path if len(path) <= most else f"\N{HORIZONTAL ELLIPSIS}{path[1 - most :]}"


@styled
def layer_widths(costs: Sequence[LayerCost]) -> Figure | None:
    """Bits of every layer's weights and inputs, along the network; None where all is float."""
    layers = [cost for cost in costs if cost.macs]
    if all(float(cost.weight_bits) == float(cost.input_bits) == 32 for cost in layers):
        return None
    figure, axes = new_layers_figure([cost.path for cost in layers])
    at = np.arange(len(layers))
    for shift, name, colour, hatch in (
        (-0.2, "weight_bits", COLOURS[0], ""),
        (0.2, "input_bits", COLOURS[4], "///"),
    ):
        bits = [float(getattr(cost, name)) for cost in layers]
        label = name.replace("_bits", "s")
        axes.barh(at + shift, bits, 0.4, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_xlabel("bits (32: float)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def pixels(figure: Figure, dpi: int = 110) -> np.ndarray:
    """uint8 [height, width, 3]."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
