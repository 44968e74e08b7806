"""Seconds per training step of qflax's quantizers and of other libraries', in one run.

python -m benchmarks.step_time --model=resnet20 --batch_size=128 --rounds=9 --output=step_time.json

Every contender trains the same network on the same images in a process of its own, with the same number of
threads and the same heap. They take turns, so that whatever else the machine does hits all of them: in each
round every one makes half as many steps that are not timed, and then `--steps` that are, while the others
wait; it waits for its device only after the last one. What is not installed is left out and said. The extra
`benchmark` installs the others.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

from benchmarks.peers.problem import MODELS, Problem
from qflax import cpu

# Where the contenders are whose names start so.
_MODULES = {
    "qflax": "benchmarks.contenders",
    "PyTorch": "benchmarks.peers.torch_peers",
    "torch": "benchmarks.peers.torch_peers",
    "Brevitas": "benchmarks.peers.brevitas_peers",
    "Qwix": "benchmarks.peers.qwix_peers",
    "HGQ2": "benchmarks.peers.hgq_peers",
}
_REST = 0.05  # Seconds after which the threads of the one before sleep.
_USUAL = (
    "qflax float",
    "qflax int8 lsq",
    "qflax int4 lsq",
    "qflax learned widths",
    "qflax a2q",
    "qflax a2q+",
    "qflax e4m3",
    "PyTorch float",
    "torch PT2E int8",
    "Brevitas w4a4, learned scales",
    "Brevitas w8a8, learned scales",
    "Brevitas A2Q 16 bits",
    "Brevitas A2Q+ 16 bits",
    "Brevitas e4m3",
    "Qwix QAT w8a8",
    "HGQ2",
)


class Contender:
    """A contender in a process of its own.

    Attributes:
      ready: what it told of itself: seconds to the first step, and of that for compilation (of others than
        ours, the whole first step); or None if it could not be built.
      problem: why it could not be.
    """

    def __init__(self, name: str, options: argparse.Namespace):
        """Starts it and waits for its first step."""
        self.seconds = []
        command = [sys.executable, "-m", "benchmarks.step_time", "--contender", name]
        command += [f"--{field}={getattr(options, field)}" for field in ("model", "batch_size", "dtype")]
        command += [f"--threads={options.threads}", f"--num_devices={options.num_devices}"]
        # An accelerator's memory is not to be taken whole by the first.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONWARNINGS": "ignore", **os.environ}
        began = time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready, self.problem = None, None
        answer = self._read()
        if "problem" in answer:
            self.problem = answer["problem"]
        else:
            self.ready = {"seconds_to_first_step": time.monotonic() - began, **answer}

    def step(self, count: int) -> None:
        """Has it make steps, after half as many that are not timed; one that ends has a `problem` then."""
        self._ask(count)
        answer = self._read()
        self.problem = answer.get("problem")
        if self.problem is None:
            self.seconds.append(answer["seconds"])

    def peak_memory(self) -> float:
        """In MiB, of the process, or of its device where that has memory of its own."""
        self._ask(0)
        return self._read().get("memory_mib", float("nan"))

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, count: int) -> None:
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):  # Libraries print, too.
                return json.loads(line)
        return {"problem": f"ended with exit code {self._process.wait()}"}


def contend(name: str, problem: Problem, num_devices: int) -> None:
    """A contender's process: makes steps as it is asked to on its standard input."""
    began = time.monotonic()
    try:
        own = {"num_devices": num_devices} if name.startswith("qflax") else {}
        training = _builders(_MODULES[name.split()[0]])[name](problem, **own)
        called = time.monotonic()
        training()
        training.wait()
    except (ImportError, NotImplementedError) as error:
        print(json.dumps({"problem": f"{type(error).__name__}: {error}"}), flush=True)
        return
    ended = time.monotonic()
    # The others compile at the first call, or not at all.
    compiling = getattr(training, "compile_seconds", ended - called)
    about = {"compile_seconds": compiling, "build_and_first_step_seconds": ended - began}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        if count := int(line):
            own = getattr(training, "steps", 1)
            calls = -(-count // own)
            for _ in range(-(-calls // 2)):
                training()
            training.wait()
            began = time.perf_counter()
            for _ in range(calls):
                training()
            training.wait()
            answer = {"seconds": (time.perf_counter() - began) / (calls * own)}
        else:
            resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = {"memory_mib": (training.device_memory() or resident) / 2**20}
        print(json.dumps(answer), flush=True)


def _builders(*modules: str) -> dict:
    """The contenders of some modules; their packages are imported when they are built."""
    builders = {}
    for module in modules:
        builders |= importlib.import_module(module).CONTENDERS
    return builders


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20", choices=MODELS)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=cpu.available_cores())
    parser.add_argument("--num_devices", type=int, default=None, help="of qflax; all of a CPU's, else 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="timed, in each round; 100 on an accelerator")
    parser.add_argument("--contenders", nargs="*", default=_USUAL, help="names, or 'all'")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.num_devices is None:
        options.num_devices = 0 if cpu.is_platform() else 1  # As many as the others have.
    fields = ("model", "batch_size", "dtype", "threads")
    problem = Problem(**{name: getattr(options, name) for name in fields})
    if options.contender:
        cpu.use_huge_pages()
        contend(options.contender, problem, options.num_devices)
        return
    known = list(_builders(*dict.fromkeys(_MODULES.values())))
    names = known if options.contenders == ["all"] else options.contenders
    for name in names:
        if name not in known:
            parser.error(f"--contenders: no {name!r}; choices: {', '.join(known)}")
    contenders = {}
    for name in names:
        contender = Contender(name, options)
        if contender.problem:
            print(f"{name}: left out ({contender.problem})")
        else:
            contenders[name] = contender
    for _ in range(options.rounds):
        for name, contender in list(contenders.items()):
            time.sleep(_REST)
            contender.step(options.steps)
            if contender.problem:
                print(f"{name}: left out ({contender.problem})")
                del contenders[name]
    rows = [_row(name, contender, contenders) for name, contender in contenders.items()]
    # These start JAX: after all has been timed.
    from benchmarks.limit import measure
    from qflax.training.provenance import provenance

    origin, limit = provenance(1), measure(problem)
    for row in rows:
        row["share_of_limit"] = limit.seconds / row["median_seconds"]
    print(f"{options.model}, batch {options.batch_size}, {options.dtype}, {options.threads} threads")
    print(f"{origin['processor']}, JAX {origin['versions']['jax']}")
    print(
        f"limit {limit.seconds:.4f} s: {limit.operations / 1e9:.1f} GFLOP at "
        f"{limit.operations_per_second / 1e9:.0f} GFLOP/s, {limit.bytes / 1e9:.2f} GB at "
        f"{limit.bytes_per_second / 1e9:.1f} GB/s"
    )
    heads = (
        "min s",
        "median s",
        "to float",
        "to fastest peer",
        "share of limit",
        "compile s",
        "first step s",
        "peak MiB",
    )
    print(f"{'':36}" + "".join(f"{head:>16}" for head in heads))
    for row in rows:
        peer = f"{row['to_fastest_peer']:.2f}" if row["to_fastest_peer"] else ""
        print(
            f"{row['contender']:36}{row['min_seconds']:16.4f}{row['median_seconds']:16.4f}"
            f"{row['to_float']:16.2f}{peer:>16}{row['share_of_limit']:16.2f}{row['compile_seconds']:16.1f}"
            f"{row['seconds_to_first_step']:16.1f}{row['peak_mib']:16.0f}"
        )
    if options.output:
        about = {name: value for name, value in vars(options).items() if name != "output"}
        about = {**about, **origin, "limit": {**dataclasses.asdict(limit), "seconds": limit.seconds}}
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


# What is compared with what: the start of our names to the start of peers'.
_RIVALS = {
    "qflax float": ("PyTorch float",),
    "qflax int": ("Brevitas w", "torch PT2E", "Qwix", "HGQ2"),
    "qflax learned": ("HGQ2",),
    "qflax a2q": ("Brevitas A2Q",),
    "qflax e": ("Brevitas e4m3",),
}


def _row(name: str, contender: Contender, contenders: dict[str, Contender]) -> dict:
    """Figures of one contender; `to_fastest_peer` is how many times as fast it is as its fastest rival."""
    medians = {other: float(np.median(its.seconds)) for other, its in contenders.items()}
    own = next((rivals for start, rivals in _RIVALS.items() if name.startswith(start)), ())
    peers = [seconds for other, seconds in medians.items() if other.startswith(own)] if own else []
    base = medians.get("qflax float" if name.startswith("qflax") else "PyTorch float", float("nan"))
    row = {
        "contender": name,
        "min_seconds": min(contender.seconds),
        "median_seconds": medians[name],
        "to_float": medians[name] / base,
        "to_fastest_peer": min(peers) / medians[name] if peers else None,
        "peak_mib": contender.peak_memory(),
        **contender.ready,
        "seconds": contender.seconds,
    }
    contender.close()
    return row


if __name__ == "__main__":
    main()
