"""Trains the rows of a table of results, with the configurations as they are.

python -m benchmarks.reproduce --table=resnet20 [--rows int8_qat mixed_qat] [--seeds=3] [--minutes=25] \\
    [--scale=1.0] [--config.FIELD=VALUE ...]

The first row is the float network that all others start from. Every row is trained to its last step,
evaluated on the whole test set once, exported to a packed file, and that file is verified by `qflax.verify`,
which shares no code with what wrote it, in a process beside the next row's training. What came of it is in
`results/TABLE-ROW-seedN.json`; `python -m benchmarks.results` makes the tables of the README of these.

Where the float network's workdir is gone it is made again, and its row with it.

The same command goes on where it was stopped, by its own `--minutes`, SIGTERM or Ctrl-C. A row that is there
is not made again, unless its schedule was a shorter one or its configuration has changed since; the latter
takes another `--workdir`, if the old run is there still. `--scale=0.1` shortens all schedules to a tenth,
to no less than one epoch.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import ml_collections

from benchmarks.proof import prove
from benchmarks.tables import CONFIGS, TABLES, Row
from qflax import cli, cpu
from qflax.errors import Interrupted, require

RESULTS = pathlib.Path("results")
LEFT = 30  # Seconds before the end of --minutes at which it is asked to stop, for what it is doing.
_FILE = "network.packed"
ORIGIN = ("device", "processor", "settings", "python", "versions", "commit")
_PATHS = ("data_dir", "init_from")  # Differ from machine to machine.


def main() -> None:
    """Makes what is missing."""
    options = parse(sys.argv[1:])
    cpu.use_huge_pages()
    sys.exit(cli.report_errors(lambda: reproduce(options)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = row_parser(__doc__)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="all by default")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/reproduce"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the JSON files")
    options = parse_rows(parser, arguments)
    known = [row.name for row in TABLES[options.table].rows]
    for name in options.rows or ():
        if name not in known:
            parser.error(f"--rows: no {name!r} in {options.table}; choices: {', '.join(known)}")
    return options


def row_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what all that trains rows is told."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which it stops")
    parser.add_argument("--scale", type=float, default=1.0, help="of the schedules' lengths")
    return parser


def parse_rows(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a `row_parser`; what it does not know are the `changes` of the configurations."""
    options, options.changes = parser.parse_known_args(arguments)
    for name, bound in (("seeds", 1), ("minutes", 1), ("scale", 1e-6)):
        if not getattr(options, name) >= bound:
            parser.error(f"--{name}: must be at least {bound}")
    require_free(parser, options.changes)
    return options


def require_free(parser: argparse.ArgumentParser, changes: Sequence[str]) -> None:
    """Ends with an error where a change is of what rows set themselves."""
    for change in changes:
        if change.partition("=")[0] in ("--config.init_from", "--config.seed"):
            parser.error(
                f"{change}: rows start from their table's float network, with seeds from 0 (--seeds)"
            )


def reproduce(options: argparse.Namespace) -> None:
    """Makes the rows, seed by seed.

    Raises:
      UserError: bad input, or a row of a longer schedule is there.
      Interrupted: the time is up, or it was asked to stop.
    """
    from qflax import runtime
    from qflax.training.interruption import Interruption

    rows = TABLES[options.table].rows
    chosen = [row for row in rows if row.name in (options.rows or [row.name])]
    wanted = [_Result(options, row, seed) for seed in range(options.seeds) for row in chosen]
    missing = _with_teachers([result for result in wanted if not result.is_there()])
    runtime.configure(row_config(options, rows[0], 0).batch_size)
    options.results.mkdir(parents=True, exist_ok=True)
    end, proof = time.monotonic() + 60 * options.minutes - LEFT, None
    with (
        Interruption() as interruption,
        interruption.at_once(),
        deadline(end),
        contextlib.ExitStack() as proofs,
    ):
        for result in missing:
            if time.monotonic() > end:
                raise Interrupted("the time is up")
            result.make()
            result.record()
            if proof is not None:
                proof.join()
            proof = proofs.enter_context(_Proof(result))
        if proof is not None:
            proof.join()


def _with_teachers(missing: Sequence["_Result"]) -> list["_Result"]:
    """The results with the float networks that others of them start from, where their workdirs are gone."""
    found = {}
    for result in missing:
        teacher = _Result(result.options, TABLES[result.options.table].rows[0], result.seed)
        if not teacher.is_made():
            if teacher.file.exists() and teacher.name not in found and result.row is not teacher.row:
                print(f"{teacher.file}: will be replaced (its network is not in {teacher.workdir})")
            found.setdefault(teacher.name, teacher)
        found.setdefault(result.name, result)
    return list(found.values())


class _Result:
    """A row and seed: its configuration, workdir and JSON file."""

    def __init__(self, options: argparse.Namespace, row: Row, seed: int):
        self.options, self.row, self.seed = options, row, seed
        self.name = f"{options.table}-{row.name}-seed{seed}"
        self.file = options.results / f"{self.name}.json"
        self.config = row_config(options, row, seed)
        self.workdir = row_workdir(options, row, seed)
        self.fields = {}

    def is_there(self) -> bool:
        """Whether the file has it, proven."""
        from qflax import config as config_lib

        if not self.file.exists():
            return False
        result = json.loads(self.file.read_text())
        scale = self.options.scale
        require(
            result["scale"] <= scale,
            f"{self.file}: has a schedule of {result['scale']:g} times the recipe's, longer than --scale="
            f"{scale:g}; choose another --results, or delete it",
        )
        differing = self._counting(config_lib.differences(portable(self.config), result["config"]))
        if result["scale"] < scale or differing:
            print(f"{self.file}: will be replaced ({'; '.join(differing) or 'its schedule is shorter'})")
            return False
        return result["verification"] is not None

    def is_made(self) -> bool:
        """Whether the workdir has it.

        Raises:
          UserError: it has another configuration's.
        """
        from qflax import config as config_lib

        if not (self.workdir / "result.json").exists():
            return False
        differing = self._counting(config_lib.differences(self.config, config_lib.load(self.workdir)))
        require(
            not differing,
            f"{self.workdir}: holds a run of another configuration ({'; '.join(differing)}); choose another "
            "--workdir",
        )
        return True

    def _counting(self, differing: Sequence[str]) -> list[str]:
        """Differences without those that do nothing to the row."""
        return [text for text in differing if not (self.row.trained and text.startswith("ptq."))]

    def make(self) -> None:
        """Trains or quantizes it, where that is left to do."""
        print(f"{self.name}: {self.workdir}", flush=True)
        if self.row.trained:
            from qflax.training import train

            train(self.config, self.workdir)
        elif not self.is_made():
            from qflax.training.post_training import quantize

            unfinished = self.workdir.with_name(f".{self.workdir.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            quantize(self.config, unfinished)
            unfinished.rename(self.workdir)

    def record(self) -> None:
        """Writes what the workdir has."""
        result = _load(self.workdir)
        teacher = row_workdir(self.options, TABLES[self.options.table].rows[0], self.seed)
        seconds = result["train_seconds"] if self.row.trained else result["ptq_seconds"]
        self.fields = {
            "table": self.options.table,
            "row": self.row.name,
            "seed": self.seed,
            "scale": self.options.scale,
            "epochs": result.get("epochs", 0.0),
            "minutes": seconds / 60,
            "top1": result["test_accuracy"],
            "top5": result["test_top5_accuracy"],
            "float_top1": _load(teacher)["test_accuracy"],
            "weight_bytes": result["weight_bytes"],
            "missed_size_targets": result.get("missed_size_targets", []),
            "file_bytes": None,
            "verification": None,
            **{name: result[name] for name in ORIGIN},
            "command": shlex.join(["python", "-m", "benchmarks.reproduce", *sys.argv[1:]]),
            "config": portable(self.config),
        }
        self.save()
        print(f"{self.name}: top-1 {self.fields['top1']:.2%}", flush=True)

    def save(self) -> None:
        """Writes the file."""
        from qflax.files import write_atomically

        write_atomically(self.file, json.dumps(self.fields, indent=1) + "\n")


class _Proof(contextlib.AbstractContextManager):
    """The verification of a row's exported file, in a process of its own."""

    def __init__(self, result: _Result):
        """Exports, and starts it."""
        from qflax.data import load
        from qflax.deploy.exporting import export
        from qflax.training.workdir import serving

        self._result = result
        function, variables, shape, about = serving(result.workdir)
        file = result.workdir / _FILE
        file.unlink(missing_ok=True)
        export(function, variables, shape, file, format="packed", metadata=about)
        result.fields["file_bytes"] = file.stat().st_size
        result.save()
        data = ()
        if (dataset := result.config.dataset) != "imagenet2012":  # Which is not held in memory.
            test = load(dataset, "test", data_dir=result.config.data_dir or None)
            data = test.images, test.labels
        arguments = (file, result.file, result.workdir, *data)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=prove, args=arguments, daemon=True)
        self._process.start()

    def join(self) -> None:
        """Waits for it; it has added to the row's file what was found."""
        self._process.join()
        file = self._result.workdir / _FILE
        require(self._process.exitcode == 0, f"{file}: could not be verified; try qflax verify {file}")

    def __exit__(self, *exception) -> None:
        self._process.terminate()


def row_config(options: argparse.Namespace, row: Row, seed: int) -> ml_collections.ConfigDict:
    """What a row trains: its configuration with the options' changes, and its schedule shortened.

    Raises:
      UserError: a change does not fit.
    """
    from qflax import config as config_lib
    from qflax import config_file

    config = config_file.read(str(CONFIGS / f"{row.config}.py"), options.changes)
    config.seed = seed
    epochs = max(config.num_epochs * options.scale, min(config.num_epochs, 1.0))
    ratio = epochs / config.num_epochs
    config.num_epochs, config.warmup_epochs = epochs, config.warmup_epochs * ratio
    config.milestone_epochs = tuple(epoch * ratio for epoch in config.milestone_epochs)
    first = TABLES[options.table].rows[0]
    if row is not first:
        config.init_from = str(row_workdir(options, first, seed))
    config = config.copy_and_resolve_references()
    config_lib.validate(config)
    return config


def row_workdir(options: argparse.Namespace, row: Row, seed: int) -> pathlib.Path:
    """Where a row is trained."""
    return options.workdir / f"{options.table}-{options.scale:g}" / f"{row.name}-seed{seed}"


def portable(config: ml_collections.ConfigDict) -> dict[str, object]:
    """The fields that make the run, but for paths."""
    from qflax import config as config_lib

    skipped = (*config_lib.OPERATIONAL, *_PATHS)
    fields = {name: value for name, value in config_lib.plain(config).items() if name not in skipped}
    fields["distillation"] = {name: x for name, x in fields["distillation"].items() if name != "teacher"}
    return {**fields, "distilled": bool(config.distillation.teacher)}


def _load(workdir: pathlib.Path) -> dict:
    from qflax.training.workdir import load_result

    return load_result(workdir)


@contextlib.contextmanager
def deadline(end: float) -> Iterator[None]:
    """At that time it is asked to stop, as a scheduler would."""
    seconds = min(end - time.monotonic(), threading.TIMEOUT_MAX)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    main()
