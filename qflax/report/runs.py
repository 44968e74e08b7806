"""Runs as reports see them: read from workdirs alone."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.quantizers import ROLES
from qflax.training import workdir as workdir_lib
from qflax.training.logs import read_metrics

_PLACES = ("init_from", "seed")  # They tell runs of one kind apart, not kinds.
_NETWORK = ("dataset", "model", "stem", "shortcut", "residual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One workdir.

    Attributes:
      folder: the workdir.
      name: the end of its path that tells it from other runs.
      config: its configuration.
      result: what its end was, or an empty mapping before it.
      metrics: the rows of `metrics.jsonl`.
      starts: versions, commit, hardware and command of every start.
    """

    folder: pathlib.Path
    name: str
    config: ml_collections.ConfigDict
    result: Mapping[str, object]
    metrics: Sequence[Mapping[str, object]]
    starts: Sequence[Mapping[str, object]]

    @property
    def quantized(self) -> bool:
        """Whether anything has a quantizer."""
        return any(self.config[role] is not None for role in ROLES) or bool(self.config.rules)

    @property
    def kind(self) -> str:
        """Digest of the configuration without the seed and the run that it starts from."""
        fields = config_lib.plain(self.config)
        same = {name: fields[name] for name in fields if name not in (*_PLACES, *config_lib.OPERATIONAL)}
        same["without training"] = "recipe" in self.result
        text = json.dumps(same, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def network(self) -> tuple:
        """What it shares with the float network that it is compared to."""
        return tuple(self.config[name] for name in _NETWORK)

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the run's end, when its log does not know."""
        return self.result["steps"] / self.result["epochs"] if self.result.get("epochs") else None

    def rows(self, group: str) -> list[Mapping[str, object]]:
        """The logged rows of a group, such as `train`."""
        return [row for row in self.metrics if row["group"] == group]

    def curve(self, group: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a number, float64 [n] each, where it was logged."""
        points = [(row["step"], row[name]) for row in self.rows(group) if name in row]
        return tuple(np.array(points, np.float64).reshape(-1, 2).T)


def read_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
    """Reads workdirs, each once; a run that goes on may write its own meanwhile.

    Raises:
      UserError: one is none, or damaged.
    """
    folders = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return [_read(folder, "/".join(folder.parts[-parts:])) for folder in folders]


def _read(folder: pathlib.Path, name: str) -> Run:
    config = config_lib.load(folder)
    ended = (folder / workdir_lib.RESULT_FILE).exists()
    return Run(
        folder=folder,
        name=name,
        config=config,
        result=workdir_lib.load_result(folder) if ended else {},
        metrics=read_metrics(folder),
        starts=workdir_lib.load_starts(folder),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ by their seed only, and where they come from.

    Attributes:
      runs: at least one; those that have ended first.
      baseline: the float runs of the same network that they are compared to, or None.
    """

    runs: Sequence[Run]
    baseline: "Group | None" = None

    @property
    def first(self) -> Run:
        """The run that stands for all in what they share."""
        return self.runs[0]

    @property
    def label(self) -> str:
        """Name of the first run, without what is only of its seed."""
        name = self.first.name
        suffix = f"-seed{self.first.config.seed}"
        return name.removesuffix(suffix) or name

    def values(self, name: str) -> np.ndarray:
        """A number of the results, float64 [runs that have it]."""
        found = [run.result[name] for run in self.runs if isinstance(run.result.get(name), int | float)]
        return np.array(found, np.float64)

    @property
    def difference(self) -> float | None:
        """Mean accuracy less that of the float network."""
        if self.baseline is None:
            return None
        own, theirs = self.values("test_accuracy"), self.baseline.values("test_accuracy")
        return float(own.mean() - theirs.mean()) if own.size and theirs.size else None


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs in groups: networks in their order, in each the most accurate first, unfinished ones last."""
    by_kind = {}
    for run in runs:
        # Runs of several seeds start from float runs of several seeds.
        source = pathlib.Path(run.config.init_from).name
        sources = {other.kind for other in _named(source, run, runs)} or {source}
        by_kind.setdefault((run.network, run.kind, *sorted(sources)), []).append(run)
    groups = [Group(runs=sorted(own, key=lambda run: not run.result)) for own in by_kind.values()]
    paired = [dataclasses.replace(group, baseline=_baseline(group, groups)) for group in groups]
    networks = list(dict.fromkeys(run.network for run in runs))

    def rank(group):
        accuracies = group.values("test_accuracy")
        return networks.index(group.first.network), -accuracies.mean() if accuracies.size else 1.0

    return sorted(paired, key=rank)


def _named(name: str, run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs of the same network in a folder of that name."""
    return [other for other in runs if other.folder.name == name and other.network == run.network]


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The float runs that a group started from, else the most accurate ones of the same network."""
    if not group.first.quantized:
        return None
    floats = [g for g in groups if not g.first.quantized and g.first.network == group.first.network]
    floats = [g for g in floats if g.values("test_accuracy").size]
    sources = {pathlib.Path(run.config.init_from).name for run in group.runs if run.config.init_from}
    starts = [g for g in floats if sources & {run.folder.name for run in g.runs}]
    return max(starts or floats, key=lambda g: g.values("test_accuracy").mean(), default=None)
