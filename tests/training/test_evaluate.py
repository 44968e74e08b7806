"""Evaluation counts every example once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.training.evaluate import Evaluator
from qflax.training.parallel import Devices


class FirstPixels(nn.Module):
    """Logits are the first seven red pixels."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return images[:, 0, :7, 0]


def make_dataset(count):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 1, 7, 3), dtype=np.uint8)
    labels = rng.integers(0, 7, count).astype(np.int32)
    return Dataset(images=images, labels=labels, num_classes=7, name="pixels")


@pytest.mark.parametrize("count,batch_size", [(10, 4), (10, 10), (10, 64), (101, 8)])
@pytest.mark.parametrize("num_devices", range(1, len(jax.devices()) + 1))
def test_metrics_are_means_over_all_examples(count, batch_size, num_devices):
    dataset = make_dataset(count)
    evaluator = Evaluator(
        FirstPixels(),
        dataset,
        Devices(num_devices),
        batch_size=batch_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    result = evaluator({})
    logits = (dataset.images[:, 0, :, 0] / 255 - 0.5) / 0.25
    order = np.argsort(-logits, axis=1, kind="stable")
    ranks = np.argmax(order == dataset.labels[:, None], axis=1)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert result["accuracy"] == pytest.approx(np.mean(ranks < 1), abs=1e-6)
    assert result["top5_accuracy"] == pytest.approx(np.mean(ranks < 5), abs=1e-6)
    loss = -np.log(probability[np.arange(count), dataset.labels]).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_nan_logits_are_wrong():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return jnp.full((len(images), 7), jnp.nan)

    evaluator = Evaluator(
        Broken(), make_dataset(8), Devices(1), batch_size=8, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    assert evaluator({})["accuracy"] == 0


def test_evaluation_is_in_full_float32_whatever_training_is_in():
    precisions = []

    class Looking(FirstPixels):
        @nn.compact
        def __call__(self, images, *, train):
            precisions.append(jax.config.jax_default_matmul_precision)
            return images[:, 0, :7, 0]

    ones = (1.0, 1.0, 1.0)
    with jax.default_matmul_precision("bfloat16"):
        Evaluator(Looking(), make_dataset(8), Devices(1), batch_size=8, mean=ones, std=ones)({})
    assert precisions and {*precisions} == {"highest"}
