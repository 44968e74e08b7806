"""What the host does between steps: nothing, neither transfers nor compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.quantizers import STATISTICS, set_accumulator_bits
from qflax.training import build, loop, train
from qflax.training.parallel import Devices
from qflax.training.schedules import MOST_STEPS_PER_DISPATCH, Rates, RateWindow
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of


def guard(level):
    for direction in ("host_to_device", "device_to_device"):
        jax.config.update(f"jax_transfer_guard_{direction}", level)


@pytest.mark.parametrize("strays", [False, True])
def test_steps_move_nothing_between_host_and_devices(tiny_config, tmp_path, monkeypatch, strays):
    """From the end of a dispatch to the next reading of metrics; a stray transfer would be found."""
    add, rows, guarded = loop.Meter.add, loop.Meter.rows, []

    def guarded_add(self, metrics):
        add(self, metrics)
        if guarded and strays:
            jnp.zeros(3) + np.ones(3)
        guarded.append(len(guarded))
        guard("disallow_explicit")

    def unguarded_rows(self):
        guard("allow")
        return rows(self)

    monkeypatch.setattr(loop.Meter, "add", guarded_add)
    monkeypatch.setattr(loop.Meter, "rows", unguarded_rows)
    tiny_config.num_train_steps = 6
    tiny_config.log_every_steps = tiny_config.checkpoint_every_steps = 100
    tiny_config.eval_every_epochs = 100.0
    try:
        if strays:
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                train(tiny_config, tmp_path)
        else:
            train(tiny_config, tmp_path)
            assert len(guarded) == 6
    finally:
        guard("allow")


def test_metrics_are_read_while_the_devices_have_more_to_do(tiny_config, tmp_path, monkeypatch):
    """But for those at the end, and where the state is needed."""
    window, log, begun, logged = loop.Rates.window, loop.Trainer._log_training, [], []

    def begin(self, start, end):
        begun.append(end)
        return window(self, start, end)

    def log_training(self, step, train):
        logged.append((step, begun[-1], len(train)))
        log(self, step, train)

    monkeypatch.setattr(loop.Rates, "window", begin)
    monkeypatch.setattr(loop.Trainer, "_log_training", log_training)
    tiny_config.num_train_steps, tiny_config.log_every_steps = 8, 3
    tiny_config.checkpoint_every_steps, tiny_config.eval_every_epochs = 5, 100.0
    train(tiny_config, tmp_path)
    assert [row[:2] for row in logged if row[2]] == [(3, 4), (5, 5), (6, 7), (8, 8)]


def test_later_evaluations_compile_nothing(tiny_config, tmp_path, monkeypatch):
    evaluate, log, counts, compiled = loop.Trainer._attend, loop.Trainer._log_and_save, [], []

    def attend(self, *arguments):
        del compiled[:]
        evaluate(self, *arguments)

    def log_and_save(self, *arguments):
        log(self, *arguments)
        counts.append(len(compiled))

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    monkeypatch.setattr(loop.Trainer, "_attend", attend)
    monkeypatch.setattr(loop.Trainer, "_log_and_save", log_and_save)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        tiny_config.eval_every_epochs = 3 * tiny_config.batch_size / 1337
        train(tiny_config, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(counts) >= 4 and counts[0] > 0 and not any(counts[1:])


def changed(config, accumulator_bits, factor):
    """The configuration with other numbers."""
    weights = dict(kind="accumulator_aware", bits=4, accumulator_bits=accumulator_bits)
    activations = dict(kind="mixed_precision", bits=6)
    config.rules = (dict(layers="stage*", weights=weights, activations=activations),)
    config.learning_rate *= factor
    config.quantizer_learning_rate *= factor
    config.weight_decay *= factor
    config.accumulator_strength = config.oscillation_damping = 1e-3 * factor
    config.oscillation_freezing = (0.1 * factor, 0.01 * factor)
    config.size_targets.activation_kib_sum = 24.0 * factor
    config.seed = int(10 * factor)
    config.num_epochs = 20 * factor
    config.num_train_steps = -1
    return config


def arguments(config):
    """What the first dispatch of a run takes."""
    rng, devices = np.random.default_rng(0), Devices(1)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    dataset = Dataset(images=images, labels=np.zeros(64, np.int32), num_classes=10, name="noise")
    stream = stream_of(dataset, config.seed, config.batch_size, devices)
    rates = build.learning_rates(config, 64)
    numbers = build.hyperparameters(config), build.penalties(config, len(rates))
    _, data = next(stream.dispatches(0, 1, 1))
    state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), build.abstract_state(config))
    return state, data, Rates(rates, devices.replicate).window(0, 1), *numbers


WIDTHS = [(bits, 1 + 0.1 * i) for i, bits in enumerate((10, 12, 14, 16, 20))]


@pytest.mark.thorough
def test_a_sweep_of_accumulator_widths_is_one_program(make_tiny_config):
    """The text that the compiler gets, by which compiled programs are found again, is the same."""
    programs = set()
    for bits, factor in WIDTHS:
        config = changed(make_tiny_config(), bits, factor)
        many = functools.partial(build.train_step(config, Devices(1)).many, steps=1, unroll=True)
        index, (state, *rest) = np.int32(0), arguments(config)
        mapped = jax.pmap(
            lambda state, index, rest, many=many: many(state, index, *rest),
            axis_name="batch",
            in_axes=(None, 0, None),
            out_axes=None,
            devices=jax.devices()[:1],
        )
        programs.add(mapped.lower(state, index[None], tuple(rest)).as_text())
    assert len(programs) == 1


def test_one_compilation_serves_a_sweep_of_accumulator_widths(make_tiny_config):
    devices, traced, losses = Devices(1), [], []
    config = changed(make_tiny_config(), 16, 1.0)
    step = build.train_step(config, devices)

    def many(*arguments):
        traced.append(step)
        return step.many(*arguments, steps=1, unroll=True)

    dispatch = devices.pmap(many)
    variables = initial_variables(build.model(config), (32, 32, 3), 0)
    for bits, factor in WIDTHS:
        own = {**variables, STATISTICS: set_accumulator_bits(variables[STATISTICS], bits)}
        _, *rest = arguments(changed(make_tiny_config(), bits, factor))
        _, metrics = dispatch(devices.replicate(build.state(config, own)), *rest)
        losses.append(float(metrics["accumulator_penalty"][0]))
    assert len(traced) == 1 and losses == sorted(losses, reverse=True) and len(set(losses)) > 1


def test_windows_of_rates_cover_a_run():
    values = np.arange(3 * MOST_STEPS_PER_DISPATCH, dtype=np.float32)
    made = []
    rates = Rates(values, lambda window: made.append(window) or window)
    for start in range(0, len(values), 100):
        end = min(start + 100, len(values))
        window = rates.window(start, end)
        assert len(window.values) == MOST_STEPS_PER_DISPATCH
        assert [float(window.at(step)) for step in (start, end - 1)] == [start, end - 1]
    assert len(made) <= 4 and isinstance(made[0], RateWindow)
