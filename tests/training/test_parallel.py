"""Mapping over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training.parallel import AXIS, Devices


def test_every_device_sees_its_index_and_the_whole_state():
    devices = Devices(0)
    function = devices.pmap(lambda state, index, x: jax.lax.psum(state + index * x, AXIS))
    state = devices.replicate(np.float32(10))
    expected = 10 * len(devices) + 3 * sum(range(len(devices)))
    assert function(state, jnp.float32(3)) == expected


def test_results_are_replicated_and_go_in_again_without_a_copy():
    devices = Devices(0)
    function = devices.pmap(lambda state, index, _: jax.lax.pmean(state + index, AXIS))
    state = function(devices.replicate(np.zeros(3, np.float32)), None)
    assert state.sharding.is_fully_replicated and len(state.sharding.device_set) == len(devices)
    with jax.transfer_guard_device_to_device("disallow"):
        function(state, None)


@pytest.mark.parametrize("count", range(1, 5))
def test_data_is_split_where_it_shall_be(count):
    # Whatever the number of arrays, also where it is that of the arguments.
    devices = Devices(0)
    data = tuple(np.arange(len(devices) * 3, dtype=np.float32).reshape(len(devices), 3) for _ in range(count))
    replicated = devices.pmap(lambda _, index, x: jax.lax.psum(x[0][index, 1], AXIS))
    split = devices.pmap(lambda _, index, x: jax.lax.psum(x[0][1], AXIS), data_axes=0)
    assert replicated({}, data) == split({}, devices.split(data)) == data[0][:, 1].sum()
    mixed = devices.pmap(lambda _, index, x: jax.lax.psum(x[0][1] * x[1], AXIS), data_axes=(0, None))
    assert mixed({}, (data[0], np.float32(2))) == 2 * data[0][:, 1].sum()


def test_too_many_devices_and_odd_batches_are_refused():
    available = len(jax.devices())
    with pytest.raises(UserError, match=rf"num_devices={available + 1}.*there are {available}"):
        Devices(available + 1)
    if available > 1:
        with pytest.raises(UserError, match=r"config.batch_size=7: not divisible by 2 devices"):
            Devices(2, 7)
