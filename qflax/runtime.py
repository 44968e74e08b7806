"""Settings of JAX that must be in place before its first computation."""

import os
import pathlib

import jax


def configure(batch_size: int | None = None) -> None:
    """Prepares JAX for a program of qflax; settings of the user's own are left alone.

    - On a CPU, one virtual device per core, as many as divide the batch. Other platforms are not touched
      by it: it only says how many devices the CPU has.
    - Compiled programs are kept in the user's cache folder, so that the next start compiles nothing.

    Args:
      batch_size: of all devices together; None makes one CPU device.
    """
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not forced and jax.config.jax_num_cpu_devices == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        batch = batch_size or 1
        devices = max(n for n in range(1, cores + 1) if batch % n == 0)
        jax.config.update("jax_num_cpu_devices", devices)
        if devices > 1:
            # XLA's CPU client reads the size of its thread pool from NPROC. An all-reduce blocks a thread
            # of the pool until the other devices arrive; with one thread per device, one that holds back
            # work queued behind it, they wait for each other forever. Twice as many cost 4 % of speed.
            os.environ.setdefault("NPROC", str(2 * max(cores, devices)))
    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "qflax" / "xla"))
