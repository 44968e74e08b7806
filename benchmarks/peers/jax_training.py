"""The training of the contenders in JAX, whose networks are flax's or keras's."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.problem import Problem
from qflax.data.augment import Augmentation, augment, normalize

# State, normalised images [batch, 32, 32, 3] and labels [batch] to the state and the loss.
Update = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


def device_memory() -> int | None:
    """The most bytes that were in use on JAX's first device, where it has memory of its own."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Training:
    """A compiled step, its state and its data; a call makes one step, the first one compiles.

    Attributes:
      loss: of the last step that was waited for.
    """

    def __init__(self, problem: Problem, update: Update, state: Any):
        """Prepares everything; `state` is given away."""
        self._problem, self._state, self._step, self.loss = problem, state, 0, float("nan")
        self._data = jax.device_put((problem.images, problem.labels))
        self._compiled = jax.jit(self._make_step(update), donate_argnums=0)

    def _make_step(self, update: Update) -> Callable:
        problem, spec, key = self._problem, Augmentation(), jax.random.key(0)
        size = problem.batch_size

        def step(state, number, images, labels):
            start = problem.start(number)
            images, labels = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (images, labels))
            positions = number * size + jnp.arange(size)
            images, _ = augment(key, positions, images, labels, spec=spec, num_classes=problem.num_classes)
            return update(state, normalize(images, problem.mean, problem.std), labels)

        return step

    def __call__(self) -> None:
        """Makes one step on the next batch, without waiting for it."""
        self._state, self._loss = self._compiled(self._state, self._step, *self._data)
        self._step += 1

    def wait(self) -> None:
        """Waits for all steps."""
        jax.block_until_ready(self._state)
        self.loss = float(self._loss)

    def device_memory(self) -> int | None:
        """See `device_memory`."""
        return device_memory()


def set_threads(problem: Problem) -> None:
    """Of XLA on a CPU, which reads them once, before JAX's first computation."""
    os.environ.setdefault("NPROC", str(problem.threads))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
