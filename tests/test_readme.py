"""The README's Python examples run as they stand."""

import pathlib
import re

import pytest

from qflax import config as config_lib
from qflax.training import build

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("last", range(len(BLOCKS)), ids=lambda last: BLOCKS[last].splitlines()[0])
def test_example_runs(last, tmp_path, monkeypatch):
    """After those above it, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in BLOCKS[: last + 1]:
        exec(compile(block, "README.md", "exec"), names)
    if "config" in block:
        config_lib.validate(names["config"])
        build.check_quantization(names["config"])
    if "logits" in names:
        assert names["logits"].shape == (8, 10)


def test_there_are_examples():
    assert len(BLOCKS) == 7
