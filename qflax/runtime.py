"""Settings of JAX that must be in place before its first computation."""

import os
import pathlib
import re
import sys
from collections.abc import Mapping

import jax

from qflax import cpu
from qflax.errors import UserError, one_line, require

HEARTBEAT_SECONDS = 30  # After so long without a sign of life a process counts as dead.


def join_processes(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> int:
    """Joins the processes that train one network, each with devices of its own; before anything else of JAX.

    Without arguments, what SLURM, Open MPI or a TPU slice tell of them; where these tell of no others, the
    process stays alone.

    Args:
      coordinator_address: host and port of the first process.
      num_processes: how many there are; 1 joins none, whatever the environment tells.
      process_id: of this one, from 0.

    Returns:
      The number of processes.

    Raises:
      UserError: contradictory arguments, or the others cannot be reached.
    """
    given = (coordinator_address, num_processes, process_id)
    if num_processes == 1 or (given == (None, None, None) and not _others(os.environ)):
        return 1
    require(
        jax.__version_info__ >= (0, 10),
        f"several processes need JAX 0.10, this is {jax.__version__}; upgrade it, or train alone with "
        "--num_processes=1",
    )
    fields = {}
    if given != (None, None, None):
        require(
            None not in given,
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I: give all three, or none",
        )
        require(
            re.fullmatch(r".+:\d{1,5}", coordinator_address) is not None,
            f"--coordinator_address={coordinator_address!r}: must be the first process's HOST:PORT",
        )
        require(num_processes > 0, f"--num_processes={num_processes}: must be at least 1")
        require(
            0 <= process_id < num_processes,
            f"--process_id={process_id}: must be from 0 to {num_processes - 1} (--num_processes - 1)",
        )
        # Else JAX would take devices away by what SLURM tells of the task.
        names = ("coordinator_address", "num_processes", "process_id")
        fields = dict(zip(names, given, strict=True), cluster_detection_method="deactivate")
    elif "SLURM_STEP_TASKS_PER_NODE" in os.environ and _tasks_per_node(os.environ) == 1:
        fields["local_device_ids"] = []  # All that the task sees, not only the one of its place on the node.
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **fields)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"the other processes cannot be joined ({one_line(error)}); check --coordinator_address, "
            "firewalls, and that all were started; --num_processes=1 trains without them"
        ) from None
    return _service().num_processes


def leave_processes(code: int) -> None:
    """Ends the process with an exit code, if it has joined others: JAX would wait for them to end, too."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def coordinator_host() -> str | None:
    """Where the first process is; None where JAX does not tell."""
    address = getattr(_service(), "coordinator_address", None)
    return address.rpartition(":")[0].strip("[]") if address else None


def _service():
    from jax._src import distributed  # Nothing public tells the address, or the number without a backend.

    return distributed.global_state


def _others(environment: Mapping[str, str]) -> bool:
    """Whether the environment tells of other processes of this run."""

    def number(name):
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 1

    # Of the step, not of the allocation, in which an interactive process is alone.
    slurm = "SLURM_PROCID" in environment and number("SLURM_STEP_NUM_TASKS") > 1
    addresses = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    tpu_machine = "tpu" in (jax.config.jax_platforms or "") and environment.get("JAX_PLATFORMS") != "cpu"
    return (
        slurm
        or number("OMPI_COMM_WORLD_SIZE") > 1
        or number("MEGASCALE_NUM_SLICES") > 1
        or "," in addresses
        or tpu_machine  # It may be one of a slice, which only its cloud's metadata tell.
    )


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    """The largest number in SLURM's "2(x3),1"."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", environment["SLURM_STEP_TASKS_PER_NODE"])
    return max((int(count) for count in counts), default=1)


def configure(batch_size: int = 1, num_devices: int = 0, num_processes: int = 1) -> None:
    """Prepares JAX for a program of qflax; settings of the user's own are left alone.

    - On a CPU, one virtual device per core, as many as divide the batch, and what else `cpu.set_backend`
      does.
    - Compiled programs are kept in the user's cache folder, so that the next start compiles nothing.
    - JAX's backend starts.

    Args:
      batch_size: of all devices together.
      num_devices: how many devices the CPUs of all processes should be; 0 leaves it to the rule above.
      num_processes: that share the batch.

    Raises:
      UserError: JAX cannot compute where JAX_PLATFORMS says.
    """
    cpu.set_backend(max(batch_size // num_processes, 1), num_devices // num_processes)
    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "qflax" / "xla"))
        # JAX leaves out what compiles within a second; a start has dozens of those, two seconds in all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX cannot compute there "
            f"({one_line(error, 300) or type(error).__name__}); install JAX for it, such as with "
            "pip install -U 'jax[cuda13]', or set it to cpu"
        ) from None
