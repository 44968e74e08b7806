"""Steps that are not finite: what they leave behind, and what is told of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.quantizers import CONSTRAINTS, PARAMETERS, STATISTICS, calibrate, constrain, widths_frozen
from qflax.training import build
from qflax.training.diagnosis import first_not_finite
from qflax.training.parallel import Devices
from qflax.training.schedules import RateWindow
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of

SHAPE = (8, 8, 3)


class Run:
    """A run whose state can be changed between its steps; every step is a dispatch."""

    def __init__(self, config):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (32, *SHAPE), dtype=np.uint8)
        labels = rng.integers(0, 10, 32).astype(np.int32)
        self.config, self.devices = config, Devices(1)
        config.batch_size = 8
        data = Dataset(images=images, labels=labels, num_classes=10, name="noise")
        self.stream = stream_of(data, 3, 8, self.devices)
        network = build.model(config)
        variables = calibrate(
            network, initial_variables(network, SHAPE, 1), [images.astype(np.float32) / 255], train=True
        )
        self.initial = build.state(config, variables)
        example = np.zeros((1, *SHAPE), np.float32)
        _, self.reported = network.apply(variables, example, train=False, mutable=[CONSTRAINTS])
        self.step = build.train_step(config, self.devices)
        self.dispatch = self.devices.pmap(functools.partial(self.step.many, steps=1, unroll=True))

    def numbers(self, skip=0):
        hyperparameters = build.hyperparameters(self.config).replace(skip_bad_steps=jnp.float32(skip))
        return hyperparameters, build.penalties(self.config, 10)

    def data(self, at):
        return next(self.stream.dispatches(at, at + 1, 1))[1]

    def states(self, rates, skip):
        """The state and the number of bad steps in a row after every step."""
        state = self.devices.replicate(self.initial)
        for i, rate in enumerate(rates):
            window = RateWindow(np.float32([rate]), np.int32(i))
            state, metrics = self.dispatch(state, self.data(i), window, *self.numbers(skip))
            yield jax.device_get(state), int(metrics["bad_steps"][0])

    def diagnose(self, rate=1.0, momentum=0.9, **changed):
        """What is told of the first step, where functions change the leaves whose paths end so."""

        def change(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            functions = [function for end, function in changed.items() if name.endswith(end)]
            return functions[0](leaf) if functions else leaf

        state = jax.tree_util.tree_map_with_path(change, self.initial)
        numbers, penalties = self.numbers()
        numbers = numbers.replace(momentum=jnp.float32(momentum))
        arguments = (self.data(0), self.stream.axes, np.float32(rate), numbers, penalties)
        return first_not_finite(self.step, self.devices, self.devices.replicate(state), *arguments)


@pytest.fixture(scope="module")
def runs(make_tiny_config):
    """A float network, one with learned scales and averaged weights, one with learned widths."""
    plain, quantized, learned = make_tiny_config(), make_tiny_config(), make_tiny_config()
    plain.weights = plain.activations = None
    quantized.ema_decay = 0.9
    learned.weights = learned.activations = dict(kind="mixed_precision", bits=6)
    learned.freeze_widths_after = 1.0
    return {"float": Run(plain), "quantized": Run(quantized), "learned": Run(learned)}


@pytest.fixture
def network(runs, request):
    return runs[request.param]


quantized = pytest.mark.parametrize("network", ["quantized"], indirect=True)
plain = pytest.mark.parametrize("network", ["float"], indirect=True)


def lose(leaf):
    return jnp.full_like(leaf, jnp.nan)


def shrink(leaf):
    return 1e-3 * leaf


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def learned(state):
    return state.trained, state.observed, state.opt_state, state.average


@pytest.mark.thorough
@quantized
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_that_may_be_skipped_changes_nothing_but_the_count(network, bad):
    rates = [1, bad, bad, 1]
    (first, n1), (second, n2), (third, n3), (last, n4) = network.states(rates, skip=2)
    assert (n1, n2, n3, n4) == (0, 1, 2, 0)
    assert [int(s.step) for s in (first, second, third, last)] == [1, 2, 3, 4]
    assert same(learned(first), learned(second)) and same(learned(first), learned(third))
    assert not same(learned(third), learned(last)) and int(last.bad_steps) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


@quantized
def test_one_bad_step_too_many_leaves_the_state_before_it_whatever_comes(network):
    before, first, second, stuck, still = network.states([1, np.nan, 1, np.nan, 1], skip=0)
    assert [n for _, n in (before, first, second, stuck, still)] == [0, 1, 1, 1, 1]
    assert int(before[0].step) == int(still[0].step) == 1
    assert same(learned(before[0]), learned(still[0]))
    *_, skipped, stuck, still = network.states([1, np.nan, np.nan, 1], skip=1)
    assert [n for _, n in (skipped, stuck, still)] == [1, 2, 2]
    assert int(still[0].step) == 2 and same(learned(skipped[0]), learned(still[0]))


@pytest.mark.parametrize("network", ["learned"], indirect=True)
def test_widths_freeze_at_a_last_step_that_is_skipped(network):
    states = [state for state, _ in network.states([1] * 9 + [np.nan], skip=1)]
    frozen = [bool(widths_frozen(state.observed[STATISTICS])) for state in states]
    assert frozen == [False] * 9 + [True] and same(states[-1].trained, states[-2].trained)
    *_, stuck = network.states([1] * 9 + [np.nan], skip=0)
    assert not widths_frozen(stuck[0].observed[STATISTICS])  # It is not made, and the run ends.


@pytest.mark.parametrize("network", ["quantized", "learned"], indirect=True)
@pytest.mark.parametrize("rate", [1e6, 1e30, np.inf])
def test_scales_and_widths_stay_within_bounds_whatever_moves_them(network, rate):
    numbers, penalties = network.numbers(skip=10)
    numbers = numbers.replace(quantizer_learning_rate=jnp.float32(rate))
    state, moved = network.devices.replicate(network.initial), []
    for i in range(3):
        state, _ = network.dispatch(
            state, network.data(i), RateWindow(np.float32([1]), np.int32(i)), numbers, penalties
        )
        parameters = jax.device_get(state.trained[PARAMETERS])
        moved.append(not same(parameters, network.initial.trained[PARAMETERS]))
        assert same(constrain(parameters, network.reported), parameters)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    # The first step has no gradients: the classifier is zero. Infinite updates are steps to skip.
    assert all(moved[1:]) or rate == np.inf


@plain
def test_a_step_that_is_finite_has_nothing_to_tell(network):
    assert "nothing" in network.diagnose()


@plain
def test_the_first_layer_whose_output_is_not_finite_is_named(network):
    told = network.diagnose(**{"stage2_block1/conv1/kernel": lose, "classifier/kernel": lose})
    assert told.startswith("the output of stage2_block1/conv1"), told


@quantized
def test_a_scale_is_named_by_its_quantizer(network):
    told = network.diagnose(**{"quantizer_params/stage1_block1/conv2/weights/scale": lose})
    assert told == "the output of stage1_block1/conv2/weights"


@plain
def test_the_last_layer_of_those_whose_gradients_overflow_is_named(network):
    def separate(kernel):
        return 1e37 * jnp.eye(*kernel.shape)

    # The norm behind divides by how little comes out of it, and with it the gradient.
    told = network.diagnose(**{"classifier/kernel": separate, "stage3_block1/conv2/kernel": shrink})
    assert told == "the gradient of params/stage3_block1/conv1/kernel"


@plain
def test_a_gradient_whose_norm_alone_overflows(network):
    def separate(kernel):
        return 1e25 * jnp.eye(*kernel.shape)

    assert network.diagnose(**{"classifier/kernel": separate}) == "the norm of the gradient"


@plain
def test_an_update_that_overflows_is_named(network):
    assert network.diagnose(rate=np.nan).startswith("the learning rate")
    assert network.diagnose(momentum=np.nan).startswith("the new value of params/")
