"""The README's Python examples run as they stand."""

import pathlib
import re

import pytest

from qflax import config as config_lib
from qflax.training import build

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the examples define, one after the other, as a reader would run them."""
    return {"__name__": "readme"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_example_runs(block, names):
    exec(compile(block, "README.md", "exec"), names)
    if "config" in block:
        config_lib.validate(names["config"])
        build.check_quantization(names["config"])
    if "logits" in names:
        assert names["logits"].shape == (8, 10)


def test_there_are_examples():
    assert len(BLOCKS) == 5
