"""Integers of ONNX files: arithmetic that wraps around, types of inputs and of constants."""

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.verify import load, run, verify
from qflax.verify.ranges import Analysis

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from onnx_models import QONNX, model  # noqa: E402

F = np.float32
KERNEL = helper.make_node("DequantizeLinear", ["w", "one"], ["k"])
PRODUCT = helper.make_node("MatMul", ["d", "k"], ["y"])


def network(path, operations, weights=((2,), (-3,)), dtype=TensorProto.FLOAT, **constants):
    """Codes 0 ... 3 of type uint8, operations of (type, further inputs, attributes) on them, a product."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("Clip", ["q", "zero", "three"], ["t0"]),
    ]
    for i, (kind, inputs, attributes) in enumerate(operations):
        nodes.append(helper.make_node(kind, [n or f"t{i}" for n in inputs], [f"t{i + 1}"], **attributes))
    nodes += [
        helper.make_node("Cast", [f"t{len(operations)}"], ["d"], to=TensorProto.FLOAT),
        *(KERNEL, PRODUCT),
    ]
    constants = dict(one=F(1), zero=np.uint8(0), three=np.uint8(3), w=np.int8(weights), **constants)
    return model(path, nodes, constants, (len(weights),), (1,), dtype=dtype)


def to(dtype):
    return ("Cast", [""], dict(to=getattr(TensorProto, dtype)))


FITTING = {
    "Sub": ([("Sub", ["c", ""], {})], dict(c=np.uint8(3)), (0, 3)),
    "Add": ([("Add", ["", "c"], {})], dict(c=np.uint8(252)), (252, 255)),
    "Mul": ([("Mul", ["", "c"], {})], dict(c=np.uint8(85)), (0, 255)),
    "Cast": ([to("INT8")], {}, (0, 3)),
    "Neg": ([to("INT8"), ("Neg", [""], {})], {}, (-3, 0)),
    "int32": ([to("INT32"), ("Add", ["", "c"], {}), ("Mul", ["", "c"], {})], dict(c=np.int32(-9)), (54, 81)),
    "Max": ([("Max", ["", "c"], {}), ("Identity", [""], {})], dict(c=np.uint8(2)), (2, 3)),
}


@pytest.mark.parametrize("name", FITTING)
def test_integers_that_stay_in_their_type_are_followed(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    operations, constants, expected = FITTING[name]
    path = network(tmp_path / "n.onnx", operations, **constants)
    assert verify(path).ok
    (layer,) = Analysis(load(path)).layers
    assert (layer.x_low, layer.x_high) == (min(expected[0], 0), max(expected[1], 0))
    x = F([[0, 1], [2, 3], [7, -1]])
    session = onnxruntime.InferenceSession(str(path))
    np.testing.assert_array_equal(
        run(load(path), x), np.concatenate([session.run(None, {"x": r[None]})[0] for r in x])
    )


WRAPPING = {
    "Sub": ([("Sub", ["c", ""], {})], dict(c=np.uint8(2)), "subtract of 't1' .* 0 ... 255 and may leave"),
    "Add": ([("Add", ["", "c"], {})], dict(c=np.uint8(253)), "wrap around"),
    "Mul": ([("Mul", ["", "c"], {})], dict(c=np.uint8(86)), "wrap around"),
    "Cast": ([("Add", ["", "c"], {}), to("INT8")], dict(c=np.uint8(125)), "-128 ... 127 and may leave"),
    "Neg": ([to("INT8"), ("Add", ["", "c"], {}), ("Neg", [""], {})], dict(c=np.int8(-128)), "negative of"),
    "beyond float32": ([to("INT32"), ("Mul", ["", "c"], {})], dict(c=np.int32(2**23)), "wrap around"),
    "Div": (
        [to("INT32"), ("Div", ["", "c"], {})],
        dict(c=np.int32(2)),
        "of int32: only float32 is supported",
    ),
    "ReduceMean": ([to("INT32"), ("ReduceMean", [""], {})], {}, "of int32: only float32"),
    "double": ([to("DOUBLE")], {}, "to float64: float32 and integers are supported"),
    "long": ([to("INT64")], {}, "int64 is no type"),
    "constant": ([to("INT32"), ("Add", ["", "c"], {})], dict(c=np.int32(2**24 + 1)), "float32 does not hold"),
}


@pytest.mark.parametrize("name", WRAPPING)
def test_integers_that_may_leave_their_type_are_refused(tmp_path, name):
    operations, constants, message = WRAPPING[name]
    with pytest.raises(UserError, match=message) as error:
        verify(network(tmp_path / "n.onnx", operations, **constants))
    assert "\n" not in str(error.value)


def test_weights_beyond_float32_are_refused(tmp_path):
    nodes = [helper.make_node("DequantizeLinear", ["x", "one"], ["d"]), KERNEL, PRODUCT]
    path = tmp_path / "n.onnx"
    model(
        path,
        nodes,
        dict(one=F(1), w=np.full((2, 1), 2**24 + 1, np.int32)),
        (2,),
        (1,),
        dtype=TensorProto.INT8,
    )
    with pytest.raises(UserError, match="float32 does not hold"):
        load(path)


@pytest.mark.parametrize(("dtype", "ends"), [("UINT8", (0, 255)), ("INT8", (-128, 127))])
def test_an_input_of_integers_has_the_range_of_its_type(tmp_path, dtype, ends):
    nodes = [helper.make_node("DequantizeLinear", ["x", "one"], ["d"]), KERNEL, PRODUCT]
    path, w = tmp_path / "n.onnx", np.int8([[2], [-3]])
    model(path, nodes, dict(one=F(1), w=w), (2,), (1,), dtype=getattr(TensorProto, dtype))
    report = verify(path, require_proof=True)
    assert report.ok and report.layers[0].inputs == (min(ends[0], 0), ends[1])
    assert run(load(path), F([ends])).item() == 2 * ends[0] - 3 * ends[1] and load(path).inputs == ends


def test_inputs_of_other_types_are_refused(tmp_path):
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    path = model(tmp_path / "n.onnx", nodes, {}, (2,), (2,), dtype=TensorProto.INT64)
    with pytest.raises(UserError, match="input 'x' is of INT64; FLOAT, UINT8 and INT8 are supported"):
        load(path)


def test_constants_keep_their_types_where_they_are_moved(tmp_path):
    """As exporters have it: a zero point behind an Identity, the end of a slice behind an Unsqueeze."""
    nodes = [
        helper.make_node("Identity", ["z"], ["zero"]),
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        helper.make_node("Unsqueeze", ["end", "axis"], ["ends"]),
        helper.make_node("Slice", ["d", "axis1", "ends", "axis1"], ["y"]),
    ]
    constants = dict(
        z=np.int8(-3), one=F(1), end=np.int64(2**63 - 1), axis=np.int64([0]), axis1=np.int64([1])
    )
    path = model(tmp_path / "n.onnx", nodes, constants, (3,), (2,))
    np.testing.assert_array_equal(run(load(path), F([[1, 2, 300]])), F([[2, 130]]))
    assert verify(path).ok


def test_slices_backwards_from_before_the_start(tmp_path):
    nodes = [helper.make_node("Slice", ["x", "s", "e", "a", "a2"], ["y"])]
    constants = dict(s=np.int64([-9]), e=np.int64([-(2**63)]), a=np.int64([1]), a2=np.int64([-1]))
    path = model(tmp_path / "n.onnx", nodes, constants, (4,), (1,))
    np.testing.assert_array_equal(run(load(path), F([[1, 2, 3, 4]])), F([[1]]))
    assert verify(path).ok


def test_quantized_networks_of_other_tools_are_compared_without_fused_kernels(tmp_path):
    """A kernel of onnxruntime for three operations at once rounds its sums otherwise than these."""
    pytest.importorskip("onnxruntime")
    rng, nodes, constants, x = np.random.default_rng(11), [], dict(zero=np.uint8(0)), "x"
    constants["axes"] = np.int64([2, 3])
    for i, (depth, features) in enumerate([(3, 8), (8, 8), (8, 8)]):
        constants |= {
            f"a{i}": F(rng.uniform(0.01, 0.05)),
            f"w{i}": rng.integers(-127, 128, (features, depth, 3, 3)).astype(np.int8),
            f"s{i}": rng.uniform(0.001, 0.01, features).astype(F),
            f"b{i}": rng.integers(-900, 900, features).astype(np.int32),
        }
        constants[f"t{i}"] = constants[f"a{i}"] * constants[f"s{i}"]
        nodes += [
            helper.make_node("QuantizeLinear", [x, f"a{i}", "zero"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", f"a{i}", "zero"], [f"d{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"k{i}"], axis=0),
            helper.make_node("DequantizeLinear", [f"b{i}", f"t{i}"], [f"c{i}"], axis=0),
            helper.make_node("Conv", [f"d{i}", f"k{i}", f"c{i}"], [f"y{i}"], pads=[1] * 4),
            helper.make_node("Relu", [f"y{i}"], [f"r{i}"]),
        ]
        x = f"r{i}"
    nodes.append(helper.make_node("ReduceMean", [x, "axes"], ["y"], keepdims=0))
    path = model(tmp_path / "n.onnx", nodes, constants, (3, 8, 8), (8,))
    report = verify(path, require_proof=True)
    assert report.ok and len(report.layers) == 3 and "executed with onnxruntime" in report.notes[0]


def test_programs_round_batch_norms_otherwise(tmp_path):
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["w", "one"], ["k"]),
        helper.make_node("Conv", ["f", "k"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
    ]
    vectors = {name: rng.uniform(0.5, 2, 4).astype(F) for name in "gbmv"}
    w = rng.integers(-7, 8, (4, 3, 3, 3)).astype(np.int8)
    constants = dict(s=F(1 / 255), z=np.uint8(0), w=w, one=F(1), **vectors)
    path = model(tmp_path / "n.onnx", nodes, constants, (3, 8, 8), (4, 6, 6))
    assert verify(path).ok and Analysis(load(path)).inexact[0].layer == "y"


def test_weights_of_qonnx_may_be_stored_as_integers(tmp_path):
    nodes = [
        helper.make_node("Quant", ["x", "one", "zero", "four"], ["d"], domain=QONNX, signed=0),
        helper.make_node("Quant", ["w", "one", "zero", "four"], ["k"], domain=QONNX, signed=1),
        helper.make_node("Add", ["k", "one"], ["k1"]),
        helper.make_node("MatMul", ["d", "k1"], ["y"]),
    ]
    constants = dict(one=F(1), zero=F(0), four=F(4), w=np.int8([[2], [-3]]))
    path = model(tmp_path / "n.onnx", nodes, constants, (2,), (1,))
    np.testing.assert_array_equal(run(load(path), F([[5, 20]])), F([[15 - 2 * 15]]))
