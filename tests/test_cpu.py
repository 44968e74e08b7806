"""Settings of the CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

from qflax import cpu

TUNABLES = """
import os, sys
from qflax import cpu
assert "jax" not in sys.modules
cpu.use_huge_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""
FLAGS = """
import os, sys
from qflax import cpu
cpu.set_backend(4)
import jax, jax.numpy as jnp
jnp.ones(3).sum().block_until_ready()
print(os.environ.get("XLA_FLAGS"), cpu.settings())
"""
needs_huge_pages = pytest.mark.skipif(not cpu._huge_pages_on_request(), reason="needs madvise and glibc")


def run(script, *arguments, **environment):
    """The process id and what the script prints, without settings but those given."""
    clean = {k: v for k, v in os.environ.items() if k not in (*cpu.SETTINGS, "JAX_PLATFORMS")}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, env=clean | environment, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, printed.strip()


@needs_huge_pages
def test_a_program_starts_itself_anew_with_huge_pages():
    pid, printed = run(TUNABLES, "--a", "b c", JAX_PLATFORMS="cpu")
    assert printed == f"{pid} ['--a', 'b c'] glibc.malloc.hugetlb=1"
    pid, printed = run(TUNABLES, JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.arena_max=4")
    assert printed == f"{pid} [] glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"


@needs_huge_pages
@pytest.mark.parametrize(
    "environment",
    [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}],
)
def test_other_platforms_and_what_the_user_has_set_stay(environment):
    pid, printed = run(TUNABLES, **environment)
    assert printed == f"{pid} [] {environment.get('GLIBC_TUNABLES')}"


def test_flags_are_added_to_the_users():
    _, printed = run(FLAGS, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert printed.startswith(f"--xla_cpu_enable_fast_math=false {cpu._REDUCTIONS} ")
    assert "'XLA_FLAGS': '--xla_cpu_enable_fast_math=false --" in printed
    own = f"{cpu._LIBRARY}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    assert run(FLAGS, JAX_PLATFORMS="cpu", XLA_FLAGS=own)[1].startswith(f"{own} ")


def test_a_version_that_was_not_tried_gets_no_flag():
    untried = "import jax; jax.__version_info__ = (99, 0, 0)\n"
    own = "--xla_cpu_enable_fast_math=false"
    assert run(untried + FLAGS, JAX_PLATFORMS="cpu", XLA_FLAGS=own)[1].startswith(f"{own} {{")


@pytest.mark.parametrize("installed", ["jax_plugins", "libtpu", None])
def test_a_plugin_means_another_platform(monkeypatch, installed):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == installed else None)
    assert cpu.is_platform() == (installed is None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cpu.is_platform()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert not cpu.is_platform()
