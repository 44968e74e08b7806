"""Plots of reports."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from qflax.layers import LayerCost
from qflax.report.published import Published
from qflax.report.runs import Group, Run
from qflax.training.kernels import LayerKernel
from qflax.training.plots import COLOURS, DARK, FAINT, LINES, MARKS, name_layers, new_figure, styled

_SIZES = {  # Target -> what it is about.
    "weight_kib": "weights",
    "activation_kib_sum": "all activations of an image",
    "activation_kib_max": "largest activation",
}


@styled
def accuracy_against_size(groups: Sequence[Group], published: Sequence[Published]) -> Figure | None:
    """Top-1 over the KiB of the weights, with the front of those that none beats in both."""
    points = [
        (g, g.values("weight_bytes").mean() / 1024, 100 * g.values("test_accuracy"))
        for g in groups
        if g.values("test_accuracy").size and g.values("weight_bytes").size
    ]
    if not points:
        return None
    figure, ((axes,),) = new_figure(4.2)
    front, best = [], -math.inf
    for _, kib, accuracies in sorted(points, key=lambda p: (p[1], -p[2].mean())):
        if accuracies.mean() > best:
            best = accuracies.mean()
            front.append((kib, best))
    axes.step(*zip(*front, strict=True), where="post", color=FAINT, linewidth=1, label="Pareto front")
    for (g, kib, accuracies), colour, mark in zip(
        points, itertools.cycle(COLOURS), itertools.cycle(MARKS), strict=False
    ):
        spread = accuracies.std(ddof=1) if len(accuracies) > 1 else None
        axes.errorbar(
            kib, accuracies.mean(), spread, fmt=mark, color=colour, markersize=7, capsize=3, label=g.label
        )
    lowest = min(accuracies.min() for _, _, accuracies in points)
    shown = [p for p in published if p.kib is not None and p.accuracy is not None]
    # One that is far below would leave no room for differences between ours.
    bottom = max(0.0, lowest - max(5.0, 0.5 * (max([best, *(p.accuracy for p in shown)]) - lowest)))
    if shown:
        marks = [("o", [p for p in shown if p.accuracy >= bottom])]
        marks.append(("v", [p for p in shown if p.accuracy < bottom]))
        for mark, rows in marks:
            axes.plot(
                [p.kib for p in rows],
                [max(p.accuracy, bottom) for p in rows],
                linestyle="",
                marker=mark,
                markerfacecolor="none",
                color=FAINT,
                clip_on=False,
                label=f"published: {shown[0].source}" if mark == "o" else None,
            )
            for p in rows:
                text = p.label if mark == "o" else f"{p.label} {p.accuracy:g} %"
                at = (p.kib, max(p.accuracy, bottom))
                axes.annotate(text, at, (4, 4), textcoords="offset points", color=FAINT, fontsize=7.5)
        axes.set_ylim(bottom=bottom)  # At last: it ends the scaling to what is drawn.
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("weights (KiB)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


@styled
def accuracy_against_accumulator(groups: Sequence[Group], published: Sequence[Published]) -> Figure | None:
    """Top-1 over the accumulator width that the weights were trained for."""
    own = {}
    for g in groups:
        weights = g.first.config.weights
        if weights is not None and weights.kind == "accumulator_aware" and g.values("test_accuracy").size:
            own.setdefault(weights.variant, []).append(
                (weights.accumulator_bits, 100 * g.values("test_accuracy").mean())
            )
    if not own:
        return None
    figure, ((axes,),) = new_figure(3.4)
    for i, (variant, points) in enumerate(sorted(own.items())):
        axes.plot(*zip(*sorted(points), strict=True), MARKS[i] + LINES[i], color=COLOURS[i], label=variant)
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
    if run.result:
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
    """Bits of every layer at every evaluation, where they are learned."""
    rows = run.rows("layers")
    names = [
        name for name in (rows[-1] if rows else ()) if name.endswith(("/weight_bits", "/activation_bits"))
    ]
    bits = np.array([[row.get(name, np.nan) for row in rows] for name in names], np.float64)
    changing = [i for i in range(len(names)) if np.ptp(bits[i]) > 0]
    if not changing:
        return None
    figure, ((axes,),) = new_figure(1.6 + 0.17 * len(changing))
    image = axes.imshow(
        bits[changing], aspect="auto", cmap="cividis", interpolation="nearest", origin="upper", vmin=0
    )
    axes.set_yticks(range(len(changing)), [names[i].removesuffix("_bits") for i in changing], fontsize=7)
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
def accumulators(costs: Sequence[LayerCost], allowed: int | None) -> Figure | None:
    """Bits that each layer's sums need, by three bounds, and what its weights were trained for."""
    layers = [cost for cost in costs if cost.accumulation is not None]
    if not layers:
        return None
    figure, ((axes,),) = new_figure(3.2)
    at = np.arange(len(layers))
    needed = [cost.accumulation.exact_bits for cost in layers]
    axes.bar(at, needed, 0.6, color=COLOURS[5], edgecolor="white", label="needed, exactly")
    norm = [cost.accumulation.norm_bits for cost in layers]
    types = [cost.accumulation.data_type_bits for cost in layers]
    axes.plot(at, norm, "D", color=COLOURS[0], markersize=4, label="by the weights' norm")
    axes.plot(at, types, "v", color=DARK, markersize=4, label="by the data types")
    if allowed is not None:
        axes.axhline(allowed, color=COLOURS[1], linestyle="--", label=f"allowed ({allowed})")
    name_layers(axes, [cost.path for cost in layers])
    axes.set_ylabel("accumulator (bits)")
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    return figure


@styled
def weight_histograms(layers: Sequence[LayerKernel]) -> Figure | None:
    """Weights of each layer in steps of its grid: before rounding, and the codes."""
    if not layers:
        return None
    columns = 4
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(1.35 * rows + 0.5, rows, columns)
    for layer, ax in itertools.zip_longest(layers, axes.flat):
        if layer is None:
            ax.set_axis_off()
            continue
        values, counts = np.unique(layer.codes, return_counts=True)
        share = 100 * counts / layer.codes.size
        width = np.min(np.diff(values), initial=1.0) * (0.9 if len(values) <= 32 else 1.0)
        ax.bar(values, share, width, color=COLOURS[5], label="codes", antialiased=len(values) <= 32)
        if layer.weights is not None and len(values) > 1:
            edges = np.linspace(values[0] - 0.5, values[-1] + 0.5, 81)
            counts, _ = np.histogram(layer.weights, edges)
            per_step = 100 * counts / layer.weights.size / (edges[1] - edges[0])
            ax.plot((edges[1:] + edges[:-1]) / 2, per_step, color=COLOURS[1], linewidth=1, label="weights")
        ax.set_title(f"{layer.path}, {layer.bits:.3g} bits", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.grid(visible=False)
    figure.supxlabel("weight (steps of its grid)", fontsize=8)
    figure.supylabel("share (% of a step)", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    return figure


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
            ax.set_title(caption, fontsize=7.5)
    return figure
