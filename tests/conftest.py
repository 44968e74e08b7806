"""Settings of JAX and hypothesis for all tests, and the reference vectors in `golden`."""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile

# Before JAX starts: the CPU shows two devices, and is the platform unless another one is asked for.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
)
os.environ.setdefault("NPROC", "4")  # See qflax.runtime: two devices deadlock on two threads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same programs. This folder is shared with other processes of this run alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/qflax-tests-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis
import jax
import numpy as np
import pytest
from jax._src import compiler

atexit.register(shutil.rmtree, f"{tempfile.gettempdir()}/qflax-tests-{os.getpid()}", ignore_errors=True)

GOLDEN = pathlib.Path(__file__).parent / "golden"
_OLDER_EMITTERS = {"xla_cpu_use_fusion_emitters": False}
_compile_options = compiler.get_compile_options

# Some accelerators round the operands of float32 products to fewer bits unless told otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "qflax", deadline=None, derandomize=True, max_examples=25, print_blob=False
)
hypothesis.settings.load_profile("qflax")


class Golden:
    """Arrays of one file whose names start with a case, or with nothing."""

    def __init__(self, arrays, prefix=""):
        self._arrays, self._prefix = arrays, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[self._prefix + name]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._arrays

    def case(self, name: str) -> "Golden":
        """The arrays `<name>.*`."""
        return Golden(self._arrays, f"{self._prefix}{name}.")


@pytest.fixture(scope="session")
def golden():
    """Function from a file's name to its reference vectors."""

    @functools.cache
    def load(name: str) -> Golden:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return Golden(dict(arrays))

    return load


@pytest.fixture(scope="module", autouse=True)
def _compilation(request):
    """Programs are compiled without optimizations, by XLA's older emitters: most run a few times here.

    Where a module is marked `exact` they are what users have. At its end all are forgotten: thousands of them
    would come to many gigabytes by the last test.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("exact"):
            jax.config.update("jax_disable_most_optimizations", True)
            if _has_older_emitters():
                patch.setattr(compiler, "get_compile_options", _with_older_emitters)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@functools.cache
def _has_older_emitters() -> bool:
    """Whether this XLA still has them: JAX 0.10 does, 0.12 does not."""
    try:
        jax.jit(jax.numpy.negative, compiler_options=_OLDER_EMITTERS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.wraps(_compile_options)
def _with_older_emitters(*args, **kwargs):
    options = _compile_options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *_OLDER_EMITTERS.items()]
    return options
