"""Runs as reports see them: read from workdirs alone."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.errors import UserError, require
from qflax.quantizers import ROLES, AccumulatorAware, quantization_from_config, spec_from_dict
from qflax.training import workdir as workdir_lib
from qflax.training.logs import read_metrics

_OF_ONE_RUN = ("init_from", "seed")  # They tell runs of one kind apart, not kinds.
_NETWORK = ("dataset", "model", "stem", "shortcut", "residual")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
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
        """Digest of the configuration without the seed and the runs that it starts and learns from."""
        digest = _digest(self.config)
        return f"{digest}, without training" if "recipe" in self.result else digest

    @property
    def network(self) -> tuple:
        """What it shares with the float network that it is compared to."""
        return tuple(self.config[name] for name in _NETWORK)

    @property
    def accumulator(self) -> tuple[str, int] | None:
        """Variant and bits of the accumulator-aware weights, where all have the same; else None."""
        policy = quantization_from_config(self.config.to_dict())
        fields = [rule.overrides.get("weights") or {} for rule in policy.rules]
        specs = [
            policy.weights,
            *(spec_from_dict(own, "weights", "config.rules") for own in fields if "kind" in own),
        ]
        found = {(s.variant, s.accumulator_bits) for s in specs if isinstance(s, AccumulatorAware)}
        return found.pop() if len(found) == 1 else None

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the run's end, when its log does not know."""
        steps, epochs = self.result.get("steps"), self.result.get("epochs")
        return steps / epochs if steps and epochs else None

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
    require(bool(folders), "no workdirs given; name the folders of some runs")
    folders = list(dict.fromkeys(pathlib.Path(folder).resolve() for folder in folders))
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return [_read(folder, "/".join(folder.parts[-parts:])) for folder in folders]


def is_workdir(folder: pathlib.Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / config_lib.FILE).is_file()


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
    """Runs that differ by their seed only, and by the seed of those that they start from.

    Attributes:
      label: name of the first run, without what is only of its seed.
      runs: at least one, no seed twice; those that have ended first.
      baseline: label of the float network that they are compared to, or an empty text.
      difference: mean accuracy less the float network's, or None. Each run is compared to the float run that
        it descends from; where none is known, all to the most accurate float runs of the same network.
    """

    label: str
    runs: Sequence[Run]
    baseline: str = ""
    difference: float | None = None

    @property
    def first(self) -> Run:
        """The run that stands for all in what they share."""
        return self.runs[0]

    @property
    def ended(self) -> list[Run]:
        """The runs that have a result."""
        return [run for run in self.runs if run.result]

    def values(self, name: str) -> np.ndarray:
        """A number of the results, float64 [runs that have it]."""
        found = [run.result[name] for run in self.ended if isinstance(run.result.get(name), int | float)]
        return np.array(found, np.float64)


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs in groups: networks in their order, in each the most accurate first, unfinished ones last."""
    parts, seen = {}, collections.Counter()
    for run in runs:
        kind = run.network, run.kind, _kind_of_source(run, runs)
        again = seen[kind, run.config.seed]  # Runs of one seed tell nothing of the spread over seeds.
        seen[kind, run.config.seed] += 1
        parts.setdefault((*kind, again), []).append(run)
    parts = [sorted(own, key=lambda run: not run.result) for own in parts.values()]
    short = [_seedless(own[0].name, own[0].config) for own in parts]
    labels = [name if short.count(name) == 1 else own[0].name for own, name in zip(parts, short, strict=True)]
    groups = [Group(label=label, runs=own) for label, own in zip(labels, parts, strict=True)]
    networks = list(dict.fromkeys(run.network for run in runs))

    def rank(group):
        accuracies = group.values("test_accuracy")
        return networks.index(group.first.network), -accuracies.mean() if accuracies.size else 1.0

    return sorted((_compared(group, groups, runs) for group in groups), key=rank)


def _seedless(name: str, config: ml_collections.ConfigDict) -> str:
    """The name of a run without what is only of its seed."""
    return name.removesuffix(f"-seed{config.seed}") or name


def _digest(config: ml_collections.ConfigDict) -> str:
    fields = config_lib.plain(config)
    same = {name: fields[name] for name in fields if name not in (*_OF_ONE_RUN, *config_lib.OPERATIONAL)}
    same["distillation"] = {name: x for name, x in fields["distillation"].items() if name != "teacher"}
    teacher = config.distillation.teacher
    same["teacher"] = (
        "source" if teacher == config.init_from else _seedless(pathlib.Path(teacher).name, config)
    )
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def _source(run: Run, runs: Sequence[Run]) -> Run | None:
    """The run among others that one started from: in that folder, else the one whose path ends most alike."""
    if not run.config.init_from:
        return None
    wanted = pathlib.Path(run.config.init_from).resolve()
    alike = [(_common_end(other.folder, wanted), other) for other in runs if other is not run]
    most = max((count for count, _ in alike), default=0)
    best = [other for count, other in alike if count == most]
    return best[0] if most and len(best) == 1 else None


def _common_end(a: pathlib.Path, b: pathlib.Path) -> int:
    pairs = zip(reversed(a.parts), reversed(b.parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _kind_of_source(run: Run, runs: Sequence[Run]) -> str:
    """What runs of one group have in common of the runs that they start from."""
    source = _source(run, runs)
    if source is not None:
        return source.kind
    folder = pathlib.Path(run.config.init_from)
    if not run.config.init_from:
        return ""
    try:
        return _digest(config_lib.load(folder))
    except UserError:  # It is elsewhere now.
        return _seedless(folder.name, run.config)


def _ancestor(run: Run, runs: Sequence[Run]) -> Run | None:
    """The float run that one descends from."""
    seen = []
    while run is not None and run.quantized and run not in seen:
        seen.append(run)
        run = _source(run, runs)
    return None if run is None or run.quantized else run


def _compared(group: Group, groups: Sequence[Group], runs: Sequence[Run]) -> Group:
    """The group with its difference to float."""
    if not group.first.quantized or not group.ended:
        return group
    pairs = [(run, _ancestor(run, runs)) for run in group.ended]
    pairs = [(run, floats) for run, floats in pairs if floats is not None and floats.result]
    if pairs:
        (baseline,) = (g for g in groups if pairs[0][1] in g.runs)
        gaps = [run.result["test_accuracy"] - floats.result["test_accuracy"] for run, floats in pairs]
        return dataclasses.replace(group, baseline=baseline.label, difference=float(np.mean(gaps)))
    floats = [g for g in groups if not g.first.quantized and g.first.network == group.first.network]
    floats = [g for g in floats if g.ended]
    if not floats:
        return group
    best = max(floats, key=lambda g: g.values("test_accuracy").mean())
    gap = group.values("test_accuracy").mean() - best.values("test_accuracy").mean()
    return dataclasses.replace(group, baseline=best.label, difference=float(gap))
