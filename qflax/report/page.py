"""The page: one HTML file that needs no other, and its plots as PNG files."""

import base64
import hashlib
import io
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence

import jinja2
from matplotlib.figure import Figure

from qflax.errors import UserError, require
from qflax.files import write_atomically
from qflax.report import figures
from qflax.report.network import Network, file_bytes, inspect
from qflax.report.predictions import predict
from qflax.report.published import PUBLISHED
from qflax.report.runs import Group, Run, groups_of, is_workdir, read_runs
from qflax.report.table import table_row
from qflax.training.plots import layer_widths

PAGE = "index.html"
_MARK = '<meta name="generator" content="qflax report">'  # By which a report is known.
_DPI = 110
_LONGEST_NAME = 100
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
      output: folder to make or to write anew; what is in it must be a report of `qflax`.
      test_images: whether trained networks are run on the test images.
      data_dir: where TFDS keeps its data sets, instead of what the runs' configurations say.
      say: is told what is left out, and why.

    Returns:
      The page's file.

    Raises:
      UserError: none is a workdir, or one is damaged; the folder holds something else.
    """
    begun = [folder for folder in workdirs if is_workdir(folder)]
    runs = read_runs(begun or workdirs)  # Without any, the first is told of.
    for folder in workdirs:
        if folder not in begun:
            say(f"{folder}: left out: not a workdir, or a run is about to begin there")
    require(
        not output.exists() or (output.is_dir() and (not any(output.iterdir()) or _MARK in _earlier(output))),
        f"{output}: holds something that is no report; choose another --output (or delete it, if it is one "
        "of an earlier version)",
    )
    output.mkdir(parents=True, exist_ok=True)
    _clear(output)
    page = _Page(output, say)
    groups = groups_of(runs)
    details = [page.details(run, test_images, data_dir) for group in groups for run in group.runs]
    networks = [page.network(title, own) for title, own in _by_network(groups).items()]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(networks=networks, runs=details, number=len(runs), mark=_MARK)
    write_atomically(output / PAGE, text.encode("utf-8", "backslashreplace"))
    return output / PAGE


def _earlier(output: pathlib.Path) -> str:
    """The page that is there, or nothing."""
    page = output / PAGE
    return page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""


def _clear(output: pathlib.Path) -> None:
    """Takes out the plots that an earlier page names, and leaves a page by which the folder is known."""
    for name in re.findall(r"Also in ([\w.+-]+\.png)\.", _earlier(output)):
        (output / name).unlink(missing_ok=True)
    write_atomically(output / PAGE, f"{_MARK}It is being made.\n")


def _by_network(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Title -> the groups of one network; a title says what tells it from others of its name."""
    parts = {}
    for group in groups:
        parts.setdefault(group.first.network, []).append(group)
    titles = {}
    for network, own in parts.items():
        dataset, model, *details = network
        alike = [other[2:] for other in parts if other[:2] == network[:2]]
        telling = [x for i, x in enumerate(details) if len({other[i] for other in alike}) > 1]
        titles[", ".join((f"{model} on {dataset}", *map(str, telling)))] = own
    return titles


class _Page:
    """Makes the parts of a page, and writes each plot into its folder."""

    def __init__(self, folder: pathlib.Path, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._networks: dict[Run, Network] = {}
        self._file_bytes: dict[Run, int] = {}  # Of packed files.
        self._files = set()

    def network(self, title: str, groups: Sequence[Group]) -> dict:
        """The runs of one network on one data set."""
        config = groups[0].first.config
        published = [p for p in PUBLISHED if (p.dataset, p.model) == (config.dataset, config.model)]
        bounded = [group for group in groups if group.first.accumulator is not None]
        plots = [
            self._plot(
                f"{title}-size",
                figures.accuracy_against_size(groups, published),
                "Accuracy against the size of the weights; bars are a standard deviation over seeds.",
                [run for group in groups for run in group.ended],
            ),
            self._plot(
                f"{title}-accumulator",
                figures.accuracy_against_accumulator(bounded, published),
                "Accuracy against the accumulator width that the weights were trained for.",
                [run for group in bounded for run in group.ended],
            ),
        ]
        return {
            "title": title,
            "rows": [
                {"anchor": _anchor(g.first), **table_row(g, self._networks, self._file_bytes)} for g in groups
            ],
            "plots": [plot for plot in plots if plot],
        }

    def details(self, run: Run, test_images: bool, data_dir: str) -> dict:
        """All about one run."""
        notes = []
        if not run.result:
            imported = run.starts[-1].get("imported_from") if run.starts else None
            notes.append(
                f"Its weights are imported from {imported}; no figures here are of them."
                if imported
                else "It has not ended yet."
            )
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
            network = self._networks[run] = inspect(run)
        except UserError as error:
            notes.append(f"Nothing of its layers: {error}.")
        else:
            step = f"At step {network.step:,}."
            plots += [
                ("widths", layer_widths(network.costs), f"Bits along the network. {step}"),
                (
                    "accumulators",
                    figures.accumulators(network.costs, network.allowed),
                    f"Accumulator bits that each layer needs, by three bounds. {step}",
                ),
                ("weights", figures.weight_histograms(network.kernels), f"Weights on their grids. {step}"),
            ]
            try:
                self._file_bytes[run] = file_bytes(run)
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
            **{name: _over_starts(run, name) for name in ("commit", "device", "processor")},
            "versions": ", ".join(f"{k} {v}" for k, v in (origin.get("versions") or {}).items()),
        }
        made = [self._plot(f"{run.name}-{name}", figure, text, [run]) for name, figure, text in plots]
        return {
            "name": run.name,
            "anchor": _anchor(run),
            "facts": facts,
            "notes": notes,
            "plots": [plot for plot in made if plot],
        }

    def _of_test_images(self, run: Run, data_dir: str, notes: list[str]) -> list[tuple]:
        try:
            said = predict(run, data_dir=data_dir)
        except UserError as error:
            notes.append(f"Nothing of test images: {error}.")
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

    def _plot(self, name: str, figure: Figure | None, text: str, sources: Sequence[Run]) -> dict | None:
        """Writes a plot; what the page shows of it."""
        if figure is None:
            return None
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
        file = self._folder / f"{self._unused(re.sub(r'[^A-Za-z0-9_.+-]', '-', name))}.png"
        write_atomically(file, stream.getvalue())
        data, runs = base64.b64encode(stream.getvalue()).decode(), ", ".join(run.name for run in sources)
        return {"data": data, "file": file.name, "text": text, "sources": runs}

    def _unused(self, name: str) -> str:
        """A file's name, shortened, and numbered where it is taken; some file systems ignore case."""
        short = name[-_LONGEST_NAME:]
        names = itertools.chain([short], (f"{short}-{i}" for i in itertools.count(2)))
        free = next(name for name in names if name.lower() not in self._files)
        self._files.add(free.lower())
        return free


def _anchor(run: Run) -> str:
    return f"run-{hashlib.sha256(str(run.folder).encode(errors='surrogateescape')).hexdigest()[:8]}"


def _over_starts(run: Run, name: str) -> str:
    """What the starts of a run say of one thing, with the steps from which it changed."""
    changes = []
    for start in run.starts:
        value = str(start.get(name, "unknown"))
        if not changes or changes[-1][1] != value:
            changes.append((start.get("from_step", 0), value))
    if len(changes) <= 1:
        return changes[0][1] if changes else "unknown"
    return "; ".join(f"{value} from step {step:,}" for step, value in changes)
