"""What is exported is proved by the verifier, and what was tampered with is not."""

import functools
import warnings

import numpy as np
import pytest
from networks import INTEGER, LAYERS, POLICIES, SHAPE, images

from qflax.deploy.export import export
from qflax.verify import load, run, verify

ONNX = ("qonnx", "qcdq")
FILES = [
    *(("packed", name) for name in POLICIES),
    *(("qonnx", name) for name in POLICIES),
    *(("qcdq", name) for name in (*INTEGER, "float")),
]


@pytest.mark.parametrize(("format", "name"), FILES)
def test_every_export_holds(tmp_path, trained, format, name):
    if format in ONNX:
        pytest.importorskip("onnx")
    function, variables = trained(name)
    export(function, variables, SHAPE, tmp_path / "file", format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of packages that qonnx imports.
        report = verify(tmp_path / "file")
    assert report.ok, report.failures
    if name in INTEGER:
        assert report.probe_difference == 0
        assert [layer.holds and layer.attained for layer in report.layers] == [True] * len(LAYERS)
    if name == "a2q+":
        assert [layer.promised for layer in report.layers] == [12] * len(LAYERS)


@pytest.mark.parametrize("format", ["packed", *ONNX])
def test_the_verifier_s_executor_gives_the_same_bits(tmp_path, trained, format):
    if format in ONNX:
        pytest.importorskip("onnx")
    function, variables = trained("zero points")
    export(function, variables, SHAPE, tmp_path / "file", format=format)
    expected = functools.partial(function, variables)(images(10))
    np.testing.assert_array_equal(run(load(tmp_path / "file"), images(10)), expected)
