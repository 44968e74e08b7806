"""Settings before JAX's first computation."""

import os
import subprocess
import sys

import jax
import pytest

from qflax import runtime
from qflax.errors import UserError

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


@pytest.mark.parametrize(
    "several,environment",
    [
        (False, {}),
        (False, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}),  # Beside srun.
        (False, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}),
        (True, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}),
        (True, {"OMPI_COMM_WORLD_SIZE": "4"}),
        (False, {"OMPI_COMM_WORLD_SIZE": "one"}),
        (False, {"TPU_WORKER_HOSTNAMES": "localhost"}),
        (True, {"TPU_WORKER_HOSTNAMES": "a,b"}),
        (True, {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}),
        (True, {"MEGASCALE_NUM_SLICES": "2"}),
    ],
)
def test_other_processes_are_found_where_there_are_some(several, environment):
    assert runtime._others(environment) == several


@pytest.mark.parametrize("text,most", [("1(x4)", 1), ("2(x3),1", 2), ("1", 1), ("8", 8), ("1(x2),4", 4)])
def test_tasks_per_node(text, most):
    assert runtime._tasks_per_node({"SLURM_STEP_TASKS_PER_NODE": text}) == most


@pytest.mark.parametrize(
    "given,message",
    [
        (("a:1", None, None), "all three, or none"),
        ((None, 2, None), "all three, or none"),
        ((None, None, 0), "all three, or none"),
        (("a", 2, 0), "HOST:PORT"),
        ((":1", 2, 0), "HOST:PORT"),
        (("a:1", 0, 0), "--num_processes=0"),
        (("a:1", -2, 0), "--num_processes=-2"),
        (("a:1", 2, 2), "--process_id=2"),
        (("a:1", 2, -1), "--process_id=-1"),
    ],
)
def test_contradictory_processes_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        runtime.join_processes(*given)


def test_one_process_joins_none(monkeypatch):
    assert runtime.join_processes() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert runtime.join_processes(num_processes=1) == 1


def test_a_platform_that_jax_does_not_have_is_told_in_a_line(monkeypatch):
    def devices():
        raise AssertionError  # As for cuda where CUDA's plugin is not installed.

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        UserError, match=r"JAX_PLATFORMS=cuda: .*\(AssertionError\); install JAX for it"
    ) as error:
        runtime.configure()
    assert "\n" not in str(error.value)
