"""How training and evaluation images reach the devices: resident and streamed sets give the same batches."""

import functools

import jax
import numpy as np
import pytest

from qflax.data import Batch, Dataset
from qflax.training import build
from qflax.training.evaluate import Evaluator
from qflax.training.parallel import Devices
from qflax.training.schedules import RateWindow
from qflax.training.state import initial_variables
from qflax.training.stream import ResidentStream, stream_of

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 40).astype(np.int32)


class Streamed:
    """A streamed data set with the training stream of a resident one; notes when it is closed."""

    def __init__(self):
        self.num_examples, self.closed, self.started = len(LABELS), 0, []
        self.image_shape = IMAGES.shape[1:]

    def training_batches(self, *, seed, first_step, batch_size, shard, num_workers):
        self.started.append((first_step, shard, num_workers))
        dataset = Dataset(images=IMAGES, labels=LABELS, num_classes=10, name="noise")
        resident = ResidentStream(dataset, seed, batch_size, Devices(1))
        try:
            for step, (_, data) in enumerate(resident.dispatches(0, 10**6, 1)):
                if step >= first_step:
                    own = data.examples(step, np.arange(batch_size), batch_size, partners=False)
                    yield Batch(np.asarray(own.images), np.asarray(own.labels), np.ones(batch_size, bool))
        finally:
            self.closed += 1

    def evaluation_batches(self, *, batch_size, shard, num_workers):
        assert shard == (0, 1) and num_workers == 3
        padded = -(-len(LABELS) // batch_size) * batch_size
        for first in range(0, padded, batch_size):
            places = np.arange(first, first + batch_size)
            chosen = np.minimum(places, len(LABELS) - 1)
            # What fills the batch is nonsense that must not count.
            images = np.where((places < len(LABELS))[:, None, None, None], IMAGES[chosen], 255)
            yield Batch(images, LABELS[chosen], places < len(LABELS))


@pytest.fixture
def resident():
    return Dataset(images=IMAGES, labels=LABELS, num_classes=10, name="noise")


def steps(config, dataset, num_devices, start, end, per_dispatch, state=None):
    devices = Devices(num_devices)
    state = state or build.state(config, initial_variables(build.model(config), (32, 32, 3), 1))
    stream = stream_of(dataset, 3, config.batch_size, devices)
    step = build.train_step(config, devices)
    numbers, losses, at = (build.hyperparameters(config), build.penalties(config, 10)), [], start
    state = devices.replicate(state)
    for stop, data in stream.dispatches(start, end, per_dispatch, 0):
        many = functools.partial(step.many, steps=stop - at, unroll=True)
        rates = RateWindow(np.full(stop - at, 0.5, np.float32), np.int32(at))
        state, metrics = devices.pmap(many, data_axes=stream.axes)(state, data, rates, *numbers)
        losses, at = [*losses, *np.asarray(metrics["loss"])], stop
    return jax.device_get(state), losses


@pytest.mark.thorough
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_streamed_and_resident_sets_train_alike(tiny_config, resident):
    # With partners, of which a device's last one is on the next device.
    tiny_config.weights = tiny_config.activations = None
    tiny_config.augmentation.mixup_alpha = 0.5
    tiny_config.batch_size = 8
    expected = steps(tiny_config, resident, 2, 0, 4, 2)
    streamed = Streamed()
    result = steps(tiny_config, streamed, 2, 0, 4, 2)
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert streamed.closed == 1 and streamed.started == [(0, (0, 1), 0)]


@pytest.mark.parametrize("num_devices", range(1, min(len(jax.devices()), 2) + 1))
def test_data_is_as_was_told(resident, num_devices):
    for dataset in (resident, Streamed()):
        stream = stream_of(dataset, 3, 8, Devices(num_devices))
        _, data = next(stream.dispatches(0, 4, 4))
        told = stream.abstract(4)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), told, data)
        assert all(jax.tree.leaves(same))


def test_dispatches_end_at_multiples_and_go_on_where_they_are_told(resident):
    for dataset in (resident, Streamed()):
        stream = stream_of(dataset, 3, 8, Devices(1))
        ends = [end for end, _ in stream.dispatches(3, 11, 4)]
        assert ends == [4, 8, 11]
    # A stream that is left early is closed.
    streamed = Streamed()
    dispatches = stream_of(streamed, 3, 8, Devices(1)).dispatches(7, 100, 1)
    end, data = next(dispatches)
    assert end == 8 and data.first_step == 7 and streamed.started[0][0] == 7
    dispatches.close()
    assert streamed.closed == 1


@pytest.mark.parametrize("num_devices", [1, 2])
def test_streamed_evaluation_counts_every_example_once(tiny_config, resident, num_devices):
    if num_devices > len(jax.devices()):
        pytest.skip("needs two devices")
    tiny_config.weights = tiny_config.activations = None
    model = build.model(tiny_config)
    variables = initial_variables(model, (32, 32, 3), 1)
    kernel = RNG.normal(size=variables["params"]["classifier"]["kernel"].shape).astype(np.float32)
    variables["params"]["classifier"]["kernel"] = kernel
    fields = dict(batch_size=16, mean=(0.5,) * 3, std=(0.2,) * 3, num_workers=3)
    devices = Devices(num_devices)
    results = [Evaluator(model, d, devices, **fields)(variables) for d in (resident, Streamed())]
    for name in results[0]:
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-6)
    assert 0 < results[0]["accuracy"] < 1
