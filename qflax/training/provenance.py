"""Where a result comes from: versions, commit, hardware, command."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax

from qflax import cpu

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
_NO_CODE = (":(top,exclude)results", ":(top,exclude)docs", ":(top,exclude)README.md")


def provenance(num_devices: int) -> dict[str, object]:
    """Flat description of the run's origin.

    Args:
      num_devices: that the run uses.
    """
    device = jax.devices()[0]
    return {
        "device": f"{num_devices} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "settings": _settings(device.platform),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": git_commit(),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _processor() -> str:
    """The processor's model where the system tells it, else the architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()


def _settings(platform: str) -> dict[str, str]:
    """What the environment tells XLA."""
    if platform == "cpu":
        return cpu.settings()
    return {name: os.environ[name] for name in ("XLA_FLAGS",) if os.environ.get(name)}


@functools.cache
def git_commit() -> str:
    """The checkout's commit, `+changes` if files differ from it, or `unknown` outside a checkout.

    As it was when the process first asked: later ones are of files that are not what it has loaded.
    Documents and results are no such files: with every row of a table that is made there are new ones.
    """
    folder = pathlib.Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ":/", *_NO_CODE)
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
