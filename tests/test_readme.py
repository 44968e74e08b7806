"""The README's Python examples run as they stand."""

import pathlib
import re

import pytest

from qflax import config as config_lib

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_example_runs(block):
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    if "config" in names:
        config_lib.validate(names["config"])
        from qflax.training import build

        build.check_rules(names["config"])
    if "logits" in names:
        assert names["logits"].shape == (8, 10)


def test_there_are_examples():
    assert len(BLOCKS) == 2
