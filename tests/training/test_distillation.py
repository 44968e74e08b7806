"""Distillation: the loss, and a student that follows its teacher."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.errors import UserError
from qflax.training import build, train
from qflax.training.distillation import distillation_loss
from qflax.training.parallel import Devices
from qflax.training.schedules import RateWindow
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of
from qflax.training.workdir import load_teacher

STUDENT = jnp.asarray([[2.0, -1.0, 0.5], [0.0, 0.3, -4.0]])
TEACHER = jnp.asarray([[1.0, 1.5, -0.5], [3.0, 0.3, 0.1]])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_scaled_divergence(temperature):
    def softmax(x):
        x = np.exp(np.asarray(x, np.float64) / temperature)
        return x / x.sum(-1, keepdims=True)

    p, q = softmax(TEACHER), softmax(STUDENT)
    expected = temperature**2 * np.sum(p * np.log(p / q), -1)
    np.testing.assert_allclose(distillation_loss(STUDENT, TEACHER, temperature), expected, rtol=1e-5)
    np.testing.assert_allclose(distillation_loss(TEACHER, TEACHER, temperature), 0, atol=1e-5)


def test_teacher_gets_no_gradient_and_the_student_s_is_the_difference_of_predictions():
    loss = lambda s, t: jnp.sum(distillation_loss(s, t, 2.0))  # noqa: E731
    own, teacher_s = jax.grad(loss, argnums=(0, 1))(STUDENT, TEACHER)
    np.testing.assert_array_equal(teacher_s, 0)
    expected = 2 * (jax.nn.softmax(STUDENT / 2) - jax.nn.softmax(TEACHER / 2))
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_a_student_that_only_distils_comes_near_its_teacher(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.weights = config.activations = None
    config.num_train_steps = 60
    train(config, tmp_path / "teacher")
    config = make_tiny_config()
    config.num_train_steps = 60
    config.distillation.update(teacher=str(tmp_path / "teacher"), weight=1.0, temperature=2.0)
    # The teacher has its own normalisation.
    config.mean, config.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    train(config, tmp_path / "student")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["group"] == "train"]
    assert rows[-1]["distillation_loss"] < 0.5 * rows[0]["distillation_loss"]
    assert all(row["loss"] == row["distillation_loss"] for row in rows)


def test_weights_of_both_losses_sum_to_one(make_tiny_config, random_run, tmp_path):
    config = make_tiny_config()
    config.weights = config.activations = None
    random_run(config, tmp_path)
    config = make_tiny_config()
    config.distillation.teacher = str(tmp_path)
    network, devices = load_teacher(config), Devices(1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    dataset = Dataset(images=images, labels=np.arange(64, dtype=np.int32) % 10, num_classes=10, name="noise")
    state = build.state(config, initial_variables(build.model(config), (32, 32, 3), 0))
    dispatch = devices.pmap(functools.partial(build.train_step(config, devices).many, steps=1, unroll=True))
    numbers = build.hyperparameters(config), build.penalties(config, 1)
    _, data = next(stream_of(dataset, 0, config.batch_size, devices).dispatches(0, 1, 1))
    rates, losses = RateWindow(np.ones(1, np.float32), np.int32(0)), {}
    for weight in (0.0, 0.25, 1.0):
        own = network.replace(weight=np.float32(weight))
        _, metrics = dispatch(state, data, rates, *numbers, own)
        losses[weight] = metrics["loss"]
    np.testing.assert_allclose(losses[0.25], 0.75 * losses[0.0] + 0.25 * losses[1.0], rtol=1e-5)
    assert losses[0.0] != losses[1.0] == metrics["distillation_loss"]


def test_a_teacher_that_is_none_is_refused(tiny_config, tmp_path):
    assert load_teacher(tiny_config) is None
    tiny_config.distillation.teacher = str(tmp_path)
    with pytest.raises(UserError, match="config.distillation.teacher='.*': not a workdir"):
        load_teacher(tiny_config)
    tiny_config.distillation.teacher = "resnet18-f37072fd.pth"
    with pytest.raises(UserError, match="weights without a configuration; make a workdir"):
        load_teacher(tiny_config)


def test_a_teacher_of_another_data_set_is_refused_though_its_images_are_alike(
    make_tiny_config, random_run, tmp_path
):
    config = make_tiny_config()
    random_run(config, tmp_path)
    config.dataset = "cifar10"
    config.distillation.teacher = str(tmp_path)
    with pytest.raises(UserError, match="trained on digits .* not on cifar10"):
        load_teacher(config)
