"""What makes JAX fast on a CPU: settings that must be made before the process or JAX's backend starts.

| setting          | what it does                                       | where it is made                |
|------------------|----------------------------------------------------|---------------------------------|
| `GLIBC_TUNABLES` | the heap uses huge pages                           | `use_huge_pages`                |
| `XLA_FLAGS`      | convolutions by Eigen instead of YNNPACK           | `set_backend`                   |
| `NPROC`          | size of XLA's thread pool                          | `set_backend`                   |
| JAX's devices    | one for each core, that share a batch              | `set_backend`                   |

What the user has set is left alone, and so are other platforms. docs/performance.md says more.
"""

import importlib.util
import os
import pathlib
import re
import sys

SETTINGS = ("GLIBC_TUNABLES", "XLA_FLAGS", "NPROC")

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_PAGES_FILE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST_GLIBC = (2, 35)  # That knows the tunable.
# Only reductions are left to YNNPACK.
_LIBRARY = "--xla_cpu_experimental_ynn_fusion_type"
_REDUCTIONS = f"{_LIBRARY}=LIBRARY_FUSION_TYPE_REDUCE"
_VERSIONS = ((0, 9, 2), (0, 13))  # XLA ends the process at a flag that it does not know: from, and before.


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_platform() -> bool:
    """Whether JAX will compute on the CPU, told without starting it: it has no plugin for anything else."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def use_huge_pages() -> None:
    """Starts this process's program anew with a heap of huge pages, where that is possible and not yet so.

    The C library reads the setting only when a process starts; so programs call this before anything else,
    and nothing else does. XLA takes its buffers from the heap anew at every step: page by page, that costs
    the kernel a sixth of a training step's time.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not is_platform() or not _huge_pages_on_request():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}".lstrip(":")
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:
        os.environ["GLIBC_TUNABLES"] = tunables  # It goes on without.


def _huge_pages_on_request() -> bool:
    """Whether the kernel gives huge pages to those who ask, and the C library can ask."""
    try:
        _, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition("glibc ")
        known = tuple(map(int, version.split("."))) >= _FIRST_GLIBC
        return known and "[madvise]" in _PAGES_FILE.read_text()
    except (AttributeError, OSError, ValueError):  # No Linux, another C library, an old kernel.
        return False


def set_backend(batch_size: int = 1, num_devices: int = 0) -> None:
    """Makes the settings that JAX's CPU backend reads when it starts.

    Args:
      batch_size: that the devices share.
      num_devices: how many; 0 for one per core, as many as divide the batch.
    """
    import jax  # Not before the process has its last settings.

    cores, flags = available_cores(), os.environ.get("XLA_FLAGS", "")
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
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
    first, last = _VERSIONS
    if is_platform() and _LIBRARY not in flags and first <= jax.__version_info__ < last:
        os.environ["XLA_FLAGS"] = f"{flags} {_REDUCTIONS}".strip()


def settings() -> dict[str, str]:
    """Those of `SETTINGS` that are in force."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
