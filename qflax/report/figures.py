"""Plots of reports."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qflax.layers import LayerCost
from qflax.report.published import Published
from qflax.report.runs import Group, Run
from qflax.training.kernels import LayerKernel
from qflax.training.plots import (
    COLOURS,
    DARK,
    FAINT,
    LINES,
    MARKS,
    new_figure,
    new_layers_figure,
    plain,
    styled,
)

_SPAN = 15.0  # Points of accuracy that a plot shows at most.
_MOST_CODES, _MOST_GRID_LINES = 512, 32
_SIZES = {  # Target -> what it is about.
    "weight_kib": "weights",
    "activation_kib_sum": "all activations of an image",
    "activation_kib_max": "largest activation",
}


@styled
def accuracy_against_size(groups: Sequence[Group], published: Sequence[Published]) -> Figure | None:
    """Top-1 over the KiB of the weights, with the front of those that none beats in both.

    What is far below the best is at the lower edge, with its figure: it would leave no room for differences.
    """
    points = [
        (g, g.values("weight_bytes").mean() / 1024, 100 * g.values("test_accuracy"))
        for g in groups
        if g.values("test_accuracy").size and g.values("weight_bytes").size
    ]
    if not points:
        return None
    shown = [p for p in published if p.kib is not None and p.accuracy is not None]
    means = [accuracies.mean() for _, _, accuracies in points] + [p.accuracy for p in shown]
    bottom = max(min(means) - 1.0, max(means) - _SPAN, 0.0)
    columns = 3 if max(len(plain(g.label)) for g, _, _ in points) < 30 else 2
    figure, ((axes,),) = new_figure(3.6 + 0.19 * -(-(len(points) + 2) // columns))
    _draw_front(axes, [(kib, accuracies.mean()) for _, kib, accuracies in points], bottom)
    for i, (g, kib, accuracies) in enumerate(points):
        mean, spread = accuracies.mean(), accuracies.std(ddof=1) if len(accuracies) > 1 else None
        style = dict(fmt=MARKS[(i + i // len(COLOURS)) % len(MARKS)], color=COLOURS[i % len(COLOURS)])
        at = (kib, max(mean, bottom))
        axes.errorbar(
            *at, None if mean < bottom else spread, **style, markersize=7, capsize=3, label=plain(g.label)
        )
        if mean < bottom:
            _note(axes, f"{mean:.1f} %", at)
    for i, p in enumerate(shown):
        below = p.accuracy < bottom
        at = (p.kib, max(p.accuracy, bottom))
        label = f"published: {p.source}" if i == 0 else None
        axes.plot(*at, "v" if below else "o", markerfacecolor="none", color=FAINT, label=label)
        _note(axes, f"{p.label} {p.accuracy:g} %" if below else p.label, at)
    sizes = [kib for _, kib, _ in points] + [p.kib for p in shown]
    if min(sizes) > 0 and max(sizes) > 3 * min(sizes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_ylim(bottom=bottom - 0.03 * (max(means) - bottom))  # At last: it ends the scaling to the points.
    axes.set_xlabel("weights (KiB)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]], bottom: float) -> None:
    front, best = [], -math.inf
    for kib, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if accuracy > best:
            best = accuracy
            front.append((kib, max(accuracy, bottom)))
    axes.step(*zip(*front, strict=True), where="post", color=FAINT, linewidth=1, label="Pareto front")


def _note(axes: Axes, text: str, at: tuple[float, float]) -> None:
    axes.annotate(plain(text), at, (4, 4), textcoords="offset points", color=FAINT, fontsize=7.5)


@styled
def accuracy_against_accumulator(groups: Sequence[Group], published: Sequence[Published]) -> Figure | None:
    """Top-1 over the accumulator width that the weights were trained for."""
    own = {}
    for g in groups:
        if g.first.accumulator is not None and g.values("test_accuracy").size:
            variant, bits = g.first.accumulator
            own.setdefault(variant, []).append((bits, 100 * g.values("test_accuracy").mean()))
    if not own:
        return None
    figure, ((axes,),) = new_figure(3.4)
    for i, (variant, points) in enumerate(sorted(own.items())):
        widths = [bits for bits, _ in points]
        line = LINES[i] if len(set(widths)) == len(widths) else ""  # Else they are of several recipes.
        axes.plot(*zip(*sorted(points), strict=True), MARKS[i] + line, color=COLOURS[i], label=variant)
    theirs = [p for p in published if p.accumulator_bits is not None]
    for i, (variant, rows) in enumerate(itertools.groupby(theirs, key=lambda p: p.label.split()[0])):
        rows = list(rows)
        axes.plot(
            [p.accumulator_bits for p in rows],
            [p.accuracy for p in rows],
            LINES[i % len(LINES)],
            marker=MARKS[i],
            markerfacecolor="none",
            color=FAINT,
            label=f"{variant}, published: {rows[0].source}",
        )
    axes.set_xlabel("accumulator (bits)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    axes.legend(fontsize=8)
    return figure


@styled
def curves(run: Run) -> Figure | None:
    """Loss and accuracy over epochs, or over steps while it is not known what an epoch is."""
    if not run.rows("train"):
        return None
    per_epoch = run.steps_per_epoch
    figure, ((loss, accuracy),) = new_figure(2.9, columns=2)
    styles = {"train": (COLOURS[0], "-"), "validation": (COLOURS[1], "--")}
    for group, (colour, line) in styles.items():
        for axes, name, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            steps, values = run.curve(group, name)
            if steps.size:
                axes.plot(steps / (per_epoch or 1), factor * values, line, color=colour, label=group)
    if {"steps", "test_loss"} <= set(run.result):
        end = run.result["steps"] / (per_epoch or 1)
        accuracy.plot(end, 100 * run.result["test_accuracy"], "*", color=DARK, markersize=10, label="test")
        loss.plot(end, run.result["test_loss"], "*", color=DARK, markersize=10, label="test")
    for axes, label in ((loss, "loss"), (accuracy, "top-1 accuracy (%)")):
        axes.set_xlabel("epoch" if per_epoch else "step")
        axes.set_ylabel(label)
    accuracy.legend()
    return figure


@styled
def widths_over_time(run: Run) -> Figure | None:
    """Bits of every layer at every evaluation; None where none ever changed."""
    rows = run.rows("layers")
    names = [
        name for name in (rows[-1] if rows else ()) if name.endswith(("/weight_bits", "/activation_bits"))
    ]
    bits = np.array([[row.get(name, np.nan) for row in rows] for name in names], np.float64)
    if not names or np.all(bits == bits[:, :1]):
        return None
    figure, axes = new_layers_figure([name.removesuffix("_bits") for name in names])
    image = axes.imshow(bits, aspect="auto", cmap="cividis", interpolation="nearest", origin="upper", vmin=0)
    every = max(1, -(-len(rows) // 8))
    axes.set_xticks(range(0, len(rows), every), [f"{row['step']:,}" for row in rows[::every]])
    axes.set_xlabel("step of the evaluation")
    axes.grid(visible=False)
    figure.colorbar(image, label="bits")
    return figure


@styled
def sizes_over_time(run: Run) -> Figure | None:
    """Each size that has a target, and the target."""
    targets = {name: run.config.size_targets[name] for name in _SIZES if run.config.size_targets[name]}
    targets = {name: target for name, target in targets.items() if run.curve("size", name)[0].size}
    if not targets:
        return None
    figure, axes = new_figure(2.6, columns=len(targets))
    for (name, target), ax in zip(targets.items(), axes[0], strict=True):
        ax.plot(*run.curve("size", name), "-o", color=COLOURS[0], markersize=3, label="reached")
        ax.axhline(target, color=COLOURS[1], linestyle="--", label="target")
        ax.set_xlabel("step")
        ax.set_ylabel(f"{_SIZES[name]} (KiB)")
        ax.set_ylim(bottom=0)
    axes[0, 0].legend()
    return figure


@styled
def accumulators(costs: Sequence[LayerCost], allowed: Mapping[str, int]) -> Figure | None:
    """Bits that each layer's sums need, by three bounds, and what its weights were trained for."""
    layers = [cost for cost in costs if cost.accumulation is not None]
    if not layers:
        return None
    figure, axes = new_layers_figure([cost.path for cost in layers])
    at = np.arange(len(layers))
    needed = [cost.accumulation.exact_bits for cost in layers]
    axes.barh(at, needed, 0.6, color=COLOURS[5], edgecolor="white", label="needed, exactly")
    norm = [cost.accumulation.norm_bits for cost in layers]
    types = [cost.accumulation.data_type_bits for cost in layers]
    axes.plot(norm, at, "D", color=COLOURS[0], markersize=4, label="by the weights' norm")
    axes.plot(types, at, ">", color=DARK, markersize=4, label="by the data types")
    bounded = [i for i, cost in enumerate(layers) if cost.path in allowed]
    if bounded:
        bits = [allowed[layers[i].path] for i in bounded]
        style = dict(linestyle="", marker="|", markersize=13, markeredgewidth=2.5, color=COLOURS[1])
        axes.plot(bits, bounded, **style, label="allowed")
    axes.set_xlabel("accumulator (bits)")
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    return figure


@styled
def weight_histograms(layers: Sequence[LayerKernel]) -> Figure | None:
    """Weights of each layer, in units of its scale: before rounding, and the codes on their grid."""
    if not layers:
        return None
    columns = 4
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(1.35 * rows + 0.5, rows, columns)
    for layer, ax in itertools.zip_longest(layers, axes.flat):
        if layer is None:
            ax.set_axis_off()
            continue
        edges, share = _code_histogram(layer.codes)
        ax.stairs(share / np.diff(edges), edges, fill=True, color=COLOURS[5], label="codes")
        if len(share) <= _MOST_GRID_LINES:
            ax.vlines(edges, 0, np.repeat(share / np.diff(edges), 2).max(), color="white", linewidth=0.5)
        if layer.weights is not None and len(share) > 1:
            bins = np.linspace(edges[0], edges[-1], 81)
            counts, _ = np.histogram(layer.weights, bins)
            density = 100 * counts / layer.weights.size / np.diff(bins)
            ax.plot((bins[1:] + bins[:-1]) / 2, density, color=COLOURS[1], linewidth=1, label="weights")
        ax.set_title(f"{plain(layer.path)}, {layer.bits:.3g} bits", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.grid(visible=False)
    figure.supxlabel("weight / scale", fontsize=8)
    figure.supylabel("share (% for each unit)", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return figure


def _code_histogram(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges half-way between the values on a grid, and the share of each in percent; of many, by bins."""
    values, counts = np.unique(codes, return_counts=True)
    share = 100 * counts / codes.size
    if len(values) == 1:
        return values[0] + np.array([-0.5, 0.5]), share
    if len(values) > _MOST_CODES:
        counts, edges = np.histogram(codes, _MOST_CODES)
        return edges, 100 * counts / codes.size
    middle = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])
    return edges, share


@styled
def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Share of each class's images that was told to be each class."""
    figure, ((axes,),) = new_figure(4.6)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for i, j in itertools.product(range(len(classes)), repeat=2):
            if share[i, j] >= 0.5:
                colour = "black" if share[i, j] > 55 else "white"
                axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("told class")
    axes.set_ylabel("true class")
    figure.colorbar(image, label="share of the true class (%)")
    return figure


@styled
def mistakes(images: np.ndarray, captions: Sequence[str]) -> Figure | None:
    """Images [n, height, width, channels], 0 to 255, with a caption each."""
    if not len(images):
        return None
    columns = 6
    rows = -(-len(images) // columns)
    figure, axes = new_figure(1.75 * rows, rows, columns)
    for image, caption, ax in itertools.zip_longest(images, captions, axes.flat):
        ax.set_axis_off()
        if image is not None:
            ax.imshow(image)
            ax.set_title(plain(caption), fontsize=7.5)
    return figure
