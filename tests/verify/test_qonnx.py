"""ONNX files of other tools and of qflax are executed and proven like packed ones."""

import pathlib
import sys

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.verify import load, qonnx, run, table, verify
from qflax.verify.ranges import Analysis

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import model  # noqa: E402

HERE = pathlib.Path(__file__).parent
QONNX = "qonnx.custom_op.general"
NETWORKS = {
    "cnn_int": ("cnn_int", "logits"),
    "cnn_int_trunc": ("cnn_int", "trunc.logits"),
    "cnn_e4m3": ("cnn_e4m3", "logits"),
    "cnn_e3m1": ("cnn_e3m1", "logits"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_brevitas(golden, name):
    file, logits = NETWORKS[name]
    vectors = golden(file)
    y = run(load(HERE / f"{name}.onnx"), vectors["images"])
    np.testing.assert_allclose(y, vectors[logits], rtol=0, atol=2e-5)


def values_after(network, x, layers):
    """Outputs, NHWC, of the last node of every layer."""
    last = {node.layer: node.output for node in network.nodes}
    seen = {}
    run(network, x, lambda number, array: seen.__setitem__(number, array))
    values = {name: seen[last[layer]] for name, layer in layers.items()}
    return {name: v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for name, v in values.items()}


def test_all_codes_are_those_of_brevitas(golden):
    vectors = golden("cnn_int")
    layers = {
        "stem": "/relu/act_quant/export_handler/Quant",
        "block1.act1": "/block1/relu1/act_quant/export_handler/Quant",
        "block1.branch": "/block1/relu/act_quant/export_handler/Quant",
        "block1.out": "/block1/relu_out/act_quant/export_handler/Quant",
        "block2.act1": "/block2/relu1/act_quant/export_handler/Quant",
        "block2.branch": "/block2/downsample.2/act_quant/export_handler/Quant",
        "block2.shortcut": "/block2/downsample/downsample.2/act_quant/export_handler/Quant",
        "block2.out": "/block2/relu_out/act_quant/export_handler/Quant",
        "pool": "/pool/trunc_quant/export_handler/Trunc",
    }
    scales = {
        "stem": "act_stem",
        "block1.branch": "act_stem",
        "block1.out": "block1.act_out",
        "block2.out": "block2.act_out",
        "block2.branch": "block2.act_shortcut",
        "block2.shortcut": "block2.act_shortcut",
    }
    values = values_after(load(HERE / "cnn_int_trunc.onnx"), vectors["images"], layers)
    for name, value in values.items():
        pool = name == "pool"
        scale = vectors["trunc.pool_scale" if pool else f"{scales.get(name, name)}.scale"]
        codes = np.rint(value / scale).reshape(64, -1)
        expected = vectors["trunc.pool_codes" if pool else f"codes.{name}"].reshape(64, -1)
        np.testing.assert_array_equal(codes, expected, err_msg=name)


@pytest.mark.parametrize("name", ["cnn_e4m3", "cnn_e3m1"])
def test_all_minifloats_are_those_of_brevitas(golden, name):
    vectors = golden(name)
    layers = {
        "input": "/conv1/input_quant/export_handler/FloatQuant",
        "conv1_out": "/conv1/output_quant/export_handler/FloatQuant",
        "block1.conv2_out": "/block1/conv2/output_quant/export_handler/FloatQuant",
        "block1.out": "/block1/relu_out/act_quant/export_handler/FloatQuant",
        "block2.out": "/block2/relu_out/act_quant/export_handler/FloatQuant",
        "linear_input": "/linear/input_quant/export_handler/FloatQuant",
    }
    values = values_after(load(HERE / f"{name}.onnx"), vectors["images"][:16], layers)
    for layer, value in values.items():
        np.testing.assert_array_equal(value, vectors[f"q.{layer}"], err_msg=layer)


def test_accumulators_of_a_network_of_brevitas(golden):
    vectors = golden("cnn_int")
    images = vectors["images_uint8"].astype(np.uint8)
    report = verify(HERE / "cnn_int_trunc.onnx", images, vectors["trunc.logits"].argmax(-1))
    assert report.ok and report.accuracy == 1 and report.probe_difference is None
    kernels = {
        "/block1/conv1/Conv": "block1.conv1",
        "/block2/conv2/Conv": "block2.conv2",
        "/block2/downsample/downsample.0/Conv": "block2.shortcut_conv",
    }
    layers = {row.layer: row for row in report.layers}
    for name, kernel in kernels.items():
        codes = vectors[f"{kernel}.kernel_codes"].astype(np.int64)
        flat = codes.reshape(-1, codes.shape[-1])
        extremes = (15 * np.minimum(flat, 0).sum(0)).min(), (15 * np.maximum(flat, 0).sum(0)).max()
        assert layers[name].extremes == extremes and layers[name].inputs == (0, 15)
        assert extremes[0] <= layers[name].seen[0] < layers[name].seen[1] <= extremes[1]
    codes, bias = vectors["linear.kernel_codes"].astype(np.int64), vectors["trunc.bias_codes"]
    low = 63 * np.minimum(codes, 0).sum(0) + np.minimum(bias, 0)
    high = 63 * np.maximum(codes, 0).sum(0) + np.maximum(bias, 0)
    assert layers["/linear/Gemm"].extremes == (low.min(), high.max())
    assert layers["/conv1/Conv"].needed is None
    assert "6 of 6 layers of integers proven; 1 other layers" in table(report)


F = np.float32
RNG = np.random.default_rng(0)
WEIGHTS, CHANNEL = RNG.normal(size=(6, 2, 3, 3)).astype(F), RNG.uniform(0.5, 2, 4).astype(F)
# Operation, constants, attributes, for an input of [1, 4, 5, 6].
CASES = {
    "Conv": ("Conv", [WEIGHTS, F([1, 2, 3, 4, 5, 6])], dict(group=2, pads=[1, 0, 0, 2], strides=[2, 1])),
    "Conv same": ("Conv", [WEIGHTS], dict(group=2, auto_pad="SAME_UPPER", strides=[2, 2])),
    "Conv lower": ("Conv", [WEIGHTS], dict(group=2, auto_pad="SAME_LOWER", strides=[1, 2])),
    "Conv dilated": ("Conv", [WEIGHTS], dict(group=2, dilations=[2, 1], pads=[2, 1, 0, 1])),
    "MatMul": ("MatMul", [RNG.normal(size=(6, 3)).astype(F)], {}),
    "Add": ("Add", [CHANNEL[:, None, None]], {}),
    "Sub": ("Sub", [F(2)], {}),
    "Mul": ("Mul", [F(2.5)], {}),
    "Div": ("Div", [F(0.3)], {}),
    "Max": ("Max", [F(0.3), F(0.4)], {}),
    "Min": ("Min", [F(0.3)], {}),
    "Pow": ("Pow", [F(3)], {}),
    "Clip": ("Clip", [F(-0.2), F(0.6)], {}),
    **{name: (name, [], {}) for name in ("Relu", "Sigmoid", "Tanh", "Exp", "Neg", "Abs", "Floor", "Ceil")},
    **{name: (name, [], {}) for name in ("Round", "Erf", "Identity", "Sign", "Sin", "Cos")},
    "LeakyRelu": ("LeakyRelu", [], dict(alpha=0.2)),
    "PRelu": ("PRelu", [CHANNEL[:, None, None]], {}),
    "Elu": ("Elu", [], dict(alpha=1.5)),
    "MaxPool": ("MaxPool", [], dict(kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1])),
    "AveragePool": ("AveragePool", [], dict(kernel_shape=[3, 2], strides=[1, 2], pads=[1, 0, 1, 1])),
    "AveragePool pad": (
        "AveragePool",
        [],
        dict(kernel_shape=[3, 2], strides=[1, 2], pads=[1, 0, 1, 1], count_include_pad=1),
    ),
    "GlobalAveragePool": ("GlobalAveragePool", [], {}),
    "ReduceSum": ("ReduceSum", [np.array([2, -1])], dict(keepdims=0)),
    "ReduceMean": ("ReduceMean", [np.array([1])], {}),
    "ReduceMax": ("ReduceMax", [np.array([3])], {}),
    "BatchNormalization": (
        "BatchNormalization",
        [CHANNEL, CHANNEL[::-1].copy(), CHANNEL - 1, CHANNEL**2],
        dict(epsilon=1e-3),
    ),
    "Reshape": ("Reshape", [np.array([0, 2, -1])], {}),
    "Flatten": ("Flatten", [], {}),
    "Transpose": ("Transpose", [], dict(perm=[0, 2, 3, 1])),
    "Pad": ("Pad", [np.array([0, 0, 1, 0, 0, 0, 2, 3])], {}),
    "Slice": ("Slice", [np.array([1, 4]), np.array([9, -6]), np.array([1, 3]), np.array([2, -1])], {}),
    "Unsqueeze": ("Unsqueeze", [np.array([2])], {}),
    "Concat": ("Concat", [RNG.normal(size=(1, 1, 5, 6)).astype(F)], dict(axis=1)),
    "Cast": ("Cast", [], dict(to=TensorProto.FLOAT)),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_onnxruntime(tmp_path, case):
    runtime = pytest.importorskip("onnxruntime")
    operation, constants, attributes = CASES[case]
    constants = {f"c{i}": value for i, value in enumerate(constants)}
    node = helper.make_node(operation, ["x", *constants], ["y"], **attributes)
    path = model(tmp_path / "n.onnx", [node], constants, (4, 5, 6), (None,) * 3)
    made = onnx.load(path)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(made, path)
    x = np.random.default_rng(1).normal(size=(1, 5, 6, 4)).astype(F)
    (expected,) = runtime.InferenceSession(path).run(None, {"x": x.transpose(0, 3, 1, 2)})
    y = run(load(path), x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("comparison", ["Greater", "GreaterOrEqual"])
def test_choices_are_those_of_onnxruntime(tmp_path, comparison):
    runtime = pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node("Round", ["x"], ["r"]),  # Some are equal.
        helper.make_node(comparison, ["r", "one" if comparison == "Greater" else "zero"], ["g"]),
        helper.make_node("Where", ["g", "x", "c"], ["y"]),
    ]
    constants = dict(one=F(1), zero=F(0), c=CHANNEL[:, None, None])
    path = model(tmp_path / "n.onnx", nodes, constants, (4, 5, 6), (4, 5, 6))
    x = np.random.default_rng(1).normal(size=(1, 5, 6, 4)).astype(F)
    (expected,) = runtime.InferenceSession(path).run(None, {"x": x.transpose(0, 3, 1, 2)})
    np.testing.assert_array_equal(run(load(path), x), expected)


@pytest.mark.parametrize("enlarging", ["comparison", "cases"])
@pytest.mark.parametrize("comparison", ["Greater", "GreaterOrEqual"])
def test_choices_have_the_shape_of_all_that_they_are_made_of(tmp_path, comparison, enlarging):
    """Else sums behind them would have fewer terms than they have."""
    runtime = pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node(comparison, ["x", "zeros"], ["g"]),
        helper.make_node("Where", ["g", "ones", "minus"], ["y"]),
    ]
    wide, one = np.ones((4, 1, 1), F), F(1)
    beside, cases = (wide, one) if enlarging == "comparison" else (one, wide)
    constants = dict(zeros=0 * beside, ones=cases, minus=-cases)
    path = model(tmp_path / "n.onnx", nodes, constants, (1, 5, 6), (4, 5, 6))
    x = np.random.default_rng(1).normal(size=(1, 5, 6, 1)).astype(F)
    if enlarging == "comparison" and comparison == "GreaterOrEqual":
        with pytest.raises(UserError, match="only x >= 0 is known"):
            load(path)
        return
    (expected,) = runtime.InferenceSession(path).run(None, {"x": x.transpose(0, 3, 1, 2)})
    y = run(load(path), x)
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y, expected)


def test_batches_of_a_network_made_for_one_example(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Gemm", ["a", "w", "b"], ["y"], transB=1, alpha=2.0, beta=0.5),
    ]
    w, b = RNG.normal(size=(3, 8)).astype(F), RNG.normal(size=3).astype(F)
    constants = {"shape": np.array([1, -1]), "w": w, "b": b}
    network = load(model(tmp_path / "n", nodes, constants, (2, 2, 2), (3,)))
    x = RNG.normal(size=(7, 2, 2, 2)).astype(F)
    expected = 2 * x.transpose(0, 3, 1, 2).reshape(7, 8) @ w.T + b / 2
    np.testing.assert_allclose(run(network, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", ["onnxruntime", "qonnx"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_files_of_a_fixed_batch(tmp_path, package, batch):
    """They are executed with the packages, too, by whole batches."""
    pytest.importorskip(package)
    nodes = [
        quant("x", "a") if package == "qonnx" else helper.make_node("Round", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    w = RNG.integers(-7, 8, (8, 3)).astype(F)
    constants = dict(one=F(1), zero=F(0), four=F(4), shape=np.array([batch, 8]), w=w)
    path = model(tmp_path / "n", nodes, constants, (2, 2, 2), (3,), batch=batch)
    x = RNG.integers(0, 16, (7, 2, 2, 2)).astype(F)
    expected = x.transpose(0, 3, 1, 2).reshape(7, 8) @ w
    np.testing.assert_array_equal(run(load(path), x), expected)
    np.testing.assert_array_equal(qonnx.execute(path, x), expected)
    report = verify(path)
    assert report.ok and f"executed with {package}: 2 examples" in report.notes[0]


def test_stored_integers_between_quantize_and_dequantize(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t"], ["k"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "u"], ["l"], axis=0),
        helper.make_node("Conv", ["d", "k", "l"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    ]
    w = RNG.integers(-7, 8, (3, 2, 3, 3)).astype(np.int8)
    t, s = F([0.1, 0.2, 0.3]), F(0.25)
    constants = dict(
        s=s, z=np.uint8(3), low=np.uint8(0), high=np.uint8(15), w=w, t=t, b=np.int32([5, -600, 7]), u=t * s
    )
    path = model(tmp_path / "n", nodes, constants, (2, 4, 4), (3, 4, 4))
    x = np.concatenate([RNG.normal(size=(15, 4, 4, 2)), np.full((1, 4, 4, 2), 0.125)]).astype(F)
    session = runtime.InferenceSession(path)
    expected = [session.run(None, {"x": example.transpose(2, 0, 1)[None]})[0] for example in x]
    np.testing.assert_allclose(run(load(path), x), np.concatenate(expected), rtol=1e-5, atol=1e-5)
    (row,) = verify(path).layers
    flat = w.reshape(3, -1).astype(int)
    positive, negative = np.maximum(flat, 0).sum(1), np.maximum(-flat, 0).sum(1)
    bias = np.array([5, -600, 7])
    assert row.inputs == (-3, 12) and row.weight_bits == 8
    low, high = -3 * positive - 12 * negative, 12 * positive + 3 * negative
    assert row.extremes == ((low + np.minimum(bias, 0)).min(), (high + np.maximum(bias, 0)).max())


def bare(path, nodes, constants, shape, out_shape):
    """In plain ONNX of opset 21, without QONNX."""
    made = onnx.load(model(path, nodes, constants, shape, out_shape))
    del made.opset_import[:]
    made.opset_import.append(helper.make_opsetid("", 21))
    onnx.save(made, path)
    return path


@pytest.mark.parametrize("kind, low, high", [("UINT16", 0, 65535), ("INT16", -32768, 32767), (None, 0, 255)])
def test_the_stored_type_without_a_zero_point(tmp_path, kind, low, high):
    attributes = {} if kind is None else dict(output_dtype=getattr(TensorProto, kind))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["k"]),
        helper.make_node("MatMul", ["d", "k"], ["y"]),
    ]
    constants = dict(s=F(1 / 255), one=F(1), w=np.full((600, 2), 127, np.int8))
    report = verify(bare(tmp_path / "n", nodes, constants, (600,), (2,)))
    (row,) = report.layers
    ends = sorted((600 * 127 * low, 600 * 127 * high))
    assert row.inputs == (low, high) and row.extremes == tuple(ends)
    assert report.ok == (kind is None)  # The others need more than 32 bits.


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("stored", [True, False])
def test_weights_between_quantize_and_dequantize(tmp_path, stored, zero_point):
    """Stored as integers or as floats, with a zero point or without, they are proven alike."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zx"], ["d"]),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("Clip", ["v", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["w" if stored else "c", "s", "z"], ["k"]),
        helper.make_node("MatMul", ["d", "k"], ["y"]),
    ]
    codes = np.random.default_rng(0).integers(-7, 8, (8, 2)).astype(np.int8)
    w = codes if stored else (codes - F(zero_point)) * F(0.25)
    constants = dict(w=w, s=F(0.25), z=np.int8(zero_point), zx=np.uint8(9), low=np.int8(-7), high=np.int8(7))
    report = verify(bare(tmp_path / "n", nodes[:2] + nodes[2 + 2 * stored :], constants, (8,), (2,)))
    (row,) = report.layers
    positive, negative = (np.maximum(sign * (codes.astype(int) - zero_point), 0).sum(0) for sign in (1, -1))
    assert row.inputs == (-9, 246) and row.weight_bits == 8
    assert row.extremes == (min(-9 * positive - 246 * negative), max(246 * positive + 9 * negative))
    assert table(report).endswith("\nverified")


def test_a_network_of_floats_is_not_called_verified(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    report = verify(bare(tmp_path / "n", [node], dict(w=np.ones((4, 2), F)), (4,), (2,)))
    assert report.ok and table(report).endswith("\nno layer of integers, so nothing was proven")


def test_stored_weights_of_four_bits(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["k"]),
        helper.make_node("MatMul", ["d", "k"], ["y"]),
    ]
    constants = dict(one=F(1), w=np.arange(-8, 8).reshape(8, 2).astype(ml_dtypes.int4))
    (row,) = verify(bare(tmp_path / "n", nodes, constants, (8,), (2,))).layers
    assert row.weight_bits == 4 and row.extremes == (255 * -20, 255 * 16)


def quant(x, y, bits="four", scale="one", signed=0):
    attributes = dict(domain=QONNX, signed=signed, narrow=0, rounding_mode="ROUND")
    return helper.make_node("Quant", [x, scale, "zero", bits], [y], **attributes)


NUMBERS = dict(one=F(1), zero=F(0), four=F(4), bits=F(32), half=F(0.5))
LONG = F([1e6, -2e6, 3e6, -4e6])
SCALES = F([0.5, 0.25, 0.75, 1])
# Nodes from the inputs q and the weights k on, constants, least and greatest that is added.
BIASES = {
    "a second one": (
        [("Gemm", ["q", "k", "zeros"], {}), ("Add", ["b"], {})],
        dict(zeros=np.zeros(4, F), b=LONG),
        (-4e6, 3e6),
    ),
    "scaled": ([("Gemm", ["q", "k", "b"], dict(beta=2.0))], dict(b=LONG), (-8e6, 6e6)),
    "behind a shape": (
        [("MatMul", ["q", "k"], {}), ("Reshape", ["shape"], {}), ("Add", ["b"], {})],
        dict(shape=np.array([1, 2, 2]), b=LONG.reshape(2, 2)),
        (-4e6, 3e6),
    ),
    "behind a type": (
        [("MatMul", ["q", "k"], {}), ("Cast", [], dict(to=TensorProto.INT32)), ("Add", ["b"], {})],
        dict(b=LONG.astype(np.int32)),
        (-4e6, 3e6),
    ),
    "behind scales": (
        [("MatMul", ["q", "k"], {}), ("Mul", ["s"], {}), ("Unsqueeze", ["axes"], {}), ("Add", ["b"], {})],
        dict(s=SCALES, axes=np.array([1]), wide=SCALES * LONG),
        (-4e6, 3e6),
    ),
    "as a norm": (
        [
            ("MatMul", ["q", "k"], {}),
            ("BatchNormalization", ["ones", "b", "mean", "ones"], dict(epsilon=0.0)),
        ],
        dict(ones=np.ones(4, F), b=LONG, mean=-np.ones(4, F)),
        (-4e6 + 1, 3e6 + 1),
    ),
}


@pytest.mark.parametrize("case", BIASES)
def test_biases_are_in_the_accumulator_wherever_they_are_added(tmp_path, case):
    operations, constants, (least, greatest) = BIASES[case]
    nodes, last = [quant("x", "q"), quant("w", "k", signed=1)], None
    if "wide" in constants:
        nodes.append(quant("wide", "b", bits="bits", scale="s", signed=1))
    for index, (operation, inputs, attributes) in enumerate(operations):
        inputs = inputs if last is None else [last, *inputs]
        last = f"y{index}" if index < len(operations) - 1 else "y"
        nodes.append(helper.make_node(operation, inputs, [last], **attributes))
    constants = {**NUMBERS, "w": np.full((8, 4), 7, F), **constants}
    path = model(tmp_path / "n", nodes, constants, (8,), (None,))
    (layer,) = Analysis(load(path)).layers
    low, high = layer.extremes()
    assert (min(low), max(high)) == (least, greatest + 840)


ROUNDED = {"ROUND": np.rint, "CEIL": np.ceil, "FLOOR": np.floor, "ROUND_TO_ZERO": np.trunc}


@pytest.mark.parametrize("mode", ROUNDED)
@pytest.mark.parametrize("signed, narrow", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_quantizers_of_qonnx(tmp_path, mode, signed, narrow):
    attributes = dict(domain=QONNX, signed=signed, narrow=narrow, rounding_mode=mode)
    node = helper.make_node("Quant", ["x", "s", "z", "b"], ["y"], **attributes)
    path = model(tmp_path / "n", [node], dict(s=F(0.5), z=F(2), b=F(3)), (64,), (64,))
    x = np.arange(-32, 32, dtype=F)[None] / 8
    low, high = {(0, 0): (0, 7), (0, 1): (0, 6), (1, 0): (-4, 3), (1, 1): (-3, 3)}[signed, narrow]
    expected = (np.clip(ROUNDED[mode](x / F(0.5) + 2), low, high) - 2) * F(0.5)
    np.testing.assert_array_equal(run(load(path), x), expected)


def test_bipolar_quantizer(tmp_path):
    node = helper.make_node("BipolarQuant", ["x", "s"], ["y"], domain=QONNX)
    path = model(tmp_path / "n", [node], dict(s=F(0.5)), (4,), (4,))
    np.testing.assert_array_equal(run(load(path), F([[-3, -0.0, 0, 0.1]])), [[-0.5, 0.5, 0.5, 0.5]])


class Exported:
    """A network in qflax's style: scales are nodes of their own, weights integers."""

    shape = (5, 5, 2)
    kernel = np.random.default_rng(7).integers(-7, 8, (3, 2, 3, 3)).astype(F)

    def outputs(self, x):
        codes = np.clip(np.rint(x / F(20) + F(4)), 0, 15) - F(4)
        padded = np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0)))
        sums = np.zeros((len(x), 5, 5, 3), F)
        for i in range(3):
            for j in range(3):
                sums += padded[:, i : i + 5, j : j + 5] @ self.kernel[:, :, i, j].T
        y = (sums + F([100, -50, 0])) * F([0.1, 0.2, 0.3])
        return y.transpose(0, 3, 1, 2).reshape(len(x), -1)

    def save(self, path, outputs, bits=12, name="conv", **changes):
        nodes = [
            helper.make_node("Div", ["x", "s"], ["a"], name="act/scale"),
            helper.make_node("Add", ["a", "z"], ["b"]),
            helper.make_node(
                *("Quant", ["b", "one", "zero", "four"], ["c"]),
                domain=QONNX, signed=0, narrow=0, rounding_mode="ROUND",
            ),
            helper.make_node("Sub", ["c", "z"], ["d"]),
            helper.make_node(
                *("Quant", ["w", "one", "zero", "four"], ["k"]),
                domain=QONNX, signed=1, narrow=1, rounding_mode="ROUND",
            ),
            helper.make_node("Conv", ["d", "k"], ["e"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["e", "bias"], ["f"]),
            helper.make_node("Mul", ["f", "t"], ["g"]),
            helper.make_node("Flatten", ["g"], ["y"]),
        ]  # fmt: skip
        constants = dict(
            *(), s=F(20), z=F(4), one=F(1), zero=F(0), four=F(4), w=self.kernel,
            bias=F([100, -50, 0])[:, None, None], t=F([0.1, 0.2, 0.3])[:, None, None],
        )  # fmt: skip
        probe = {"count": 2, "low": 0.0, "high": 255.0, "outputs": outputs.astype(float).tolist()}
        metadata = {"shape": list(self.shape), "accumulator_bits": {name: bits}, "probe": probe}
        return model(path, nodes, constants | changes, (2, 5, 5), (75,), metadata)


@pytest.fixture(scope="module")
def exported():
    return Exported()


def test_an_export_is_verified(exported, probe, tmp_path):
    outputs = exported.outputs(probe(2, exported.shape))
    report = verify(exported.save(tmp_path / "n", outputs))
    assert report.ok and report.probe == "2 examples, all outputs are equal"
    (row,) = report.layers
    flat = exported.kernel.reshape(3, -1).astype(int)
    positive, negative = np.maximum(flat, 0).sum(1), np.maximum(-flat, 0).sum(1)
    low, high = -4 * positive - 11 * negative, 11 * positive + 4 * negative
    bias = np.array([100, -50, 0])
    assert row.inputs == (-4, 11) and row.promised == 12 and row.holds and row.attained
    assert row.extremes == ((low + np.minimum(bias, 0)).min(), (high + np.maximum(bias, 0)).max())
    if any("with qonnx" in note for note in report.notes):
        assert "executed with qonnx: 2 examples, all outputs are equal" in report.notes


def test_a_promise_is_of_all_nodes_of_its_name(exported, probe, tmp_path):
    outputs = exported.outputs(probe(2, exported.shape))
    path = exported.save(tmp_path / "n", outputs, bits=5)
    made = onnx.load(path)
    made.graph.node.insert(4, helper.make_node("Conv", ["d", "tiny"], ["beside"], name="conv"))
    made.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 2, 1, 1), np.int8), "tiny"))
    path.write_bytes(made.SerializeToString())
    report = verify(path)
    assert [row.promised for row in report.layers] == [5, 5] and not report.layers[1].holds


def test_wrong_exports_are_caught(exported, probe, tmp_path):
    outputs = exported.outputs(probe(2, exported.shape))
    needed = verify(exported.save(tmp_path / "n", outputs)).layers[0].needed
    report = verify(exported.save(tmp_path / "n", outputs, bits=needed - 1))
    assert [line.split(": ")[:2] for line in report.failures] == [["conv", "does not hold"]]
    for change in (dict(s=F(21)), dict(z=F(0)), dict(t=F([0.1, 0.2, 0.31])[:, None, None])):
        report = verify(exported.save(tmp_path / "n", outputs, **change))
        assert len(report.failures) == 1 and "probe: not as the trained network" in report.failures[0]
    with pytest.raises(UserError, match="'other' has accumulator_bits, but is no convolution"):
        verify(exported.save(tmp_path / "n", outputs, name="other"))
    with pytest.raises(UserError, match="74 outputs; the network has 75"):
        verify(exported.save(tmp_path / "n", outputs[:, :-1]))


def test_weights_off_their_grid_are_what_the_quantizer_makes_of_them(exported, probe, tmp_path):
    """Raw weights that were meant to be truncated: rounded in the file, they exceed the bound."""
    outputs = exported.outputs(probe(2, exported.shape))
    good = verify(exported.save(tmp_path / "n", outputs)).layers[0]
    raw = np.where(
        np.abs(exported.kernel) < 7, exported.kernel + 0.6 * np.sign(exported.kernel), exported.kernel
    )
    report = verify(exported.save(tmp_path / "n", outputs, bits=good.needed, w=raw.astype(F)))
    flat = np.rint(raw).reshape(3, -1).astype(int)
    low = (-4 * np.maximum(flat, 0) - 11 * np.maximum(-flat, 0)).sum(1) + [0, -50, 0]
    assert report.layers[0].extremes[0] == low.min() < good.extremes[0]
    assert any("probe" in line for line in report.failures)


def test_other_executor_is_compared(exported, probe, tmp_path, monkeypatch):
    outputs = exported.outputs(probe(2, exported.shape))
    path = exported.save(tmp_path / "n", outputs)
    monkeypatch.setattr("qflax.verify.qonnx.execute", lambda path, x: outputs + 1)
    assert "executed with qonnx: 2 examples, largest difference 1, though all" in verify(path).failures[0]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "qonnx.core.modelwrapper", None)
    report = verify(path)
    assert report.ok and report.notes == (
        "the package qonnx is not installed: the file was not executed with it",
    )


def test_unknown_operations_and_shapes(tmp_path):
    cases = [
        (
            helper.make_node("Softplus", ["x"], ["y"], name="n"),
            {},
            "Softplus 'n': operation of domain '' that",
        ),
        (
            helper.make_node("Relu", ["x"], ["y"], domain="custom"),
            {},
            "Relu 'y': operation of domain 'custom'",
        ),
        (helper.make_node("Relu", ["other"], ["y"]), {}, "Relu 'y': no 'other'"),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": np.ones((5, 2), F)}, "MatMul 'y': matmul"),
        (helper.make_node("Reshape", ["x", "w"], ["y"]), {"w": np.array([4, 1])}, "moves the batch"),
        (
            helper.make_node("Quant", ["x", "w", "w", "w"], ["y"], domain=QONNX, rounding_mode="NEAR"),
            {"w": F(2)},
            "rounding_mode 'NEAR' is not known",
        ),
    ]
    for node, constants, message in cases:
        with pytest.raises(UserError, match=message) as error:
            load(model(tmp_path / "n", [node], constants, (4,), (4,)))
        assert "\n" not in str(error.value)


def test_what_is_no_network(tmp_path, monkeypatch):
    path = tmp_path / "n"
    for data in (b"", b"text\n", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is neither a packed network nor an ONNX") as error:
            load(path)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="install the package onnx"):
        load(path)


def test_damage_is_told_in_one_line(tmp_path):
    data = (HERE / "cnn_int_trunc.onnx").read_bytes()
    path, errors = tmp_path / "n", 0
    for i in range(120):
        damaged = bytearray(data)
        if i % 2:
            del damaged[len(data) * i // 120 :]
        else:
            damaged[len(data) * i // 120 + 7] ^= 1 << i % 7
        path.write_bytes(damaged)
        try:
            load(path)
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
    assert errors >= 60
