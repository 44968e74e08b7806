"""The table over groups of runs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qflax.report.network import Network
from qflax.report.runs import Group, Run


def table_row(group: Group, networks: Mapping[Run, Network], file_bytes: Mapping[Run, int]) -> dict[str, str]:
    """What the table says of a group.

    Args:
      group: of runs.
      networks: of those runs that have one.
      file_bytes: sizes of their packed files.
    """
    run = group.first
    steps = [row["step"] for row in run.rows("train")]
    files = [file_bytes[own] for own in group.ended if own in file_bytes]
    on_cpu = all(device.endswith("(cpu)") for device in _distinct(group.runs, "device"))
    difference = "" if group.difference is None else f"{100 * group.difference:+.2f}"
    return {
        "name": group.label,
        "seeds": str(len(group.ended)),
        "accuracy": _spread(100 * group.values("test_accuracy")) or f"at step {max(steps, default=0):,}",
        "difference": f"{difference} ({group.baseline})" if difference else "",
        "size": _spread(group.values("weight_bytes") / 1024),
        "file": _spread(np.array(files) / 1024),
        "operations": _spread(group.values("bit_operations") / 1e9),
        "accumulator": _accumulator(group, networks),
        "epochs": _spread(group.values("epochs")),
        "minutes": _spread(group.values("ptq_seconds" if "recipe" in run.result else "train_seconds") / 60),
        "hardware": "; ".join(_distinct(group.runs, "processor" if on_cpu else "device")),
        "commit": ", ".join(_short(commit) for commit in _distinct(group.runs, "commit")),
        "command": str((run.starts[-1] if run.starts else {}).get("command", "")),
    }


def _accumulator(group: Group, networks: Mapping[Run, Network]) -> str:
    """Bits that the widest accumulator needs, and of those with a bound."""
    text = "/".join(f"{bits:g}" for bits in np.unique(group.values("accumulator_bits")))
    found = [networks[run] for run in group.ended if run in networks]
    bounded = [network for network in found if network.bounded_bits is not None]
    if not bounded:
        return text
    needed = max(network.bounded_bits for network in bounded)
    allowed = max(max(network.allowed.values()) for network in bounded)
    return f"{text}; bounded: {needed} of {allowed}"


def _distinct(runs: Sequence[Run], name: str) -> list[str]:
    return list(dict.fromkeys(str(start[name]) for run in runs for start in run.starts if name in start))


def _short(commit: str) -> str:
    number, plus, _ = commit.partition("+")
    return number[:7] + (", changed files" if plus else "")


def _spread(values: np.ndarray) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values.size or not math.isfinite(values.mean()):
        return ""
    mean = f"{values.mean():,.2f}" if values.mean() < 100 else f"{values.mean():,.1f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.2f}"
