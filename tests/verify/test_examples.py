"""What is executed together does not change what a network gives for an example."""

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.verify import load, run, verify

UINT4 = {"kind": "integer", "bits": 4, "signed": False, "narrow": False}


# For each a network that does something across the examples of x [batch, 4].
MIXING = {
    "sum": lambda file, x, kernel: file.node("sum", [x], axes=[0]),
    "max": lambda file, x, kernel: file.node("max", [x], axes=[0, 1]),
    "slice": lambda file, x, kernel: file.node("slice", [x], start=[0, 0], stop=[1, None], step=[1, 1]),
    "pad": lambda file, x, kernel: file.node("pad", [x], padding=[[1, 0], [0, 0]]),
    "transpose": lambda file, x, kernel: file.node("transpose", [x], permutation=[1, 0]),
    "concatenate": lambda file, x, kernel: file.node("concatenate", [x, x], axis=0),
    "reshape": lambda file, x, kernel: file.node("reshape", [x], shape=[-1, 2]),
    "reshape to one": lambda file, x, kernel: file.node("reshape", [x], shape=[1, 4]),
    "broadcast": lambda file, x, kernel: file.node("add", [x, file.node("reshape", [x], shape=[-1, 1, 4])]),
    "dense": lambda file, x, kernel: file.node(
        "dense", [kernel, file.node("transpose", [x], permutation=[1, 0])]
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_packed_networks_that_mix_examples_are_refused(packed, tmp_path, name):
    file = packed((4,))
    kernel, one = file.integers(np.full((4, 4), 7), 4), file.floats(1.0)
    x = file.node("quantize", [0, one, one], format=UINT4, rounding="half_even")
    MIXING[name](file, x, kernel)
    with pytest.raises(UserError, match="does not keep the examples of a batch apart|of 1 example"):
        load(file.save(tmp_path / "n", np.zeros((1, 4))))


NODES = {
    "largest of all": [("ReduceMax", ["x"], dict(keepdims=0)), ("Div", ["x", "ReduceMax"], {})],
    "mean of all": [("ReduceMean", ["x"], dict(keepdims=0)), ("Sub", ["x", "ReduceMean"], {})],
    "largest of each, along the other axis": [
        ("ReduceMax", ["x", "one"], dict(keepdims=0)),
        ("Sub", ["x", "ReduceMax"], {}),
    ],
    "beside constants": [
        ("Concat", ["x", "row"], dict(axis=1)),
        ("Slice", ["Concat", "one", "five", "one"], {}),
    ],
    "other way about": [
        ("Transpose", ["x"], {}),
        ("MatMul", ["square", "Transpose"], {}),
        ("Transpose", ["MatMul"], {}),
    ],
}


@pytest.mark.parametrize(
    ("name", "batch"),
    [(name, batch) for name in NODES for batch in (1, 2) if batch == 1 or "of each" not in name],
)
def test_onnx_networks_are_executed_as_they_are_declared(tmp_path, name, batch):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx_models import model

    rng = np.random.default_rng(0)
    constants = {
        **dict(one=np.int64([1]), five=np.int64([5]), row=rng.normal(size=(batch, 4)).astype(np.float32)),
        "square": rng.normal(size=(4, 4)).astype(np.float32),
    }
    nodes, made = [], set()
    for kind, inputs, attributes in NODES[name]:
        output = "y" if len(nodes) == len(NODES[name]) - 1 else kind
        made.add(output)
        nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))
    used = {name for node in nodes for name in node.input}
    path = tmp_path / "n.onnx"
    kept = {key: value for key, value in constants.items() if key in used}
    model(path, nodes, kept, (4,), (4,), batch=batch)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path))
    expected = [session.run(None, {"x": x[i : i + batch]})[0] for i in range(0, len(x), batch)]
    network = load(path)
    assert not network.apart and network.examples == batch
    np.testing.assert_allclose(run(network, x), np.concatenate(expected), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(network, x[:5])[:4], np.concatenate(expected)[:4], rtol=1e-6, atol=1e-6)
    assert verify(path).ok
