"""The Python examples of README and documentation run as they stand."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qflax
from qflax import config as config_lib
from qflax.deploy import export
from qflax.quantizers import Uniform, calibrate, spec
from qflax.training import build
from qflax.verify import verify

README = pathlib.Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
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


def test_the_quantizer_of_the_documentation_is_trained_and_exported(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "quantizers.md").read_text(), re.DOTALL)
    names = {"__name__": "ternary"}
    exec(compile(block, "quantizers.md", "exec"), names)
    monkeypatch.setitem(spec.KINDS, "ternary", names["Ternary"])
    monkeypatch.setitem(spec._MODULES, names["Ternary"], names["TernaryQuantizer"])
    roles = {**spec.ROLES, "weights": (*spec.ROLES["weights"], "ternary")}
    monkeypatch.setattr(spec, "ROLES", roles)
    model = qflax.quantize(
        nn.Dense(5), weights=dict(kind="ternary", fraction=0.6), activations=Uniform(bits=8, scale="static")
    )
    x = np.random.default_rng(0).normal(size=(32, 40)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    gradient = jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2), allow_int=True)(variables)
    assert np.abs(gradient["params"]["kernel"]).max() > 0
    result = export(model.apply, variables, (40,), tmp_path / "file", format="packed", low=-2.0, high=2.0)
    assert result.exact and result.difference == 0
    report = verify(tmp_path / "file")
    assert report.ok and report.layers[0].weight_bits == 2
