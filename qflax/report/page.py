"""The page: one HTML file that needs no other, and its plots as PNG files."""

import base64
import io
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import jinja2
import numpy as np
from matplotlib.figure import Figure

from qflax.errors import UserError, require
from qflax.files import write_atomically
from qflax.report import figures
from qflax.report.network import file_bytes, inspect
from qflax.report.predictions import predict
from qflax.report.published import PUBLISHED
from qflax.report.runs import Group, Run, groups_of, read_runs
from qflax.training.plots import layer_widths

PAGE = "index.html"
_DPI = 110
_TEMPLATE = pathlib.Path(__file__).with_name("page.html")


def write_report(
    workdirs: Sequence[pathlib.Path],
    output: pathlib.Path,
    *,
    test_images: bool = True,
    data_dir: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> pathlib.Path:
    """Writes the page about some runs.

    Args:
      workdirs: of the runs, at least one.
      output: folder to make or to write anew; what is in it must be a report.
      test_images: whether trained networks are run on the test images.
      data_dir: where TFDS keeps its data sets, instead of what the runs' configurations say.
      say: is told what is left out, and why.

    Returns:
      The page's file.

    Raises:
      UserError: a workdir is none or damaged; the folder holds something else.
    """
    require(bool(workdirs), "no workdirs given; name the folders of some runs")
    runs = read_runs(workdirs)
    require(
        not output.exists() or (output.is_dir() and (not any(output.iterdir()) or (output / PAGE).exists())),
        f"{output}: holds something that is no report; choose another --output",
    )
    output.mkdir(parents=True, exist_ok=True)
    page = _Page(output, say)
    groups = groups_of(runs)
    details = [page.details(run, test_images, data_dir) for group in groups for run in group.runs]
    networks = [page.network(own) for own in _by_network(groups)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(networks=networks, runs=details, number=len(runs))
    write_atomically(output / PAGE, text)
    return output / PAGE


def _by_network(groups: Sequence[Group]) -> list[list[Group]]:
    parts = {}
    for group in groups:
        parts.setdefault(group.first.network, []).append(group)
    return list(parts.values())


class _Page:
    """Makes the parts of a page, and writes each plot into its folder."""

    def __init__(self, folder: pathlib.Path, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._file_bytes = {}  # Name of a run -> size of its packed file.

    def network(self, groups: Sequence[Group]) -> dict:
        """The runs of one network on one data set."""
        config = groups[0].first.config
        published = [p for p in PUBLISHED if (p.dataset, p.model) == (config.dataset, config.model)]
        name, sources = f"{config.model}-{config.dataset}", [g.label for g in groups]
        plots = [
            self._plot(
                f"{name}-size",
                figures.accuracy_against_size(groups, published),
                "Accuracy against the size of the weights; bars are a standard deviation over seeds.",
                sources,
            ),
            self._plot(
                f"{name}-accumulator",
                figures.accuracy_against_accumulator(groups, published),
                "Accuracy against the accumulator width that the weights were trained for.",
                sources,
            ),
        ]
        return {
            "title": f"{config.model} on {config.dataset}",
            "rows": [_row(group, self._file_bytes) for group in groups],
            "plots": [plot for plot in plots if plot],
        }

    def details(self, run: Run, test_images: bool, data_dir: str) -> dict:
        """All about one run."""
        notes = [] if run.result else ["It has not ended yet."]
        plots = [
            (
                "curves",
                figures.curves(run),
                "Loss and accuracy; those of training are of augmented images and smoothed labels.",
            ),
            ("widths-over-time", figures.widths_over_time(run), "Bits of each layer while they are learned."),
            ("sizes", figures.sizes_over_time(run), "Sizes and their targets."),
        ]
        try:
            network = inspect(run)
        except UserError as error:
            notes.append(f"Nothing of its layers: {error}.")
        else:
            weights, step = run.config.weights, f"At step {network.step:,}."
            allowed = getattr(weights, "accumulator_bits", None) if weights is not None else None
            plots += [
                ("widths", layer_widths(network.costs), f"Bits along the network. {step}"),
                (
                    "accumulators",
                    figures.accumulators(network.costs, allowed),
                    f"Accumulator bits that each layer needs, by three bounds. {step}",
                ),
                ("weights", figures.weight_histograms(network.kernels), f"Weights on their grids. {step}"),
            ]
            try:
                self._file_bytes[run.name] = file_bytes(run)
            except UserError as error:
                notes.append(f"No size of its file: {error}.")
        if test_images and run.result:
            plots += self._of_test_images(run, data_dir, notes)
        for note in notes:
            self._say(f"{run.folder}: {note}")
        origin = run.starts[-1] if run.starts else {}
        facts = {
            "folder": run.folder,
            "command": origin.get("command", "unknown"),
            "commit": origin.get("commit", "unknown"),
            "device": origin.get("device", "unknown"),
            "processor": origin.get("processor", "unknown"),
            "versions": ", ".join(f"{k} {v}" for k, v in origin.get("versions", {}).items()),
        }
        made = [self._plot(f"{run.name}-{name}", figure, text, [run.name]) for name, figure, text in plots]
        return {"name": run.name, "facts": facts, "notes": notes, "plots": [plot for plot in made if plot]}

    def _of_test_images(self, run: Run, data_dir: str, notes: list[str]) -> list[tuple]:
        try:
            said = predict(run, data_dir=data_dir)
        except UserError as error:
            notes.append(f"Nothing of test images: {error}.")
            return []
        if said is None:
            notes.append("Nothing of test images: the data set is not held in memory.")
            return []
        captions = [
            f"{said.classes[told]}, {confidence:.0%}\n(is {said.classes[label]})"
            for told, confidence, label in zip(said.told, said.confidence, said.labels, strict=True)
        ]
        told = f"{said.accuracy:.2%} of {said.confusion.sum():,} test images are told right."
        return [
            ("confusion", figures.confusion(said.confusion, said.classes), f"Told classes. {told}"),
            ("mistakes", figures.mistakes(said.images, captions), "The most confident mistakes."),
        ]

    def _plot(self, name: str, figure: Figure | None, text: str, sources: Sequence[str]) -> dict | None:
        """Writes a plot; what the page shows of it."""
        if figure is None:
            return None
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
        file = self._folder / f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', name)}.png"
        write_atomically(file, stream.getvalue())
        data = base64.b64encode(stream.getvalue()).decode()
        return {"data": data, "file": file.name, "text": text, "sources": ", ".join(sources)}


def _row(group: Group, file_bytes: Mapping[str, int]) -> dict[str, str]:
    """A line of the table."""
    run = group.first
    origin = run.starts[-1] if run.starts else {}
    steps = [row["step"] for row in run.rows("train")]
    files = [file_bytes[run.name] for run in group.runs if run.name in file_bytes]
    state = "" if run.result else f"at step {max(steps, default=0):,}"
    return {
        "name": group.label,
        "seeds": str(sum(bool(run.result) for run in group.runs)),
        "accuracy": _spread(100 * group.values("test_accuracy")) or state,
        "difference": "" if group.difference is None else f"{100 * group.difference:+.2f}",
        "size": _spread(group.values("weight_bytes") / 1024),
        "file": _spread(np.array(files) / 1024),
        "operations": _spread(group.values("bit_operations") / 1e9),
        "accumulator": "/".join(f"{bits:g}" for bits in np.unique(group.values("accumulator_bits"))),
        "epochs": _spread(group.values("epochs")),
        "minutes": _spread(group.values("ptq_seconds" if "recipe" in run.result else "train_seconds") / 60),
        "hardware": str(origin.get("processor" if "cpu" in origin.get("device", "") else "device", "")),
        "commit": str(origin.get("commit", ""))[:7],
        "command": str(origin.get("command", "")),
    }


def _spread(values: np.ndarray) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values.size or not math.isfinite(values.mean()):
        return ""
    mean = f"{values.mean():,.2f}" if values.mean() < 100 else f"{values.mean():,.1f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.2f}"
