"""The training loop."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.data import load_training
from qflax.errors import require
from qflax.layers import sizes
from qflax.quantizers import PARAMETERS, STATISTICS, widths_frozen
from qflax.training import build
from qflax.training import workdir as workdir_lib
from qflax.training.calibration import CalibrationBatches
from qflax.training.checkpoints import FOLDER, Checkpoints
from qflax.training.logs import Logs, Progress
from qflax.training.meter import Meter, require_finite
from qflax.training.parallel import Devices
from qflax.training.provenance import provenance
from qflax.training.start import starting_variables
from qflax.training.state import TrainState
from qflax.training.stream import stream_of
from qflax.training.table import cost_table, cost_totals


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, object]:
    """Trains as the configuration says, or goes on where an interrupted run of it stopped.

    Args:
      config: see `configs/default.py`.
      workdir: receives everything: configuration, checkpoints, logs, result.

    Returns:
      The result, as written to `result.json`.

    Raises:
      UserError: bad input; divergence.
    """
    workdir = pathlib.Path(workdir)
    config_lib.validate(config)
    config_lib.check_unchanged(config, workdir)
    if (workdir / workdir_lib.RESULT_FILE).exists():
        return json.loads((workdir / workdir_lib.RESULT_FILE).read_text())
    return Trainer(config, workdir).run()


class Trainer:
    """One run."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        """Builds all parts; the workdir is written only when they are known to fit."""
        self.config, self.workdir = config, workdir
        self.devices = Devices(config.num_devices, config.batch_size)
        build.check_quantization(config)
        self.step = build.train_step(config, self.devices)
        self.train_set, validation = load_training(
            config.dataset,
            data_dir=config.data_dir or None,
            validation_examples=config.validation_examples,
            crop=build.crop(config),
        )
        self.num_examples = self.train_set.num_examples
        require(
            config.batch_size <= self.num_examples,
            f"config.batch_size={config.batch_size}: there are {self.num_examples} training images; lower it",
        )
        self.rates = build.learning_rates(config, self.num_examples)
        self.numbers = (
            build.hyperparameters(config),
            build.penalties(config, len(self.rates)),
            self.devices.replicate(workdir_lib.load_teacher(config)),
        )
        self.evaluate = None
        if validation.num_examples:
            self.evaluate = workdir_lib.evaluator(config, validation, self.devices)
        self.state, self.start = self._initial_state()
        self.origin = provenance(len(self.devices))
        config_lib.save(config, workdir)
        workdir_lib.record_start(workdir, self.start, self.origin)
        self.checkpoints = Checkpoints(workdir, config.keep_checkpoints)

    def run(self) -> dict[str, object]:
        """Trains to the end and evaluates on the test split."""
        logs = Logs(self.workdir, self.start)
        progress = Progress(len(self.rates), self.start, self.num_examples / self.config.batch_size)
        progress.say(f"{self.origin['device']}, {self.num_examples} training images")
        try:
            state, last = self._steps(logs, progress)
            return self._finish(state, last, logs)
        finally:
            progress.close()
            logs.close()
            self.checkpoints.close()

    def _initial_state(self) -> tuple[TrainState, int]:
        """The state to go on from, and its step; writes nothing."""
        config = self.config
        if (self.workdir / FOLDER).is_dir():
            checkpoints = Checkpoints(self.workdir, read_only=True)
            latest = checkpoints.latest_step()
            if latest is not None:
                return checkpoints.restore(build.abstract_state(config), latest), latest
        batches = CalibrationBatches(config, self.train_set)
        return build.state(config, starting_variables(config, batches)), 0

    def _steps(self, logs: Logs, progress: Progress) -> tuple[TrainState, dict[str, float]]:
        """Makes all steps that are left; returns the last training metrics too.

        What is due within a dispatch is done at its end.
        """
        config, total, num_epoch_steps = (
            self.config,
            len(self.rates),
            self.num_examples / self.config.batch_size,
        )
        eval_every = max(round(config.eval_every_epochs * num_epoch_steps), 1)
        dispatch, dispatches = self._dispatching()
        meter, last = Meter(logs.seconds, config.batch_size), logs.last_train
        state, step, self.state = self.devices.replicate(self.state), self.start, None
        with contextlib.closing(dispatches):
            for end, data in dispatches:
                state, metrics = dispatch(state, data, self.rates[step:end], *self.numbers)
                meter.add(metrics)
                progress.advance(end)

                def due(every, step=step, end=end):
                    return end == total or end // every > step // every

                evaluating = self.evaluate is not None and due(eval_every)
                saving = evaluating or due(config.checkpoint_every_steps)
                if saving or due(config.log_every_steps):
                    before, last = last, meter.read(end, self._last_good)
                    logs.write(end, last, "train")
                    progress.show(last)
                    if last.get("widths_frozen", 0) == 1 > before.get("widths_frozen", 1):
                        progress.say(f"the widths are frozen at {last['weight_kib']:.2f} KiB of weights")
                if saving:
                    self._evaluate_and_save(state, end, evaluating, logs, progress)
                    meter.restart()
                step = end
        return state, last

    def _dispatching(self) -> tuple[Callable, Iterator]:
        """The mapped steps of a dispatch, and (end, data) of each dispatch."""
        config, on_cpu = self.config, self.devices.platform == "cpu"
        stream = stream_of(self.train_set, config.seed, config.batch_size, self.devices)
        steps = config.steps_per_dispatch or (1 if on_cpu else stream.usual_steps)
        steps = min(steps, self.num_examples // config.batch_size)
        many = functools.partial(self.step.many, unroll=on_cpu)
        mapped = self.devices.pmap(many, donate=True, data_axes=stream.axes)
        return mapped, stream.dispatches(self.start, len(self.rates), steps, build.workers(config))

    def _evaluate_and_save(self, state, step, evaluating, logs, progress) -> None:
        validation = self.evaluate(state.served) if evaluating else None
        if validation is not None:
            logs.write(step, validation, "validation")
            progress.say(f"step {step}  validation accuracy {validation['accuracy']:.2%}")
        host = jax.device_get(state)
        require_finite(host.trained, step, self._last_good)
        costs = build.measure_costs(self.config, host.served)
        frozen = widths_frozen(host.observed[STATISTICS])
        if frozen is not None and not frozen:
            validation = None  # It shall not be the best: its widths are not yet what they will be.
        logs.write(step, {name: float(size) for name, size in sizes(costs).items()}, "size")
        logs.write(step, _per_layer(costs, host.variables), "layers")
        self.checkpoints.save(host, step, validation)

    def _last_good(self) -> str:
        step = self.checkpoints.latest_step()
        if step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.workdir / FOLDER / str(step)}"

    def _finish(self, state: TrainState, last: dict[str, float], logs: Logs) -> dict[str, object]:
        """Evaluates on the test split, once, and writes the result."""
        config = self.config
        validation = self.evaluate(state.served) if self.evaluate is not None else {}
        test = workdir_lib.load_evaluator(config, "test", self.devices)(state.served)
        served = jax.device_get(state.served)
        costs = build.measure_costs(config, served)
        steps = len(self.rates)
        seconds = logs.seconds
        result = {
            "test_accuracy": test["accuracy"],
            "test_top5_accuracy": test["top5_accuracy"],
            "test_loss": test["loss"],
            "validation_accuracy": validation.get("accuracy"),
            "train_loss": last.get("loss"),
            "epochs": steps * config.batch_size / self.num_examples,
            "steps": steps,
            "train_seconds": seconds,
            "images_per_second": steps * config.batch_size / seconds if seconds else None,
            "parameters": workdir_lib.count_parameters(served),
            **cost_totals(costs),
            **_widths(config, costs, served),
            **self.origin,
        }
        logs.write(steps, test, "test")
        table = cost_table(costs, config.size_targets, config.size_strengths)
        (self.workdir / workdir_lib.TABLE_FILE).write_text(table + "\n")
        (self.workdir / workdir_lib.RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n")
        return result


def _widths(config, costs, served) -> dict[str, object]:
    """Whether learned widths are frozen, and within the targets; nothing where there are none."""
    frozen = widths_frozen(served[STATISTICS])
    if frozen is None:
        return {}
    reached = sizes(costs)
    missed = [name for name, target in config.size_targets.items() if 0 < target < reached[name]]
    return {"widths_frozen": bool(frozen), "missed_size_targets": missed}


def _per_layer(costs, variables) -> dict[str, float]:
    """Bits of every layer, of its accumulator, and the mean of every learned or observed scale or range."""
    numbers = {}
    for cost in costs:
        if cost.macs:
            numbers[f"{cost.path}/weight_bits"] = float(cost.weight_bits)
        if cost.accumulation is not None:
            numbers[f"{cost.path}/accumulator_bits_exact"] = cost.accumulation.exact_bits
        if cost.activations:
            numbers[f"{cost.path}/activation_bits"] = float(cost.activation_bits)
    for collection in (STATISTICS, PARAMETERS):
        for path, value in jax.tree_util.tree_leaves_with_path(variables[collection]):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if not name.endswith("/count"):
                numbers[name] = float(np.mean(value))
    return numbers
