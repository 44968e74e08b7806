"""Compares changes of a row's recipe on the validation images.

python -m benchmarks.tune --table=resnet20 --row=int4_qat --try="learning_rate=0.003" \\
    --try="learning_rate=0.003 ema_decay=0.999" [--seeds=1] [--scale=1.0] [--minutes=25] \\
    [--config.FIELD=VALUE ...]

Trains the row as its configuration has it, then with each change; `--config.FIELD=VALUE` changes all of
them, the float network that they start from too. The last 5,000 training images are held out of every
training, and are what is compared on: `results/tuning/TABLE-ROW-CHANGE-seedN.json` has nothing of the test
images. The same command goes on where it was stopped; `python -m benchmarks.results` makes the table of
docs/recipes.md.
"""

import argparse
import json
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Sequence

from benchmarks.reproduce import (
    LEFT,
    ORIGIN,
    RESULTS,
    deadline,
    parse_rows,
    portable,
    require_free,
    row_config,
    row_parser,
    row_workdir,
)
from benchmarks.tables import TABLES
from qflax import cli, cpu
from qflax.errors import Interrupted, UserError

_HELD_OUT = "--config.validation_examples=5000"


def main() -> None:
    """Makes what is missing."""
    options = parse(sys.argv[1:])
    cpu.use_huge_pages()
    sys.exit(cli.report_errors(lambda: tune(options)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = row_parser(__doc__)
    parser.add_argument("--row", required=True)
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="FIELD=VALUE ...")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/tune"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "tuning")
    options = parse_rows(parser, arguments)
    options.changes.insert(0, _HELD_OUT)
    for change in options.tries:
        require_free(parser, [f"--config.{part}" for part in shlex.split(change)])
    if any(re.search(r"validation_examples=0*$", part) for part in [*options.changes, *options.tries]):
        parser.error("validation_examples=0: there would be nothing to compare on; name a positive number")
    rows = {row.name: row for row in TABLES[options.table].rows if row.trained}
    if options.row not in rows:
        parser.error(f"--row: no {options.row!r} is trained in {options.table}; choices: {', '.join(rows)}")
    options.row = rows[options.row]
    return options


def tune(options: argparse.Namespace) -> None:
    """Trains the recipe and its changes, seed by seed.

    Raises:
      UserError: a change does not fit.
      Interrupted: the time is up, or it was asked to stop.
    """
    from qflax import runtime
    from qflax.training.interruption import Interruption

    trials = [
        _Trial(options, change, seed) for seed in range(options.seeds) for change in ("", *options.tries)
    ]
    runtime.configure(trials[0].config.batch_size)
    options.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes - LEFT
    with Interruption() as interruption, interruption.at_once(), deadline(end):
        for trial in [trial for trial in trials if not trial.is_there()]:
            if time.monotonic() > end:
                raise Interrupted("the time is up")
            trial.make()


class _Trial:
    """A change and seed: its configuration, workdir and JSON file."""

    def __init__(self, options: argparse.Namespace, change: str, seed: int):
        self._options, self._change, self._seed = options, change, seed
        changes = [f"--config.{part}" for part in shlex.split(change)]
        changed = argparse.Namespace(**{**vars(options), "changes": [*options.changes, *changes]})
        self.config = row_config(changed, options.row, seed)
        name = re.sub(r"[^\w.=+-]", "-", change) or "recipe"
        folder = row_workdir(options, options.row, seed)
        self._workdir = folder.with_name(f"{options.row.name}-{name}-seed{seed}")
        self._file = options.results / f"{options.table}-{self._workdir.name}.json"

    def is_there(self) -> bool:
        """Whether the file has it."""
        from qflax import config as config_lib

        if not self._file.exists():
            return False
        differing = config_lib.differences(
            portable(self.config), json.loads(self._file.read_text())["config"]
        )
        if differing:
            raise UserError(
                f"{self._file}: was made of another recipe ({'; '.join(differing)}); delete it, or choose "
                "another --results"
            )
        return True

    def make(self) -> None:
        """Trains it, and the float network that it starts from, where that is left to do."""
        from qflax.files import write_atomically
        from qflax.training import train

        options, first = self._options, TABLES[self._options.table].rows[0]
        if options.row is not first:
            train(row_config(options, first, self._seed), row_workdir(options, first, self._seed))
        print(f"{self._file.stem}: {self._workdir}", flush=True)
        result = train(self.config, self._workdir)
        fields = {
            "table": options.table,
            "row": options.row.name,
            "change": self._change,
            "seed": self._seed,
            "scale": options.scale,
            "epochs": result["epochs"],
            "minutes": result["train_seconds"] / 60,
            "validation_top1": result["validation_accuracy"],
            "weight_bytes": result["weight_bytes"],
            **{name: result[name] for name in ORIGIN},
            "command": shlex.join(["python", "-m", "benchmarks.tune", *sys.argv[1:]]),
            "config": portable(self.config),
        }
        write_atomically(self._file, json.dumps(fields, indent=1) + "\n")
        print(f"{self._file.stem}: validation top-1 {fields['validation_top1']:.2%}", flush=True)


if __name__ == "__main__":
    main()
