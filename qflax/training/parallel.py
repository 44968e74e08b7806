"""Data parallelism: the one module that knows how steps are mapped over devices."""

from collections.abc import Callable

import jax
import numpy as np

from qflax.errors import require
from qflax.training.processes import require_all_devices

AXIS = "batch"


class Devices:
    """The devices that share every batch, of all processes.

    State goes in and comes out replicated (`in_axes=None`, `out_axes=None`), as ordinary arrays that every
    device of this process holds whole. Each process hands in its own devices' parts of what is split.

    Attributes:
      devices: all, process by process.
      local: this process's.
    """

    def __init__(self, num_devices: int = 0, batch_size: int | None = None):
        """Takes the first `num_devices` devices, 0 for all.

        Args:
          num_devices: how many.
          batch_size: of training, which the devices must divide evenly; None does not matter.

        Raises:
          UserError: there are not so many devices, or a batch does not divide.
        """
        require_all_devices(num_devices)
        available = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        require(
            num_devices <= len(available),
            f"config.num_devices={num_devices}: there are {len(available)}; set at most that, or 0 for all",
        )
        self.devices = available[: num_devices or len(available)]
        require(
            batch_size is None or batch_size % len(self.devices) == 0,
            f"config.batch_size={batch_size}: not divisible by {len(self.devices)} devices; choose a "
            f"multiple of {len(self.devices)}, or set config.num_devices",
        )
        own = jax.process_index()
        self.local = [device for device in self.devices if device.process_index == own]
        self._places = [i for i, device in enumerate(self.devices) if device.process_index == own]
        mesh = jax.sharding.Mesh(np.array(self.local), (AXIS,))
        self._replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
        if jax.process_count() > 1:
            # They connect at the first collective, and wait for each other only 30 seconds then; later, when
            # one of them may compile for minutes, without a limit.
            jax.block_until_ready(self.pmap(lambda x, *_: jax.lax.psum(x, AXIS))(np.float32(1), None))

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.devices[0].platform

    def replicate(self, tree):
        """Puts a tree of host arrays on every device."""
        return jax.device_put(tree, self._replicated)

    def split(self, tree):
        """Puts host arrays [local devices, ...] on the devices of this process, one part on each."""
        return jax.device_put(tree, self._split)

    def pmap(self, function: Callable, donate: bool = False, data_axes=None) -> "Mapped":
        """Maps `function(state, index, data, *rest)` over the devices.

        `index` is the device's place among all, an int32 scalar; everything but `data` is replicated, and so
        must be what `function` returns (reduced over `AXIS`).

        Args:
          function: runs on each device; collectives go over `AXIS`.
          donate: whether the memory of `state` may be reused for the result.
          data_axes: axes of `data` over the devices, None where it is replicated, or a tree of such.

        Returns:
          A callable `(state, data, *rest) -> result`.
        """
        indices = self.split(np.array(self._places, np.int32))
        # A tuple in `in_axes`: JAX takes a flat one for the axes of leaves, where there are as many of them.
        mapped = jax.pmap(
            lambda state, index, rest: function(state, index, rest[0], *rest[1]),
            axis_name=AXIS,
            in_axes=(None, 0, (data_axes, None)),
            out_axes=None,
            devices=self.devices,
            donate_argnums=(0,) if donate else (),
        )
        return Mapped(mapped, indices)


class Mapped:
    """A function over the devices, `(state, data, *rest) -> result`; compiled when it is first called."""

    def __init__(self, mapped: Callable, indices: jax.Array):
        """See `Devices.pmap`."""
        self._call, self._indices = mapped, indices

    def __call__(self, state, data, *rest):
        """Calls it."""
        return self._call(state, self._indices, (data, rest))

    def compile(self, state, data, *rest) -> "Mapped":
        """The same for arguments of these shapes and dtypes, arrays or `jax.ShapeDtypeStruct`s, alone.

        Among several processes `pmap` only compiles for arrays: then it does so when it is called.
        """
        if jax.process_count() > 1:
            return self
        compiled = self._call.lower(state, self._indices, (data, rest)).compile()
        return Mapped(compiled, self._indices)

    def as_text(self) -> str:
        """The compiled program, of what `compile` has returned."""
        return self._call.as_text()
