"""Settings before JAX's first computation."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import jax
from qflax import runtime
runtime.configure({batch})
print(len(jax.devices()), os.environ.get("NPROC"), jax.config.jax_compilation_cache_dir)
"""


def call(batch, tmp_path, **environment):
    set_by_tests = ("XLA_FLAGS", "NPROC", "JAX_COMPILATION_CACHE_DIR")
    clean = {k: v for k, v in os.environ.items() if k not in set_by_tests}
    clean |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", SCRIPT.format(batch=batch)]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts cores by affinity")
def test_a_cpu_has_as_many_devices_as_cores_that_divide_the_batch(tmp_path):
    cores = len(os.sched_getaffinity(0))
    devices, threads, cache = call(2 * cores, tmp_path)
    assert int(devices) == cores and cache.startswith(str(tmp_path))
    if cores > 1:
        assert int(threads) == 2 * cores
    assert call(1, tmp_path)[:2] == ["1", "None"]


def test_settings_of_the_user_stay(tmp_path):
    flags = "--xla_force_host_platform_device_count=3"
    own = call(6, tmp_path, XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own[0] == "3" and int(own[1]) >= 6 and own[2] == str(tmp_path / "own")
