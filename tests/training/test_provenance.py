"""Which commit a result is of."""

import shutil
import subprocess

import pytest

from qflax.training import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_changed_code_is_told_and_new_results_are_none(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("qflax/code.py", "results/a.json", "docs/b.md", "README.md")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "qflax" / "provenance.py"))
    asked_anew = provenance.git_commit.__wrapped__
    commit = asked_anew()
    assert len(commit) == 40
    for file in files[1:]:
        file.write_text("2")
    assert asked_anew() == commit
    files[0].write_text("2")
    assert asked_anew() == commit + "+changes"


def test_a_process_has_the_commit_that_it_began_with(monkeypatch):
    commit = provenance.git_commit()
    monkeypatch.setattr(provenance, "__file__", "/elsewhere/code.py")
    assert provenance.git_commit() == commit != provenance.git_commit.__wrapped__() == "unknown"
