"""Command lines: train.py, and `qflax` with its subcommands."""

import argparse
import contextlib
import io
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from qflax.errors import (
    ABORTED,
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    Interrupted,
    UserError,
    one_line,
    require,
    shown,
    told,
)
from qflax.terminal import Outlived


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are of one line, too."""

    def error(self, message):
        """See `argparse.ArgumentParser`."""
        raise UserError(f"{message}; see {self.prog} --help")


def train_main(arguments: Sequence[str]) -> int:
    """train.py --config=FILE [--workdir=DIR] [--config.FIELD=VALUE ...]; returns the exit code."""
    code = report_errors(lambda: _train(arguments))
    if code in (FAILED, BAD_INPUT):
        from qflax.runtime import leave_processes

        leave_processes(code)
    return code


def _train(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="train.py", description="Trains a network.", allow_abbrev=False)
    _add_config(parser)
    parser.add_argument(
        "--workdir",
        type=_path,
        help="folder for everything the run writes; runs/NAME of the configuration by default",
    )
    several = parser.add_argument_group("several processes", "SLURM, Open MPI and TPU slices need no options")
    several.add_argument("--coordinator_address", metavar="HOST:PORT", help="of the first process")
    several.add_argument("--num_processes", type=int, metavar="N", help="1 stays alone")
    several.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")
    options, options.rest = parser.parse_known_args(arguments)
    config = _config_of(options, "configs/quickstart.py")
    workdir = options.workdir or pathlib.Path("runs", pathlib.Path(options.config).stem)
    from qflax import config as config_lib
    from qflax import files, runtime

    config_lib.validate(config)
    files.require_makeable(workdir)
    joined = runtime.join_processes(options.coordinator_address, options.num_processes, options.process_id)
    runtime.configure(config.batch_size, config.num_devices, joined)
    from qflax.training import train
    from qflax.training.processes import is_first
    from qflax.training.workdir import TABLE_FILE

    result = train(config, workdir)
    if not is_first():
        return
    print((workdir / TABLE_FILE).read_text())
    if result.get("missed_size_targets"):
        print(
            f"missed size targets: {', '.join(result['missed_size_targets'])}; train longer, or raise "
            "config.size_strengths or config.quantizer_learning_rate"
        )
    print(
        f"test accuracy {result['test_accuracy']:.2%} (top 5 {result['test_top5_accuracy']:.2%}), "
        f"weights {result['weight_bytes'] / 1024:.2f} KiB, {result['train_seconds']:.0f} s of training; "
        f"everything is in {workdir}"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a Python file such as configs/resnet20_int4_cifar10.py; --config.FIELD=VALUE changes a field",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    which = "the latest (default), or the best by validation accuracy"
    parser.add_argument("--checkpoint", default="latest", choices=("latest", "best"), help=which)


def main(arguments: Sequence[str]) -> int:
    """The `qflax` command; returns the exit code."""
    return report_errors(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int | None:
    parser = _Parser(prog="qflax", description="Quantized networks in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="accuracy and per-layer table of a trained network")
    evaluate.add_argument("workdir", type=_path, help="folder of a run")
    splits = ("test", "validation", "train")
    evaluate.add_argument("--split", default="test", choices=splits, help="images (default: test)")
    _add_checkpoint(evaluate)
    evaluate.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    evaluate.set_defaults(run=_evaluate)
    importing = commands.add_parser(
        "import", help="make a workdir of torchvision's weights", allow_abbrev=False
    )
    importing.add_argument("weights", type=_path, help="a ResNet's .safetensors or .pth file")
    importing.add_argument("--workdir", type=_path, required=True, help="folder to make")
    importing.set_defaults(run=_import)
    calibrating = commands.add_parser(
        "calibrate", help="quantize a float run without training", allow_abbrev=False
    )
    calibrating.add_argument("source", type=_path, help="folder of the float run")
    calibrating.add_argument("--workdir", type=_path, required=True, help="folder to make")
    calibrating.set_defaults(run=_calibrate)
    sensitivity = commands.add_parser(
        "sensitivity", help="what each layer's quantization alone does to a float run", allow_abbrev=False
    )
    sensitivity.add_argument("source", type=_path, help="folder of the float run")
    sensitivity.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], help="widths to measure")
    sensitivity.set_defaults(run=_sensitivity)
    exporting = commands.add_parser("export", help="write a trained network to a file that others execute")
    exporting.add_argument("workdir", type=_path, help="folder of a run")
    exporting.add_argument("--format", default="packed", help="packed (default), qonnx, qcdq or stablehlo")
    exporting.add_argument("--output", type=_path, required=True, help="file to make")
    _add_checkpoint(exporting)
    exporting.set_defaults(run=_export)
    verifying = commands.add_parser(
        "verify", help="prove the accumulator bounds of an exported file; exit code 1 if anything fails"
    )
    verifying.add_argument("file", type=_path, help="packed, qonnx or qcdq")
    verifying.add_argument("--data", choices=("cifar10", "digits"), help="test images to run, too")
    verifying.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    verifying.add_argument(
        "--accumulator_bits",
        type=int,
        metavar="N",
        help="hold all layers to N bits, beside the file's promise",
    )
    verifying.add_argument(
        "--require_proof", action="store_true", help="fail where the sums of a layer are not proven"
    )
    verifying.set_defaults(run=_verify)
    reporting = commands.add_parser("report", help="one page with a table and plots of several runs")
    reporting.add_argument("workdirs", type=_path, nargs="+", metavar="workdir", help="folder of a run")
    reporting.add_argument("--output", type=_path, required=True, help="folder to make")
    reporting.add_argument("--no_test_images", action="store_true", help="run no network on test images")
    reporting.add_argument("--data_dir", default="", help="where TFDS keeps its data sets")
    reporting.set_defaults(run=_report)
    for command in (importing, calibrating, sensitivity):
        _add_config(command)
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and "config" not in options:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    return options.run(options)


def _path(text: str) -> pathlib.Path:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no path")
    return pathlib.Path(text)


def _config_of(options: argparse.Namespace, example: str):
    """The configuration of a command that is given one."""
    require(bool(options.config), f"--config: missing; for instance --config={example}")
    from qflax import config_file

    return config_file.read(options.config, options.rest)


def _calibrate(options: argparse.Namespace) -> None:
    config = _config_of(options, "configs/resnet20_int8_cifar10.py")
    config.init_from = str(options.source)
    from qflax import config as config_lib
    from qflax import runtime

    config_lib.validate(config)
    runtime.configure(config.eval_batch_size)
    from qflax.training.post_training import RECIPE_FILE, quantize

    result = quantize(config, options.workdir)
    print((options.workdir / RECIPE_FILE).read_text())
    print(
        f"test accuracy {result['test_accuracy']:.2%} (top 5 {result['test_top5_accuracy']:.2%}), "
        f"weights {result['weight_bytes'] / 1024:.2f} KiB, {result['ptq_seconds']:.0f} s; "
        f"everything is in {options.workdir}"
    )


def _sensitivity(options: argparse.Namespace) -> None:
    config = _config_of(options, "configs/resnet20_int4_cifar10.py")
    config.init_from = str(options.source)
    from qflax import config as config_lib
    from qflax import runtime

    config_lib.validate(config)
    runtime.configure(config.eval_batch_size)
    from qflax.ptq.sensitivity import table
    from qflax.training.post_training import measure_sensitivities

    print(table(measure_sensitivities(config, options.bits)))


def _import(options: argparse.Namespace) -> None:
    config = _config_of(options, "configs/resnet18_fp32.py")
    from qflax import runtime

    runtime.configure()
    from qflax.training.workdir import import_weights

    count = import_weights(options.weights, config, options.workdir)
    print(f"{count:,} parameters of {options.weights} are in {options.workdir}; evaluate them with")
    print(f"qflax evaluate {options.workdir}")


def _evaluate(options: argparse.Namespace) -> None:
    from qflax import config as config_lib
    from qflax import runtime

    config = config_lib.load(options.workdir)
    runtime.configure(config.eval_batch_size)
    from qflax.training import evaluate_workdir
    from qflax.training.table import cost_table

    metrics, costs = evaluate_workdir(
        options.workdir, split=options.split, which=options.checkpoint, data_dir=options.data_dir
    )
    print(cost_table(costs, config.size_targets, config.size_strengths))
    print(
        f"{options.split} accuracy {metrics['accuracy']:.2%} (top 5 {metrics['top5_accuracy']:.2%}), "
        f"loss {metrics['loss']:.4f}"
    )


def _export(options: argparse.Namespace) -> None:
    from qflax import runtime

    runtime.configure()
    from qflax.deploy.exporting import export
    from qflax.deploy.table import layer_table
    from qflax.training.workdir import serving

    function, variables, shape, about = serving(options.workdir, options.checkpoint)
    result = export(function, variables, shape, options.output, format=options.format, metadata=about)
    print(layer_table(result.graph))
    agreement = "equal to" if result.difference == 0 else f"within {result.difference:.3g} of"
    if result.exact and result.difference:
        agreement = f"equal to, operation by operation, and compiled as a whole {agreement}"
    size = options.output.stat().st_size
    print(f"{options.output}: {size:,} bytes; logits {agreement} the trained network's on the probe")
    if options.format != "stablehlo":
        print(f"prove it with\nqflax verify {options.output}")


def _verify(options: argparse.Namespace) -> int:
    from qflax.verify import table, verify

    require(bool(options.data) or not options.data_dir, "--data_dir: is for --data, which is missing")
    data = ()
    if options.data:
        from qflax.data import load

        dataset = load(options.data, "test", data_dir=options.data_dir or None, validation_examples=0)
        data = dataset.images, dataset.labels
    report = verify(options.file, *data, bits=options.accumulator_bits, require_proof=options.require_proof)
    print(table(report))
    return 0 if report.ok else FAILED


def _report(options: argparse.Namespace) -> None:
    from qflax import runtime

    try:
        import jinja2
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}; install it with pip install 'qflax[report]'") from None
    del jinja2, matplotlib
    runtime.configure()
    from qflax.report.page import write_report

    page = write_report(
        options.workdirs,
        options.output,
        test_images=not options.no_test_images,
        data_dir=options.data_dir,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(f"{page}: {page.stat().st_size / 1024:,.0f} KiB, complete in itself; the plots are beside it")


def report_errors(run: Callable[[], int | None]) -> int:
    """Runs a program; returns its exit code, having told of errors in a line."""
    stream = sys.stderr
    with contextlib.redirect_stderr(Outlived(stream) if isinstance(stream, io.TextIOWrapper) else stream):
        return _report_errors(run)


def _report_errors(run: Callable[[], int | None]) -> int:
    from absl import logging as absl_logging

    # Orbax tells of every file that it writes, and with tracebacks of errors that it raises as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "concurrent.futures"):  # So do the threads that it writes in.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # Paths may be no text.
    try:
        code = run()
        sys.stdout.flush()
    except Interrupted as error:
        print(f"interrupted: {error}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ABORTED
    except BrokenPipeError:  # Who reads the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        message = told(error)
        if message is None:
            raise
        print(f"error: {one_line(message)}", file=sys.stderr)
        return BAD_INPUT
    return code or 0
