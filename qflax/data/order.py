"""Deterministic order of the training stream: a fresh permutation of the examples every epoch.

The stream is the concatenation of the permutations of epochs 0, 1, 2, ...; an example's place in it
is its position, `epoch * num_examples + place within the epoch`. Positions are int32: a stream has
less than 2**31 of them, which for ImageNet's 1.28 million examples are 1,676 epochs.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="num_examples")
def epoch_order(seed: int | jax.Array, epoch: int | jax.Array, num_examples: int) -> jax.Array:
    """Returns the order of the examples in an epoch.

    Args:
        seed: int32, run-time value: another seed compiles nothing.
        epoch: int32, counted from 0, run-time value.
        num_examples: number of examples of the training set.

    Returns:
        int32 [num_examples], a permutation of 0..num_examples - 1.
    """
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return jax.random.permutation(key, num_examples).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="num_examples")
def window(seed: int | jax.Array, epoch: int | jax.Array, num_examples: int) -> jax.Array:
    """Returns the orders of `epoch` and the one after it, for steps that straddle their border.

    Args:
        seed: as of `epoch_order`.
        epoch: the first of the two epochs.
        num_examples: number of examples of the training set.

    Returns:
        int32 [2 * num_examples].
    """
    return jnp.concatenate(
        [epoch_order(seed, epoch, num_examples), epoch_order(seed, epoch + 1, num_examples)]
    )


def take(window: jax.Array, first_epoch: int | jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the examples at positions of the stream.

    Args:
        window: int32 [2 * num_examples], from the function `window`.
        first_epoch: the epoch that the window starts with.
        positions: int32 of any shape, positions in the stream that lie in the window. Others cannot
            be reported inside of jit: the nearest one in the window is taken.

    Returns:
        int32 of the shape of `positions`, indices of examples.
    """
    num_examples = window.shape[0] // 2
    return jnp.take(window, positions - first_epoch * num_examples, mode="clip")
