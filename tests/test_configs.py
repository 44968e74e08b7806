"""Configurations take a training step on mock data, and no row of the documents is missing."""

import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.models import registry
from qflax.training import build
from qflax.training.parallel import Devices
from qflax.training.schedules import RateWindow
from qflax.training.stream import stream_of
from qflax.training.table import cost_totals

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("[a-z]*.py"))
A2Q = {
    f"resnet18_w4a4_{method}_{bits}b_cifar10": (variant, bits)
    for method, variant in (("a2q", "a2q"), ("a2q_plus", "a2q+"))
    for bits in (16, 15, 14, 13, 12)
}
ROWS = {
    *A2Q,
    *(f"resnet18_{row}_cifar10" for row in ("float", "fp32", "w8a8_e4m3", "w5a5_e3m1", "w4a4")),
    *(f"resnet20_{row}_cifar10" for row in ("fp32", "int8", "int4", "mixed", "w3a3", "w2a2")),
    *(f"resnet18_{row}" for row in ("fp32", "int8", "int4", "mixed", "w4a4")),
}


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


def combination(name):
    """What makes a training step another program, numbers apart."""
    config = config_of(name)
    weights, activations = config.weights or {}, config.activations or {}
    return config.model, weights.get("kind"), weights.get("variant"), activations.get("kind")


ONE_OF_EACH = sorted({combination(name): name for name in reversed(CONFIGS)}.values())


def filled(config):
    """Variables as after a calibration, without compiling the initialisation."""
    rng = np.random.default_rng(0)
    logs = {"log2_scale": -6.0, "log2_norm": 3.0}

    def fill(path, leaf):
        collection, name = path[0].key, path[-1].key
        if name == "kernel":
            return rng.normal(size=leaf.shape).astype(leaf.dtype) / np.sqrt(leaf.size / leaf.shape[-1])
        if name == "accumulator_bits":
            return np.full(leaf.shape, config.weights.accumulator_bits, leaf.dtype)
        if collection.startswith("quantizer"):
            return np.full(leaf.shape, logs.get(name, 0.1 if leaf.dtype == np.float32 else 0), leaf.dtype)
        return np.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, build.abstract_state(config).variables)


@pytest.fixture
def one_block_a_stage(monkeypatch):
    """Networks that are traced and compiled in half the time."""
    for name, full in registry._ARCHITECTURES.items():
        short = full._replace(stage_sizes=(1,) * len(full.stage_sizes))
        monkeypatch.setitem(registry._ARCHITECTURES, name, short)
    registry.build_model.cache_clear()
    yield
    registry.build_model.cache_clear()


@functools.cache
def costs_of(name):
    config = config_of(name)
    return build.measure_costs(config, filled(config))


def step_of(name):
    """The training step, mapped to one device, and its arguments."""
    config = config_of(name)
    config.batch_size, config.crop.image_size = 2, 64
    build.check_quantization(config)
    shape, devices, rng = build.image_format(config).image_shape, Devices(1), np.random.default_rng(0)
    images = rng.integers(0, 256, (4, *shape), dtype=np.uint8)
    dataset = Dataset(images=images, labels=np.arange(4, dtype=np.int32), num_classes=10, name="mock")
    stream, variables = stream_of(dataset, 0, 2, devices), filled(config)
    many = functools.partial(build.train_step(config, devices).many, steps=1, unroll=True)
    numbers = build.hyperparameters(config), build.penalties(config, 10)
    _, data = next(stream.dispatches(0, 1, 1))
    rates = RateWindow(np.ones(1, np.float32), np.int32(0))
    return devices.pmap(many), (build.state(config, variables), data, rates, *numbers)


# Those that differ in the width of accumulators alone are one program, see below.
@pytest.mark.parametrize("name", [name for name in CONFIGS if A2Q.get(name, ("", 12))[1] == 12])
def test_has_a_training_step(name, one_block_a_stage):
    step, (old, *arguments) = step_of(name)
    new, metrics = jax.eval_shape(step, old, *arguments)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), old, new)
    assert all(jax.tree.leaves(same)) and "loss" in metrics


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.thorough] * x.startswith("resnet18")) for x in ONE_OF_EACH]
)
def test_takes_a_training_step(name, one_block_a_stage):
    step, (old, *arguments) = step_of(name)
    state, metrics = jax.device_get(step(old, *arguments))
    assert np.isfinite(metrics["loss"]).all() and metrics["gradient_norm"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    kernels = [tree.trained["params"]["conv_init"]["kernel"] for tree in (old, state)]
    assert np.any(kernels[0] != kernels[1])


def test_every_row_of_the_documents_has_its_configuration():
    assert set(CONFIGS) >= ROWS
    assert len(A2Q) == 10 and len(ROWS) == 26


def test_rows_of_a_table_differ_in_what_they_are_named_after():
    first = config_of("resnet18_w4a4_a2q_16b_cifar10")
    for name, (variant, bits) in A2Q.items():
        config = config_of(name)
        assert (config.weights.variant, config.weights.accumulator_bits) == (variant, bits)
        config.weights.variant, config.weights.accumulator_bits = "a2q", 16
        assert config.to_dict() == first.to_dict()
    for bits, name in ((4, "int4"), (8, "int8")):
        config = config_of(f"resnet18_{name}")
        assert (config.weights.bits, config.activations.bits) == (bits, bits)


@pytest.mark.parametrize(
    ("name", "megabytes"), [("resnet18_fp32", 46.72), ("resnet18_int8", 11.68), ("resnet18_int4", 5.84)]
)
def test_imagenet_rows_have_the_published_sizes(name, megabytes):
    assert round(cost_totals(costs_of(name))["weight_bytes"] / 1e6, 2) == megabytes


def test_the_teacher_is_the_network_that_training_starts_from():
    config = config_of("resnet18_w4a4_a2q_plus_12b_cifar10")
    assert config.distillation.teacher == ""
    config.init_from = "runs/float"
    assert config.distillation.teacher == "runs/float"
    for other in ("", "runs/deeper"):
        config.distillation.teacher = other
        assert (config.distillation.teacher, config.init_from) == (other, "runs/float")
