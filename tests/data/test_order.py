"""Tests of the order of the training stream."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qflax.data import order

N = 37
SEEDS = st.integers(0, 2**31 - 1)
EPOCHS = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPOCHS)
def test_each_epoch_visits_every_example_once(seed, epoch):
    got = order.epoch_order(seed, epoch, N)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(got), np.arange(N))


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPOCHS)
def test_same_arguments_same_order_others_another(seed, epoch):
    got = order.epoch_order(seed, epoch, N)
    np.testing.assert_array_equal(got, order.epoch_order(jnp.int32(seed), jnp.int32(epoch), N))
    assert (got != order.epoch_order(seed, epoch + 1, N)).any()
    assert (got != order.epoch_order(seed ^ 1, epoch, N)).any()


def test_seed_and_epoch_compile_once():
    order.epoch_order.clear_cache()
    for seed, epoch in ((0, 0), (1, 5), (7, 2)):
        order.epoch_order(seed, epoch, N)
    assert order.epoch_order._cache_size() == 1


@settings(max_examples=25, deadline=None)
@given(SEEDS, EPOCHS, st.integers(0, N), st.integers(1, N))
def test_take_reads_the_stream_across_the_border(seed, epoch, start, length):
    positions = epoch * N + start + np.arange(length)
    got = order.take(order.window(seed, epoch, N), epoch, jnp.asarray(positions, jnp.int32))
    expected = [order.epoch_order(seed, p // N, N)[p % N] for p in positions.tolist()]
    np.testing.assert_array_equal(got, expected)


def test_take_keeps_the_shape_and_works_up_to_the_end_of_int32():
    epoch = (2**31 - 1) // N - 2
    positions = jnp.asarray(epoch * N + np.arange(2 * N).reshape(2, N), jnp.int32)
    window = order.window(3, epoch, N)
    got = jax.jit(order.take)(window, jnp.int32(epoch), positions)
    np.testing.assert_array_equal(got, window.reshape(2, N))
