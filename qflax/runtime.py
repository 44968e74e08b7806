"""Settings of JAX that must be in place before its first computation."""

import os
import pathlib
import re

import jax


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def configure(batch_size: int = 1, num_devices: int = 0) -> None:
    """Prepares JAX for a program of qflax; settings of the user's own are left alone.

    - On a CPU, one virtual device per core, as many as divide the batch. Other platforms are not touched
      by it: it only says how many devices the CPU has.
    - Compiled programs are kept in the user's cache folder, so that the next start compiles nothing.

    Args:
      batch_size: of all devices together.
      num_devices: how many devices a CPU should be; 0 leaves it to the rule above.
    """
    cores = available_cores()
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices = int(forced[1]) if forced else jax.config.jax_num_cpu_devices
    if devices == -1:
        devices = num_devices or max(n for n in range(1, cores + 1) if batch_size % n == 0)
        jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # XLA's CPU client reads the size of its thread pool from NPROC. An all-reduce blocks a thread of
        # the pool until the other devices arrive; where each device has one thread, and that one holds
        # back work queued behind it, they wait for each other forever.
        # Twice as many cost about a tenth of the speed.
        os.environ.setdefault("NPROC", str(2 * max(cores, devices)))
    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "qflax" / "xla"))
