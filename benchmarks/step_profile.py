"""Where the time of a training step goes, by operation.

python -m benchmarks.step_profile --contenders 'qflax float' 'qflax int4 lsq' --output=FILE

What JAX's profiler has seen of some steps, added up over the operations of a kind, per step and device. On a
CPU it does not see the threads that convolve: what is left of the step is theirs, and that of waiting for
them. On an accelerator `busy` is the share of the time in which at least one operation ran. Several
contenders run one after another, so compare shares rather than seconds.
"""

import argparse
import collections
import glob
import json
import pathlib
import re
import tempfile
import time

import jax

from benchmarks.contenders import CONTENDERS
from benchmarks.peers.problem import MODELS, Problem
from qflax import cpu
from qflax.training.provenance import git_commit

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(?\w+\[[\d,]*\]).*? ([\w-]+)\(")
_LARGEST_KERNEL = 10**5  # Elements; activations of a batch are more.


def kinds_of(program: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program."""
    kinds = {}
    for line in program.splitlines():
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode = found.groups()
        backward = "transpose(" in line
        kind = opcode
        if opcode == "convolution" or "conv" in name and opcode == "custom-call":
            elements = 1
            for size in re.findall(r"\d+", shape.partition("[")[2]):
                elements *= int(size)
            of = "of kernels" if elements <= _LARGEST_KERNEL else "of images" if backward else ""
            kind = f"convolution{', gradient ' if of else ''}{of}"
        elif opcode == "fusion":
            library = "ynn" in name or "ynn" in line
            kind = "sum" if library else "elementwise"
            kind += ", backward" if backward else ", forward"
        elif opcode == "transpose" or "transpose" in name:
            kind = "transposition"
        elif "all-reduce" in opcode:
            kind = "all-reduce"
        kinds[name] = kind
    return kinds


def events_of(folder: str) -> list[tuple[str, str, float, float]]:
    """(plane, operation, start, end) of all that the profiler saw on devices, in seconds."""
    events = []
    for file in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            if not plane.name.startswith(("/device:", "/host:CPU")):
                continue
            for event in (event for line in plane.lines for event in line.events):
                start, stats = event.start_ns * 1e-9, dict(event.stats)
                name = stats.get("hlo_op", event.name)
                events.append((plane.name, name, start, start + event.duration_ns * 1e-9))
    return events


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile(training, steps: int) -> dict[str, float]:
    """Seconds per step and device of each kind of operation, of the rest and of all; the share `busy`."""
    for _ in range(3):
        training()
    training.wait()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began = time.perf_counter()
            for _ in range(steps):
                training()
            training.wait()
            elapsed = time.perf_counter() - began
        events, kinds = events_of(folder), kinds_of(training.program)
    events = [event for event in events if event[1] in kinds]
    on_cpu = jax.default_backend() == "cpu"
    if not events:
        raise SystemExit("the profiler has seen no operation of the program on this device")
    seconds, per = collections.Counter(), steps * training.steps
    for _, name, start, end in events:
        kind = kinds[name]
        if not (on_cpu and kind.startswith("convolution")):  # There it is only the start of one.
            seconds[kind] += (end - start) / per / training.num_devices
    row = dict(seconds.most_common()) | {"step": elapsed / per}
    row["convolutions and waiting" if on_cpu else "waiting"] = elapsed / per - sum(seconds.values())
    if not on_cpu:
        first = min(plane for plane, *_ in events)
        row["busy"] = covered([(start, end) for plane, _, start, end in events if plane == first]) / elapsed
    return row


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--contenders", nargs="*", default=["qflax float", "qflax int4 lsq"], choices=CONTENDERS
    )
    parser.add_argument("--model", default="resnet20", choices=MODELS)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    cpu.use_huge_pages()
    fields = {name: getattr(options, name) for name in ("model", "batch_size", "dtype")}
    problem = Problem(threads=cpu.available_cores(), **fields)
    rows = {name: profile(CONTENDERS[name](problem), options.steps) for name in options.contenders}
    kinds = dict.fromkeys(kind for row in rows.values() for kind in row)
    print(f"{options.model}, batch {options.batch_size}, {options.dtype}, {git_commit()}, ms per step")
    print(f"{'':36}" + "".join(f"{name:>24}" for name in rows))
    for kind in sorted(kinds, key=lambda kind: -max(row.get(kind, 0) for row in rows.values())):
        print(f"{kind:36}" + "".join(f"{1e3 * row.get(kind, 0):24.1f}" for row in rows.values()))
    if options.output:
        about = {**fields, "commit": git_commit(), "rows": rows}
        options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
