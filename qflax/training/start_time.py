"""How long a run takes to its first step, and where the time goes."""

import os
import pathlib
import time


class StartTime:
    """Seconds of the phases from the start of the process on."""

    def __init__(self):
        """What was before now is the first phase: the interpreter and the imports."""
        self._seconds, self._total = {}, 0.0
        self.end("imports")

    def end(self, phase: str) -> None:
        """Notes that `phase` ends now; the next one begins."""
        before, self._total = self._total, _process_seconds()
        self._seconds[phase] = self._total - before

    def __str__(self) -> str:
        """One line."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._seconds.items())
        return f"first step {self._total:.1f} s after the start of the program ({phases})"


def _process_seconds() -> float:
    """Age of this process, or where the system does not tell, the time since this module was imported."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()
