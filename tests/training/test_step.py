"""One training step, on any number of devices."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qflax.data import Dataset
from qflax.data.augment import normalize
from qflax.quantizers import DEVIATIONS, calibrate, frozen_share
from qflax.training import build
from qflax.training.parallel import Devices
from qflax.training.schedules import RateWindow
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 96).astype(np.int32)
    return Dataset(images=images, labels=labels, num_classes=10, name="noise")


def dispatches(config, dataset, num_devices, chunks, unroll=True):
    """State and losses after each dispatch, of as many steps as `chunks` has numbers."""
    devices = Devices(num_devices)
    network = build.model(config)
    variables = initial_variables(network, (32, 32, 3), 1)
    batch = dataset.images[:32].astype(np.float32) / 255
    variables = calibrate(network, variables, [batch], train=True)
    state = devices.replicate(build.state(config, variables))
    step = build.train_step(config, devices)
    stream, at = stream_of(dataset, 3, config.batch_size, devices), 0

    @functools.cache
    def dispatch(count):
        return devices.pmap(functools.partial(step.many, steps=count, unroll=unroll))

    for count in chunks:
        rates = RateWindow(np.full(count, 0.5, np.float32), np.int32(at))
        numbers = build.hyperparameters(config), build.penalties(config, sum(chunks))
        _, data = next(stream.dispatches(at, at + 1, 1))
        state, metrics = dispatch(count)(state, data, rates, *numbers)
        at += count
        yield jax.device_get(state), np.asarray(metrics["loss"])


def run(*args):
    """The state after the last dispatch, and the losses of all."""
    states, losses = zip(*dispatches(*args), strict=True)
    return states[-1], np.concatenate(losses)


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(float(np.max(np.abs(x))), 1e-3))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("kind,tolerance", [("float", 1e-4), ("quantized", 1e-2)])
def test_one_and_two_devices_make_the_same_step(tiny_config, dataset, kind, tolerance):
    # The devices add a batch up in another order. Behind quantizers such a difference in the last place
    # moves the odd value over a rounding boundary, by a whole step.
    tiny_config.augmentation.mixup_alpha = 0.5
    if kind == "float":
        tiny_config.weights = tiny_config.activations = None
    else:
        learned(tiny_config)
        averages = dict(layers="stage1*", activations=dict(kind="uniform", bits=4, scale="ema"))
        tiny_config.rules = (*tiny_config.rules, averages)
    one, two = (run(tiny_config, dataset, n, [1])[0] for n in (1, 2))
    assert_same_updates(tiny_config, one, two, tolerance)


def learned(config):
    """Changes the configuration to learned widths and accumulator-aware weights."""
    config.activations = dict(kind="mixed_precision", bits=6)
    config.size_targets.activation_kib_sum = 24.0
    a2q = dict(kind="accumulator_aware", bits=4, accumulator_bits=14)
    config.rules = (dict(layers="stage*", weights=a2q),)


def assert_same_updates(config, one, two, tolerance):
    start = build.state(config, initial_variables(build.model(config), (32, 32, 3), 1))
    for name in ("trained", "observed"):
        a, b, zero = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(getattr(state, name))])
            for state in (one, two, start)
        )
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a - zero)


def test_several_steps_in_a_dispatch_equal_single_ones(tiny_config, dataset):
    tiny_config.activations = tiny_config.weights = None
    tiny_config.batch_size = 8  # In a loop convolutions are slow on a CPU.
    single, single_losses = run(tiny_config, dataset, 1, [1, 1])
    for unroll in (True, False):
        both, losses = run(tiny_config, dataset, 1, [2], unroll)
        assert_close(single.trained, both.trained, 2e-4)
        np.testing.assert_allclose(losses, single_losses, rtol=1e-4)


@pytest.mark.thorough
def test_learned_widths_and_accumulators_go_through_a_loop(tiny_config, dataset):
    learned(tiny_config)
    tiny_config.batch_size = 8
    looped, single = (run(tiny_config, dataset, 1, [2], False)[0], run(tiny_config, dataset, 1, [1, 1])[0])
    assert_same_updates(tiny_config, looped, single, 1e-2)


@pytest.mark.thorough
def test_learning_lowers_the_loss_on_a_fixed_batch(tiny_config, dataset):
    tiny_config.augmentation.crop_padding = 0
    dataset, tiny_config.learning_rate = dataset.part(0, 32), 0.4
    _, losses = run(tiny_config, dataset, 1, [1] * 12)
    assert losses[-1] < losses[0] - 0.03


def test_damping_keeps_weights_near_their_grids(tiny_config, dataset):
    tiny_config.weights.bits, tiny_config.learning_rate, distances = 3, 0.2, []
    for strength in (1e-9, 1.0):
        tiny_config.oscillation_damping = strength
        state, losses = run(tiny_config, dataset, 1, [1] * 8)
        assert np.isfinite(losses).all()
        apply = functools.partial(build.model(tiny_config).apply, train=False, mutable=[DEVIATIONS])
        _, found = jax.jit(apply)(jax.device_get(state.variables), dataset.images[:1] / np.float32(255))
        distances.append(sum(map(float, jax.tree.leaves(found))))
    assert distances[1] < 0.5 * distances[0]


def test_oscillating_weights_freeze(tiny_config, dataset):
    tiny_config.weights.bits, tiny_config.learning_rate, tiny_config.momentum = 3, 1.0, 0.0
    tiny_config.oscillation_freezing = (0.015, 0.015)
    *_, (before, _), (after, _) = dispatches(tiny_config, dataset, 1, [1] * 8)
    shares = [frozen_share(state.observed["quantizer_stats"]) for state in (before, after)]
    assert 0 < shares[0] <= shares[1] < 1
    kernels = flatten_dict(after.trained["params"])
    for path, (scale, record) in oscillating(before).items():
        later_scale, later = oscillating(after)[path]
        held = record["held"]
        assert later["held"][held].all() and later["threshold"] == np.float32(0.015)
        np.testing.assert_array_equal(later["code"][held], record["code"][held])
        # They went on from their points, on the grid of the last step.
        distance = np.abs(kernels[*path, "kernel"] - record["code"] * scale) / later_scale
        assert np.all(distance[held] < 1e-3)


def oscillating(state):
    """Path of a layer -> the scale of its weights, and the record of their oscillations."""
    scales = flatten_dict(state.trained["quantizer_params"])
    stats = flatten_dict(state.observed["quantizer_stats"])
    records = {}
    for path, value in stats.items():
        if path[-2] == "oscillation":
            scale = scales[*path[:-2], "scale"]
            records.setdefault(path[:-3], (scale, {}))[1][path[-1]] = value
    return records


def counts(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.observed["quantizer_stats"])
    return {int(leaf) for path, leaf in leaves if path[-1].key == "count"}


def test_scales_change_and_stay_positive_and_frozen_counts_stay(tiny_config, dataset):
    before = build.state(tiny_config, initial_variables(build.model(tiny_config), (32, 32, 3), 1))
    after, _ = run(tiny_config, dataset, 1, [1, 1])
    assert min(float(np.min(x)) for x in jax.tree.leaves(after.trained["quantizer_params"])) > 0
    assert counts(after) == {1} and counts(before) == {0}
    assert int(after.step) == 2


def test_bfloat16_keeps_parameters_and_scales_in_float32(tiny_config, dataset):
    tiny_config.dtype = "bfloat16"
    tiny_config.batch_size = 8
    state, losses = run(tiny_config, dataset, 1, [1])
    assert np.isfinite(losses).all()
    assert {x.dtype for x in jax.tree.leaves((state.trained, state.observed))} <= {
        np.dtype("float32"),
        np.dtype("int32"),
    }


def test_cutout_is_zero_after_normalisation(tiny_config, dataset):
    tiny_config.augmentation = dict(crop_padding=0, flip=False, cutout=8, mixup_alpha=0.0, cutmix_alpha=0.0)
    devices = Devices(1)
    step = build.train_step(tiny_config, devices)
    _, data = next(stream_of(dataset, 3, 32, devices).dispatches(0, 1, 1))
    state = build.state(tiny_config, initial_variables(build.model(tiny_config), (32, 32, 3), 1))
    images = normalize(step.inputs(state, 0, data)[0], step.mean, step.std)
    blank = np.sum(np.all(np.abs(images) < 1e-5, axis=-1), axis=(1, 2))
    assert blank.min() >= 16 and blank.max() == 64
