"""ONNX files are verified or refused in one line, whatever is in them, and refer to no other file."""

import builtins
import json
import pathlib
import random

import numpy as np
import pytest
from hostile import VALUES, damaged, mutated, outcome, refused

ml_dtypes = pytest.importorskip("ml_dtypes")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from qflax.verify import verify  # noqa: E402

HERE = pathlib.Path(__file__).parent
F = np.float32
QONNX = "qonnx.custom_op.general"
BIG = (0, -1, 3, 10**5, 2**31, 10**12, 2**63 - 1, -(2**63))
LARGE = "more than 67,108,864 elements"


def network(nodes, constants, shape=(1, 4), opset=20):
    """A network of one input x and one output y."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(QONNX, 2)],
    )


def exported():
    """A quantized network with metadata."""
    quant = dict(domain=QONNX, signed=1, narrow=0, rounding_mode="ROUND")
    nodes = [
        helper.make_node("Quant", ["x", "s", "z", "b"], ["q"], **quant),
        helper.make_node("Quant", ["w", "s", "z", "b"], ["k"], **quant),
        helper.make_node("Conv", ["q", "k"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Reshape", ["p", "shape"], ["y"]),
    ]
    w = np.arange(-9, 9, dtype=F).reshape(1, 2, 3, 3) / 2
    constants = dict(s=F(0.5), z=F(0), b=F(4), w=w, shape=np.int64([1, -1]))
    model = network(nodes, constants, (1, 2, 5, 5))
    probe = {"count": 1, "low": 0.0, "high": 1.0, "outputs": [[0.0] * 4]}
    metadata = {"shape": [5, 5, 2], "accumulator_bits": {"conv": 20}, "probe": probe}
    helper.set_model_props(model, {"qflax": json.dumps(metadata)})
    return model


def save(path, model):
    path.write_bytes(model.SerializeToString())
    return path


def attribute(name, rng):
    choices = (*BIG, 0.5, float("nan"), "text", b"\xff", [0, 0], [-1, -1], [1, 10**12], [0.5], ["a"], [1] * 4)
    return helper.make_attribute(name, rng.choice(choices))


def change(model, rng):
    """Damages a dimension, a type, bytes, an attribute, an edge, an operation, or the metadata."""
    graph = model.graph
    node, tensor, kind = rng.choice(graph.node), rng.choice(graph.initializer), rng.randrange(10)
    names = [*(output for node in graph.node for output in node.output), "x", "s", "", "nowhere"]
    if kind == 0:
        tensor.dims.append(rng.choice(BIG))
    elif kind == 1:
        tensor.data_type = rng.randrange(30)
    elif kind == 2:
        tensor.raw_data = damaged(tensor.raw_data, rng)
    elif kind in (3, 4) and node.attribute:
        old = rng.choice(node.attribute)
        old.CopyFrom(attribute(old.name, rng))
    elif kind == 5 and node.attribute:
        del node.attribute[0]
    elif kind == 6:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 7:
        node.output[0] = rng.choice(names)
    elif kind == 8:
        node.op_type = rng.choice(
            ("Relu", "Gemm", "Pad", "Slice", "Flatten", "Concat", "Trunc", "If", "Loop")
        )
    else:
        entry = model.metadata_props[0]
        entry.value = json.dumps(mutated(json.loads(entry.value), rng)).replace("\\ud800", "?")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Without other packages that execute files, which take their time."""
    monkeypatch.setattr("qflax.verify.qonnx.execute", lambda path, x: (_ for _ in ()).throw(ImportError))


def test_it_is_read_undamaged(tmp_path):
    assert outcome(save(tmp_path / "m", exported()))[0] == 1  # The probe's outputs are not the network's.


@pytest.mark.parametrize("seed", range(5))
def test_changed_networks(tmp_path, seed):
    rng, codes = random.Random(seed), []
    for _ in range(40):
        model = exported()
        change(model, rng)
        codes.append(outcome(save(tmp_path / "m", model))[0])
    assert 2 in codes and 1 in codes


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes(tmp_path, seed):
    data, rng = exported().SerializeToString(), random.Random(seed)
    for _ in range(40):
        (tmp_path / "m").write_bytes(damaged(data, rng))
        outcome(tmp_path / "m")


def one(operation, *constants, shape=(1, 4), **attributes):
    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(operation, ["x", *names], ["y"], **attributes)
    return network([node], dict(zip(names, constants, strict=True)), shape)


def chain(first, operation, *constants, **attributes):
    """An operation, and another one of its output and the constants."""
    model = one(first, *([F(0)] if first == "GreaterOrEqual" else []))
    model.graph.node[0].output[0] = "a"
    names = [f"d{i}" for i in range(len(constants))]
    model.graph.node.append(helper.make_node(operation, ["a", *names], ["y"], **attributes))
    pairs = zip(constants, names, strict=True)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for value, name in pairs)
    return model


def old(operation, **attributes):
    node = helper.make_node(operation, ["x"], ["y"], **attributes)
    return network([node], {}, opset=10)


def quant(scale=1.0, zero=0.0, bits=4.0, **attributes):
    return one("Quant", *map(np.asarray, (scale, zero, bits)), domain=QONNX, **attributes)


IMAGE, KERNEL = (1, 1, 4, 4), np.ones((1, 1, 1, 1), F)
NETWORKS = {
    "input": (lambda: one("Relu", shape=(1, 10**12)), LARGE),
    "negative input": (lambda: one("Relu", shape=(1, -4)), "-4 is no whole number"),
    "batch": (lambda: one("Relu", shape=(10**9, 4)), LARGE),
    "pads": (lambda: one("Pad", np.int64([0, 0, 0, 10**12])), LARGE),
    "negative pads": (lambda: one("Pad", np.int64([0, 0, 0, -1])), "-1 is no whole number"),
    "reshape": (lambda: one("Reshape", np.int64([1, 10**12])), "cannot reshape"),
    "axes": (lambda: one("Unsqueeze", np.int64([10**12])), "Unsqueeze 'y': "),
    **{
        f"{name} {value}": (
            lambda name=name, value=value: one("Conv", KERNEL, shape=IMAGE, **{name: value}),
            part,
        )
        for name, value, part in (
            ("strides", [0, 0], "0 is no whole number of 1"),
            ("strides", [-1, -1], "-1 is no whole number of 1"),
            ("dilations", [-1, 1], "-1 is no whole number of 1"),
            ("group", 0, "0 is no whole number of 1"),
            ("group", 10**12, "do not fit a kernel"),
            ("pads", [10**6] * 4, LARGE),
            ("pads", [-1] * 4, "-1 is no whole number of 0"),
            ("pads", [0.5] * 4, "0.5 is no whole number of 0"),
            ("pads", "many", "Conv 'y': "),
        )
    },
    "window": (lambda: one("MaxPool", shape=IMAGE, kernel_shape=[0, 1]), "0 is no whole number of 1"),
    "no window": (lambda: one("MaxPool", shape=IMAGE), "MaxPool 'y': "),
    "same": (
        lambda: one("MaxPool", shape=IMAGE, kernel_shape=[1, 1], strides=[0, 1], auto_pad="SAME_UPPER"),
        "MaxPool 'y': ",
    ),
    **{
        f"{key} {value}": (lambda key=key, value=value: quant(**{key: value}), part)
        for key, value, part in (
            ("bits", 0.0, "bits=0"),
            ("bits", -3.0, "bits=-3"),
            ("bits", 1e9, "bits=1000000000"),
            ("bits", np.nan, "NaN"),
            ("bits", np.inf, "infinity"),
            ("bits", 2.5, "must be one whole number"),
            ("scale", 0.0, "a scale of 0.0"),
            ("scale", -1.0, "a scale of -1.0"),
            ("scale", np.nan, "a scale of nan"),
            ("scale", np.inf, "a scale of inf"),
            ("scale", np.array("2", object), "has type object"),
            ("scale", np.complex64(1), "has type complex64"),
            ("rounding_mode", "NEAR", "'NEAR' is not known"),
            ("rounding_mode", 3, "Quant 'y': "),
        )
    },
    **{
        name: (lambda name=name: one(name, np.int64([10**12])), "that is not known")
        for name in ("ConstantOfShape", "Expand", "Tile", "Resize", "Range", "If", "Loop", "Scan")
    },
    **{
        f"cast to {kind}": (
            lambda kind=kind: one("Cast", to=getattr(TensorProto, kind)),
            "Cast 'y': ",
        )
        for kind in ("FLOAT16", "BFLOAT16", "BOOL", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT64", "STRING")
    },
    "float8 zero point": (
        lambda: one("QuantizeLinear", F(1), np.array(0, ml_dtypes.float8_e4m3fn)),
        "float8_e4m3fn is no type of integers",
    ),
    "float8 output": (
        lambda: one("QuantizeLinear", F(1), output_dtype=TensorProto.FLOAT8E4M3FN),
        "float8_e4m3fn is no type of integers",
    ),
    "two output types": (
        lambda: one("QuantizeLinear", F(1), np.uint8(0), output_dtype=TensorProto.INT8),
        "output_dtype is int8, and the zero point uint8",
    ),
    "dequantized to float16": (
        lambda: chain("Sign", "DequantizeLinear", F(1), output_dtype=TensorProto.FLOAT16),
        "output_dtype must be float32",
    ),
    "blocks": (lambda: one("QuantizeLinear", F([1, 2]), block_size=2), "block_size is not supported"),
    "padding with a number": (lambda: old("Pad", pads=[0, 0, 0, 1], value=1e6), "only padding with 0"),
    "choice by any truth": (
        lambda: chain("Sign", "Where", F(1), F(-1)),
        "by something else than x > y or x >= 0",
    ),
    "choice by another order": (lambda: one("GreaterOrEqual", F(1)), "only x >= 0"),
    "truth as a number": (lambda: chain("GreaterOrEqual", "Cast", to=TensorProto.FLOAT), "no 'a'"),
    "broadcast along an axis": (lambda: one("Add", np.ones(4, F), broadcast=1, axis=1), "before opset 7"),
    "dropout in training": (lambda: one("Dropout", F(0.5), np.array(True)), "training_mode"),
    "norm in training": (
        lambda: one("BatchNormalization", *[np.ones(4, F)] * 4, training_mode=1),
        "training_mode",
    ),
    "domain": (lambda: one("Relu", domain="elsewhere"), "'elsewhere' that is not known"),
    "opset": (lambda: network([helper.make_node("Relu", ["x"], ["y"])], {}, opset=9999), "opset 9999"),
    "opset 0": (lambda: network([helper.make_node("Relu", ["x"], ["y"])], {}, opset=0), "opset 0"),
    "cycle": (lambda: network([helper.make_node("Add", ["x", "y"], ["y"])], {}), "no 'y'"),
    "dangling": (lambda: network([helper.make_node("Add", ["x", "a"], ["y"])], {}), "no 'a'"),
    "made twice": (lambda: network([helper.make_node("Relu", ["x"], ["y"])] * 2, {}), "'y' is made twice"),
    "no output": (lambda: network([helper.make_node("Relu", ["x"], [])], {}), "Relu '': "),
    "text": (lambda: one("Add", np.array(["a", "b"], object)), "has type object"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_cannot_be(tmp_path, name):
    make, part = NETWORKS[name]
    refused(save(tmp_path / "m", make()), part)


def test_an_empty_zero_point_of_what_nothing_uses(tmp_path):
    model = exported()
    empty = numpy_helper.from_array(np.zeros(0, F), "empty")
    model.graph.initializer.append(empty)
    quantizer = dict(domain=QONNX, signed=1, narrow=0, rounding_mode="ROUND")
    model.graph.node.insert(0, helper.make_node("Quant", ["s", "s", "empty", "b"], ["dead"], **quantizer))
    assert outcome(save(tmp_path / "m", model))[0] == 1  # As without: the outputs are not the recorded ones.


def test_a_bias_that_makes_several_channels_of_one(tmp_path):
    quantizer = dict(domain=QONNX, signed=0, narrow=0, rounding_mode="ROUND")
    nodes = [
        helper.make_node("Quant", ["x", "s", "z", "b"], ["q"], **quantizer),
        helper.make_node("Quant", ["w", "s", "z", "b"], ["k"], **quantizer),
        helper.make_node("Conv", ["q", "k"], ["c"]),
        helper.make_node("Add", ["c", "bias"], ["y"]),
    ]
    bias = np.arange(5, dtype=F).reshape(1, 5, 1, 1)
    constants = dict(s=F(1), z=F(0), b=F(4), w=np.full((1, 1, 3, 3), 7, F), bias=bias)
    report = verify(save(tmp_path / "m", network(nodes, constants, (1, 1, 4, 4))))
    assert report.ok and report.layers[0].extremes == (0, 9 * 7 * 15 + 4)


@pytest.mark.parametrize("place", ["constant", "attribute", "subgraph"])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "secret"])
def test_no_other_file_is_opened(tmp_path, monkeypatch, place, location):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "secret").write_bytes(bytes(16))
    model = one("Add", np.ones(4, F))
    if place == "constant":
        model.graph.initializer.append(tensor)
    elif place == "attribute":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    else:
        graph = helper.make_graph([], "branch", [], [], [tensor])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=graph))
    path, opened, original = save(tmp_path / "m", model), [], open
    monkeypatch.setattr(builtins, "open", lambda file, *rest: opened.append(file) or original(file, *rest))
    refused(path, "tensor 'w' is in another file")
    assert set(opened) == {path}


@pytest.mark.parametrize("dims", [[10**12], [-1], [2**62] * 3, [5], [1] * 100])
def test_sizes_that_are_not_those_of_the_bytes(tmp_path, dims):
    model = one("Add", np.ones(4, F))
    model.graph.initializer[0].ClearField("dims")
    model.graph.initializer[0].dims.extend(dims)
    refused(save(tmp_path / "m", model), "tensor 'c0': ")


@pytest.mark.parametrize("text", ["", "[]", "NaN", "[" * 100_000, '{"probe": 1}', '{"shape": [4]}'])
def test_metadata_that_is_none(tmp_path, text):
    model = one("Relu")
    helper.set_model_props(model, {"qflax": text})
    refused(save(tmp_path / "m", model))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", ["probe", "count", "low", "outputs", "bits"])
def test_metadata_of_the_wrong_kind(tmp_path, field, value):
    model = exported()
    metadata = json.loads(model.metadata_props[0].value)
    if field == "bits":
        metadata["accumulator_bits"]["conv"] = value
    elif field == "probe":
        metadata["probe"] = value
    else:
        metadata["probe"][field] = value
    model.metadata_props[0].value = json.dumps(metadata)
    code, _ = outcome(save(tmp_path / "m", model))
    valid = field == "low" and value in (0, -1, 0.5, 7, True) or (field, value) == ("count", True)
    assert (
        code == 2
        or valid
        or field == "low"
        and isinstance(value, int | float)
        or (field, value) == ("bits", 7)
    )


@pytest.mark.parametrize("suffix", [".textproto", ".json", ".onnxtxt", ".ort"])
def test_the_name_does_not_choose_the_format(tmp_path, suffix):
    path = save(tmp_path / f"m{suffix}", exported())
    assert outcome(path)[0] == 1
    path.write_text('ir_version: 8 graph { name: "x" }')
    refused(path, "neither a packed network nor an ONNX file")
