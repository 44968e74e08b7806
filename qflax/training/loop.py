"""The training loop."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import jax
import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.data import load_training
from qflax.errors import Interrupted, UserError, require
from qflax.files import require_makeable, write_atomically
from qflax.layers import sizes
from qflax.quantizers import PARAMETERS, STATISTICS, frozen_share, widths_frozen
from qflax.quantizers.oscillation import in_record
from qflax.training import build
from qflax.training import workdir as workdir_lib
from qflax.training.calibration import CalibrationBatches
from qflax.training.checkpoints import Checkpoints
from qflax.training.diagnosis import first_not_finite
from qflax.training.interruption import Interruption
from qflax.training.kernels import layer_kernels
from qflax.training.lock import locked
from qflax.training.logs import Progress
from qflax.training.meter import Meter
from qflax.training.parallel import Devices, Mapped
from qflax.training.processes import from_first, is_first, presence
from qflax.training.provenance import provenance
from qflax.training.recorder import Recorder, Silence
from qflax.training.schedules import MOST_STEPS_PER_DISPATCH, Rates
from qflax.training.start import starting_variables
from qflax.training.start_time import StartTime
from qflax.training.state import TrainState
from qflax.training.stream import stream_of
from qflax.training.table import cost_table, cost_totals

_MOST_UNROLLED = 16  # Steps of a dispatch, where each is compiled anew.


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, object]:
    """Trains as the configuration says, or goes on where an interrupted run of it stopped.

    SIGTERM or Ctrl-C has it save a checkpoint after the step that it is making. From there, or from the last
    checkpoint if it ended otherwise, the next call goes on to the very same result.

    Several processes (`runtime.join_processes`) train together; the first of them alone reads and writes the
    workdir.

    Args:
      config: see `configs/default.py`.
      workdir: receives everything: configuration, checkpoints, logs, result.

    Returns:
      The result, as written to `result.json`; in other processes than the first what they know of it.

    Raises:
      UserError: bad input; divergence; a full disk.
      Interrupted: asked to stop by a signal.
    """
    workdir = pathlib.Path(workdir)
    config_lib.validate(config)
    require_makeable(workdir)
    lock = locked(workdir) if is_first() else contextlib.nullcontext()
    with Interruption() as interruption, presence(), lock:
        with interruption.at_once():
            if is_first():
                workdir_lib.require_trained(workdir)
                config_lib.check_unchanged(config, workdir)
                if not (workdir / config_lib.FILE).exists():
                    workdir_lib.require_unused(workdir)
            if from_first(np.bool_((workdir / workdir_lib.RESULT_FILE).exists())):
                return workdir_lib.load_result(workdir) if is_first() else {}
            trainer = Trainer(config, workdir, interruption)
        return trainer.run()


class Trainer:
    """One run."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, interruption: Interruption):
        """Builds all parts; the workdir is written only when they are known to fit."""
        self.config, self.workdir, self.interruption = config, workdir, interruption
        self.start_time = StartTime()
        self.devices = Devices(config.num_devices, config.batch_size)
        build.check_quantization(config)
        self.step = build.train_step(config, self.devices)
        self.abstract = build.abstract_state(config)
        self.start_time.end("network")
        self.train_set, validation = load_training(
            config.dataset,
            data_dir=config.data_dir or None,
            validation_examples=config.validation_examples,
            crop=build.crop(config),
        )
        self.start_time.end("data")
        self.num_examples = self.train_set.num_examples
        require(
            config.batch_size <= self.num_examples,
            f"config.batch_size={config.batch_size}: there are {self.num_examples} training images; lower it",
        )
        self.stream = stream_of(self.train_set, config.seed, config.batch_size, self.devices)
        self.rates = build.learning_rates(config, self.num_examples)
        numbers = build.hyperparameters(config), build.penalties(config, len(self.rates))
        self.numbers = self.devices.replicate((*numbers, workdir_lib.load_teacher(config)))
        self.evaluate = None
        if validation.num_examples:
            self.evaluate = workdir_lib.evaluator(config, validation, self.devices)
        self.origin = provenance(len(self.devices))
        self.steps_per_dispatch, self.dispatch = self._dispatch()
        # Beside the making of the state, as compilers leave Python's lock to others.
        self.compiling = ThreadPoolExecutor(1).submit(self._compile)
        self.state, record = self._initial_state()
        self.start_time.end("initial state")
        self.start = int(self.state.step)
        self.logged_step = int(from_first(np.int32(record.get("logged_step", self.start))))
        self.recorder = self._recorder() if is_first() else Silence()
        self.last = self.recorder.last_train
        self.meter = Meter(config.batch_size, self.recorder.seconds, record.get("unlogged"))

    def run(self) -> dict[str, object]:
        """Trains to the end and evaluates on the test split."""
        self.recorder.say(f"{self.origin['device']}, {self.num_examples} training images")
        if self.start == 0:
            self.recorder.say(f"starts from {self.config.init_from or 'random weights (config.init_from)'}")
            for workdir in workdir_lib.trained_on_held_out(self.config):
                self.recorder.say(
                    f"{workdir}: was trained on some of the {self.config.validation_examples} images that "
                    "are held out here (config.validation_examples), so that validation accuracies are too "
                    "high; train that one with the same number first"
                )
        where = " for the CPU" if self.devices.platform == "cpu" else ""
        for name, value in self.origin["settings"].items():
            self.recorder.say(f"set{where}: {name}={value}")
        try:
            state = self._steps()
            self.recorder.wait()
            with self.interruption.at_once():
                return self._finish(state)
        finally:
            self.recorder.close()

    def _recorder(self) -> Recorder:
        return Recorder(
            self.config,
            self.workdir,
            self.origin,
            start=self.start,
            logged_step=self.logged_step,
            total=len(self.rates),
            steps_per_epoch=self.num_examples / self.config.batch_size,
        )

    def _initial_state(self) -> tuple[TrainState, dict]:
        """The state to go on from, which one process reads or makes, and what its run had yet to do."""
        config = self.config
        if not is_first():
            return from_first(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.abstract)), {}
        restored = Checkpoints(self.workdir).restore_latest(self.abstract, Progress.say)
        if restored is not None:
            return from_first(restored.state), restored.record
        batches = CalibrationBatches(config, self.train_set)
        return from_first(build.state(config, starting_variables(config, batches))), {}

    def _steps(self) -> TrainState:
        """Makes all steps that are left."""
        rates, compiled = Rates(self.rates, self.devices.replicate), self.compiling.result()
        self.start_time.end("compilation")
        state, step, self.state = self.devices.replicate(self.state), self.start, None
        previous, before = None, self.logged_step
        every, workers = self.steps_per_dispatch, build.workers(self.config)
        dispatches = self.stream.dispatches(step, len(self.rates), every, workers)
        if before < step:
            self._attend(state, before, step)
        with contextlib.closing(dispatches):
            for end, data in dispatches:
                many = compiled if end - step == every else self.dispatch(end - step)
                state, metrics = many(state, data, rates.window(step, end), *self.numbers)
                if step == self.start:
                    jax.block_until_ready(metrics)
                    self.start_time.end("step")
                    self.recorder.say(str(self.start_time))
                # One dispatch ahead keeps devices busy; who is asked to stop has to wait for all that are.
                jax.block_until_ready(previous)
                self._log(state, before, step)
                previous, before = metrics, step
                self.meter.add(metrics)
                self.recorder.advance(end)
                self._attend(state, step, end)
                step = end
        return state

    def _due(self, every: int, before: int, end: int) -> bool:
        """Whether what is done every so many steps is, after the steps from `before` to `end`."""
        return end == len(self.rates) or end // every > before // every

    def _log(self, state: TrainState, before: int, end: int) -> None:
        """Logs what is due after the steps from `before` to `end`, unless `_attend` has.

        By then the devices have their next steps, of which `state` is the outcome: a run that is stopped by a
        bad step has the state from before it in all of them.
        """
        if self._due(self.config.log_every_steps, before, end):
            self._require_finite(state, end)
            self._log_training(end, self.meter.read())
            self.meter.logged()

    def _attend(self, state: TrainState, before: int, end: int) -> None:
        """Does what is due after the steps from `before` to `end` and needs their state; logs with it.

        Where it is asked to stop, it saves the state and leaves that to the next start.
        """
        config = self.config
        eval_every = max(round(config.eval_every_epochs * self.num_examples / config.batch_size), 1)
        evaluating = self.evaluate is not None and self._due(eval_every, before, end)
        saving = evaluating or self._due(config.checkpoint_every_steps, before, end)
        try:
            self.interruption.check()
            if not saving:
                return
            self._require_finite(state, end)
            validation = None
            train = self.meter.read()
            if evaluating:
                with self.interruption.at_once():
                    validation = self.evaluate(state.served)
        except Interrupted as error:
            self._stop(state, before, end, error)
        self._log_training(end, train)
        if validation is not None:
            self.recorder.write(end, validation, "validation")
            self.recorder.say(f"step {end}  validation accuracy {validation['accuracy']:.2%}")
        if saving and is_first():
            self._log_and_save(state, end, validation)
        self.meter.logged()

    def _stop(self, state: TrainState, before: int, end: int, error: Interrupted) -> NoReturn:
        self._require_finite(state, end)
        if end > self.start:
            record = {"logged_step": before, "unlogged": self.meter.unlogged()}
            self.recorder.save(jax.device_get(state), end, record=record)
        raise Interrupted(f"{error}, after step {end} of {len(self.rates)}") from None

    def _require_finite(self, state: TrainState, end: int) -> None:
        """Raises `UserError` with the step, the layer and the remedy where a step stopped the run."""
        bad = self.meter.first_bad(self.config.skip_bad_steps)
        if bad is None:
            return
        step = end - bad
        ((_, data),) = self.stream.dispatches(step - 1, step, 1)
        arguments = (state, data, self.stream.axes, self.rates[step - 1], *self.numbers)
        what = first_not_finite(self.step, self.devices, *arguments)
        sound = self.recorder.wait()
        raise UserError(
            f"step {step} is not finite, first of all {what}; "
            + (f"the last good checkpoint is {sound}" if sound else "there is no checkpoint yet")
            + "; start again in another --workdir with a lower config.learning_rate or "
            "config.quantizer_learning_rate or with config.gradient_clip, or run the same command with "
            "config.skip_bad_steps to pass over such steps"
        )

    def _log_training(self, step: int, train: dict[str, float]) -> None:
        if not train:
            return
        before, self.last = self.last, train
        self.recorder.write(step, train, "train")
        self.recorder.show(train)
        if train.get("widths_frozen", 0) == 1 > before.get("widths_frozen", 1):
            self.recorder.say(f"the widths are frozen at {train['weight_kib']:.2f} KiB of weights")

    def _dispatch(self) -> tuple[int, Callable[[int], Mapped]]:
        """The usual number of steps of a dispatch; and a function from a number of steps to these, mapped."""
        config, on_cpu = self.config, self.devices.platform == "cpu"
        steps = config.steps_per_dispatch or (1 if on_cpu else self.stream.usual_steps)
        most = min(self.num_examples // config.batch_size, len(self.rates))
        steps = min(steps, most, _MOST_UNROLLED if on_cpu else MOST_STEPS_PER_DISPATCH)

        @functools.cache
        def dispatch(steps):
            many = functools.partial(self.step.many, steps=steps, unroll=on_cpu)
            return self.devices.pmap(many, donate=True, data_axes=self.stream.axes)

        return steps, dispatch

    def _compile(self) -> Mapped:
        """The usual dispatch, compiled."""
        steps, rates = self.steps_per_dispatch, Rates(self.rates, lambda window: window)
        arguments = self.stream.abstract(steps), rates.window(0, 1), *self.numbers
        return self.dispatch(steps).compile(self.abstract, *arguments)

    def _log_and_save(self, state: TrainState, step: int, validation: dict[str, float] | None) -> None:
        host = jax.device_get(state)
        costs = build.measure_costs(self.config, host.served)
        frozen = widths_frozen(host.observed[STATISTICS])
        if frozen is not None and not frozen:
            validation = None  # It shall not be the best: its widths are not yet what they will be.
        self.recorder.write(step, {name: float(size) for name, size in sizes(costs).items()}, "size")
        self.recorder.write(step, _per_layer(costs, host.variables), "layers")
        shape = build.image_format(self.config).image_shape
        kernels = layer_kernels(build.model(self.config), host.served, shape)
        self.recorder.draw_layers(step, costs, kernels)
        self.recorder.save(host, step, validation)

    def _finish(self, state: TrainState) -> dict[str, object]:
        """Evaluates on the test split, once, and writes the result."""
        config = self.config
        validation = self.evaluate(state.served) if self.evaluate is not None else {}
        test = workdir_lib.load_evaluator(config, "test", self.devices)(state.served)
        served = jax.device_get(state.served)
        costs = build.measure_costs(config, served)
        steps = len(self.rates)
        seconds = self.recorder.seconds
        result = {
            "test_accuracy": test["accuracy"],
            "test_top5_accuracy": test["top5_accuracy"],
            "test_loss": test["loss"],
            "validation_accuracy": validation.get("accuracy"),
            "train_loss": self.last.get("loss"),
            "epochs": steps * config.batch_size / self.num_examples,
            "steps": steps,
            "train_seconds": seconds,
            "images_per_second": steps * config.batch_size / seconds if seconds else None,
            "parameters": workdir_lib.count_parameters(served),
            **cost_totals(costs),
            **_widths(config, costs, served),
            **_frozen(served),
            **self.origin,
        }
        self.recorder.write(steps, test, "test")
        self.recorder.conclude(config_lib.flat(config))
        if not is_first():
            return result
        table = cost_table(costs, config.size_targets, config.size_strengths)
        write_atomically(self.workdir / workdir_lib.TABLE_FILE, table + "\n")
        write_atomically(self.workdir / workdir_lib.RESULT_FILE, json.dumps(result, indent=2) + "\n")
        return result


def _widths(config, costs, served) -> dict[str, object]:
    """Whether learned widths are frozen, and within the targets; nothing where there are none."""
    frozen = widths_frozen(served[STATISTICS])
    if frozen is None:
        return {}
    reached = sizes(costs)
    missed = [name for name, target in config.size_targets.items() if 0 < target < reached[name]]
    return {"widths_frozen": bool(frozen), "missed_size_targets": missed}


def _frozen(served) -> dict[str, float]:
    """The fraction of weights that oscillated and are frozen; nothing where none may be."""
    share = frozen_share(served[STATISTICS])
    return {} if share is None else {"frozen_weights": float(share)}


def _per_layer(costs, variables) -> dict[str, float]:
    """Bits of every layer, of its accumulator, the mean of every learned or observed scale or range, and the
    share of its frozen weights."""
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
            if path[-1].key == "held" or not (path[-1].key == "count" or in_record(path)):
                numbers[name] = float(np.mean(value))
    return numbers
