"""Post-training quantization of a run: from its workdir and a configuration to another workdir."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.data import load_training
from qflax.errors import require
from qflax.files import require_makeable, write_atomically
from qflax.numerics import full_precision
from qflax.ptq.divergence import compare_outputs
from qflax.ptq.recipe import Networks, Settings, apply_recipe, check_recipe
from qflax.ptq.reconstruction import Reconstruction
from qflax.ptq.sensitivity import Sensitivity
from qflax.ptq.sensitivity import table as sensitivity_table
from qflax.ptq.taps import collect
from qflax.quantizers import ROLES
from qflax.training import allocation, build
from qflax.training import workdir as workdir_lib
from qflax.training.calibration import CalibrationBatches
from qflax.training.kernels import layer_kernels
from qflax.training.lock import locked
from qflax.training.logs import Logs, Progress
from qflax.training.parallel import Devices
from qflax.training.provenance import provenance
from qflax.training.start import start_from
from qflax.training.state import initial_variables, weights_of
from qflax.training.table import cost_table, cost_totals

SENSITIVITY_FILE = "sensitivity.txt"
RECIPE_FILE = "recipe.txt"


@full_precision()
def quantize(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, object]:
    """Quantizes the run `config.init_from` as the configuration says, without training.

    Under `config.size_targets` every layer gets a width of its own, by its sensitivity; they are added to
    the rules of the configuration that the workdir keeps.

    Args:
      config: see `configs/default.py`; of a quantized network, with the recipe in `config.ptq`.
      workdir: folder to make; it becomes an ordinary workdir, as of a run at step 0. It is written when all
        is done but the evaluation on the test split.

    Returns:
      The result, as written to `result.json`.

    Raises:
      UserError: bad input, naming the field.
    """
    workdir = pathlib.Path(workdir)
    workdir_lib.require_unused(workdir, (RECIPE_FILE, SENSITIVITY_FILE))
    require_makeable(workdir)
    with locked(workdir):
        return _quantize(config, workdir)


def _quantize(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, object]:
    run, began = Run(config), time.monotonic()
    progress = Progress(len(config.ptq.recipe), 0, 1.0)
    try:
        tables = {}
        if any(config.size_targets.values()):
            run.config, rows = allocation.allocate_widths(
                run.config, run.weights, run.batches, say=progress.say
            )
            tables[SENSITIVITY_FILE] = sensitivity_table(rows)
        networks = run.networks()
        recipe = _Recipe(_Judge(networks, run.others), progress)
        networks = apply_recipe(
            networks,
            config.ptq.recipe,
            run.batches,
            settings(config),
            done=recipe.done,
            progress=progress.say,
        )
    finally:
        progress.close()
    tables[RECIPE_FILE] = recipe_table(recipe.rows)
    return _finish(run.config, workdir, networks, recipe.rows, tables, time.monotonic() - began)


def _finish(config, workdir, networks, rows, tables, seconds) -> dict[str, object]:
    """Writes the workdir, and evaluates on the test split, once."""
    state, devices = jax.device_get(build.state(config, dict(networks.variables))), Devices()
    costs, origin = build.measure_costs(config, state.served), provenance(len(devices))
    workdir_lib.save_start(config, workdir, state, origin)
    tables = {**tables, workdir_lib.TABLE_FILE: cost_table(costs, config.size_targets, config.size_strengths)}
    for name, table in tables.items():
        write_atomically(workdir / name, table + "\n")
    with contextlib.closing(Logs(workdir, 0)) as logs:
        for i, row in enumerate(rows):
            logs.write(i, {name: x for name, x in row.items() if name != "method"}, "ptq")
        shape = build.image_format(config).image_shape
        logs.draw_layers(0, costs, layer_kernels(build.model(config), state.served, shape))
        logs.conclude(config_lib.flat(config))
        Progress.say(f"the quantized network is in {workdir}; now it is evaluated on the test images")
        test = workdir_lib.load_evaluator(config, "test", devices)(devices.replicate(state.served))
        logs.write(0, test, "test")
    result = {
        "test_accuracy": test["accuracy"],
        "test_top5_accuracy": test["top5_accuracy"],
        "test_loss": test["loss"],
        "ptq_seconds": seconds,
        "recipe": rows,
        "steps": 0,
        "parameters": workdir_lib.count_parameters(state.served),
        **cost_totals(costs),
        **origin,
    }
    write_atomically(workdir / workdir_lib.RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return result


@full_precision()
def measure_sensitivities(
    config: ml_collections.ConfigDict, bits: Sequence[int] = (8, 4, 2)
) -> list[Sensitivity]:
    """What each quantizer of a configuration alone does to the run `config.init_from`.

    Args:
      config: of a quantized network.
      bits: widths to measure.

    Raises:
      UserError: bad input, naming the field.
    """
    progress = Progress(1, 0, 1.0)
    try:
        run = Run(config)
        return allocation.measure(config, run.weights, run.batches, bits=bits, say=progress.say)
    finally:
        progress.close()


class Run:
    """A run to quantize, and the images for it.

    Attributes:
      config: of the quantized network.
      weights: variables of the float run, without those of quantizers.
      batches: to calibrate on.
      others: (images, labels) to judge by.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        """Checks everything that can be checked before the first computation, and loads the run."""
        config_lib.validate(config)
        check_recipe(config.ptq.recipe, "config.ptq.recipe")
        require(bool(config.init_from), "config.init_from: missing; name the run to quantize")
        require(
            any(config[role] is not None for role in ROLES) or bool(config.rules),
            "config.weights: the configuration quantizes nothing; choose one like "
            "configs/resnet20_int8_cifar10.py",
        )
        self.config = config
        original, kept = start_from(config, build.check_rules(config))
        require(not kept, f"{config.init_from}: is quantized like this already; name the float run")
        self.weights = weights_of(original)
        train_set, _ = load_training(
            config.dataset,
            data_dir=config.data_dir or None,
            validation_examples=config.validation_examples,
            crop=build.crop(config),
        )
        self.batches = CalibrationBatches(config, train_set)
        self.others = self.batches.others(config.ptq.report_examples)

    def networks(self) -> Networks:
        """The networks before the first method."""
        config, model = self.config, build.model(self.config)
        shape = build.image_format(config).image_shape
        variables = {**initial_variables(model, shape, config.seed), **self.weights}
        return Networks(
            model=model,
            reference=build.float_model(config),
            immediate=build.model(config, immediate=True),
            immediate_reference=build.float_model(config, immediate=True),
            variables=variables,
            reference_variables=self.weights,
        )


class _Judge:
    """Compares networks with the float one on training images that nothing was calibrated on."""

    def __init__(self, networks: Networks, others: Sequence[tuple]):
        self._images, self._labels = ([pair[i] for pair in others] for i in (0, 1))
        self._forward = jax.jit(
            lambda model, variables, x: model.apply(variables, x, train=False), static_argnums=0
        )
        self._expected = self._logits(networks.reference, networks.reference_variables)

    def float_network(self) -> dict[str, float]:
        """`divergence` 0, `agreement` 1, and the `accuracy`."""
        return compare_outputs(self._expected, self._expected, np.concatenate(self._labels))

    def __call__(self, networks: Networks) -> dict[str, float]:
        """`divergence`, `agreement` and `accuracy` of the quantized network."""
        logits = self._logits(networks.model, networks.variables)
        return compare_outputs(self._expected, logits, np.concatenate(self._labels))

    def _logits(self, model, variables):
        return collect(functools.partial(self._forward, model), variables, self._images)


class _Recipe:
    """The recipe as it proceeds: what each method took and left."""

    def __init__(self, judge: _Judge, progress: Progress):
        self._judge, self._progress, self._began = judge, progress, time.monotonic()
        self.rows = [{"method": "float", "seconds": 0.0, **judge.float_network()}]

    def done(self, method: str, networks: Networks) -> None:
        """Judges the networks, whose quantizers have no scales before `ranges`."""
        seconds = time.monotonic() - self._began
        calibrated = "ranges" in [method, *(row["method"] for row in self.rows)]
        row = {"method": method, "seconds": seconds, **(self._judge(networks) if calibrated else {})}
        self.rows.append(row)
        self._progress.advance(len(self.rows) - 1)
        self._progress.say(recipe_table([row]))
        self._began = time.monotonic()


def recipe_table(rows: Sequence[Mapping]) -> str:
    """One line per method: what it took, and what it left on held-out training images."""
    lines = [f"{'method':26}{'seconds':>9}{'divergence':>12}{'agreement':>11}{'accuracy':>10}"]
    for row in rows:
        line = f"{row['method']:26}{row['seconds']:9.1f}"
        if "divergence" in row:
            line += f"{row['divergence']:12.5f}{row['agreement']:11.2%}{row['accuracy']:10.2%}"
        lines.append(line)
    return "\n".join(lines)


def settings(config: ml_collections.ConfigDict) -> Settings:
    """The numbers of the methods."""
    ptq = config.ptq
    names = [field.name for field in dataclasses.fields(Reconstruction) if field.name != "seed"]
    learned = Reconstruction(**{name: ptq[name] for name in names}, seed=config.seed)
    return Settings(over=config.calibration, damping=ptq.damping, reconstruction=learned)
