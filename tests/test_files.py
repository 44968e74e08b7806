"""Files that are there whole or not at all."""

import resource

import pytest

from qflax.errors import UserError
from qflax.files import require_makeable, write_atomically


def test_text_and_bytes(tmp_path):
    write_atomically(tmp_path / "a", "grün\n")
    assert (tmp_path / "a").read_bytes() == "grün\n".encode()
    write_atomically(tmp_path / "a", b"\0\xff")
    assert (tmp_path / "a").read_bytes() == b"\0\xff"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_there_stays_where_there_is_no_room(tmp_path):
    write_atomically(tmp_path / "a", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: .*/a"):
            write_atomically(tmp_path / "a", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_below_a_file_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    require_makeable(tmp_path)
    require_makeable(tmp_path / "new" / "run")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="is no folder"):
            require_makeable(folder)
