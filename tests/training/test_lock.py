"""One run at a time in a workdir."""

import json
import os
import signal
import subprocess
import sys

import pytest

from qflax.errors import UserError
from qflax.training.lock import locked

HOLD = """
import pathlib, sys
from qflax.training.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(workdir):
    """A process that has the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_refused_until_the_first_ends_however_that_ends(tmp_path):
    with holder(tmp_path / "run") as first:
        with (
            pytest.raises(UserError, match=rf"another run is writing here \(process {first.pid} on .* since"),
            locked(tmp_path / "run"),
        ):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["process"] == os.getpid()


def test_a_lock_that_was_damaged_still_refuses(tmp_path):
    with holder(tmp_path) as first:
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(UserError, match="another run is writing here"), locked(tmp_path):
            pass
        first.stdin.close()


def test_a_folder_into_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "b").exists()
    with locked(tmp_path / "b"):
        (tmp_path / "b" / "config.json").write_text("{}")
    assert (tmp_path / "b" / "config.json").exists()
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"):
        pass
    assert (tmp_path / "c").exists()  # It was there before.


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"), locked(tmp_path / "file"):
        pass
