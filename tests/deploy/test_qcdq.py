"""QCDQ and plain ONNX in onnxruntime, all optimizations on, against an executor of graphs in NumPy."""

import itertools
import json

import numpy as np
import pytest

from qflax.deploy.onnx_model import to_onnx_float
from qflax.deploy.qcdq import to_qcdq
from qflax.errors import UserError
from qflax.numerics import IntegerFormat
from tests.deploy.test_qonnx import (
    BIPOLAR,
    E3M1,
    INTEGERS,
    N4,
    S8,
    S16,
    U4,
    U8,
    Net,
    execute,
    formats_and_ties,
    inputs_of,
    nchw,
    residual_net,
)

pytestmark = pytest.mark.exact

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(model, x, folder=None):
    """The output for NHWC images; writes the optimized model into `folder`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # That an optimized model fits this processor alone is known.
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, {"input": np.ascontiguousarray(nchw(x))})[0]


@pytest.mark.parametrize(("activations", "weights"), [*INTEGERS, (U8, S8), (S16, IntegerFormat(bits=10))])
@pytest.mark.parametrize("batch", [None, 3])
def test_onnxruntime_executes_as_the_graph_bit_for_bit(activations, weights, batch):
    graph = residual_net(activations, weights)
    x = inputs_of(graph, 3)
    np.testing.assert_array_equal(run(to_qcdq(graph, batch), x), execute(graph, x))


@pytest.mark.parametrize("activations", [U4, U8, S16])
def test_a_layer_alone_is_of_no_kernel_that_rounds_its_inputs(activations, tmp_path):
    """onnxruntime knows one for weights of 8 bits whose scale nothing else has."""
    net = Net(64)
    y = net.add("dense", net.quantize("input", activations, np.float32(0.1)), net.weights((64, 10), N4))
    graph = net.graph(y)
    x = np.random.default_rng(1).normal(size=(20, 64)).astype(np.float32) * 1000
    np.testing.assert_array_equal(run(to_qcdq(graph), x, tmp_path), execute(graph, x))
    operations = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "MatMul" in operations and "MatMulNBits" not in operations


def test_model_is_valid_plain_onnx():
    model = to_qcdq(residual_net(U4, N4))
    onnx.checker.check_model(model, full_check=True)
    assert [of.domain for of in model.opset_import] == [""]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    properties = json.loads({entry.key: entry.value for entry in model.metadata_props}["qflax"])
    assert properties["accumulator_bits"] == {"block/conv1/Conv": 14, "classifier/MatMul": 20}


def test_weights_are_stored_as_integers():
    model = to_qcdq(residual_net(U4, N4))
    stored = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    kernels = [tensor for tensor in stored if len(tensor.dims) != 3]  # The others are scales of channels.
    assert {tensor.data_type for tensor in kernels} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("rounding", ["half_even", "floor", "ceil", "toward_zero"])
@pytest.mark.parametrize("bits", range(1, 10))
def test_every_integer_format_on_ties_and_beyond_its_range(bits, rounding):
    formats, x = formats_and_ties(bits)
    net = Net(len(x))
    parts = [
        net.quantize("input", fmt, 1, zero_point, rounding)
        for fmt in formats
        for zero_point in ((0,) if fmt.bipolar else (0, 3))
    ]
    graph = net.graph(net.add("concatenate", *parts, axis=1))
    np.testing.assert_array_equal(run(to_qcdq(graph), x[None]), execute(graph, x[None]))


@pytest.mark.parametrize("operation", ["multiply", "divide"])
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("activations", [U8, S8, U4])
def test_scales_stay_behind_products_of_matrices(tmp_path, activations, outputs, operation):
    net = Net(1500)
    x = net.quantize("input", activations, np.float32(0.3))
    total = net.add("dense", x, net.weights((1500, outputs), S8))
    graph = net.graph(net.add(operation, total, np.float32(0.0123)))
    x = inputs_of(graph, 4)
    np.testing.assert_array_equal(run(to_qcdq(graph), x, tmp_path), execute(graph, x))
    assert float_sums(tmp_path) == ["MatMul"]


@pytest.mark.parametrize("fmt", [U8, S8, BIPOLAR])
@pytest.mark.parametrize("layer", ["conv", "dense", "sum_pool"])
@pytest.mark.parametrize("scale", [1, 0.37])
def test_sums_stay_in_float32(tmp_path, layer, fmt, scale):
    """Sums of pairs of 8-bit products saturate at 16 bits on processors without the newest instructions."""
    net = Net(6, 6, 32)
    x = net.quantize("input", fmt, np.float32(0.3))
    if layer == "conv":
        y = net.conv(x, net.weights((3, 3, 32, 4), S8))
    elif layer == "dense":
        y = net.add("dense", x, net.weights((32, 4), S8))
    else:
        y = net.add("sum_pool", x, window=(3, 3), strides=(2, 2), padding=((1, 1), (0, 1)))
    y = net.add("multiply", net.quantize(y, S8, np.float32(scale)), np.float32(0.1))
    graph = net.graph(y)
    x = inputs_of(graph, 4)
    np.testing.assert_array_equal(run(to_qcdq(graph), x, tmp_path), nchw(execute(graph, x)))
    assert float_sums(tmp_path) == ["MatMul" if layer == "dense" else "Conv"]


def float_sums(folder):
    """Operations of an optimized model that add up products."""
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    return [node.op_type for node in nodes if "MatMul" in node.op_type or "Conv" in node.op_type]


def test_minifloats_are_refused():
    net = Net(4)
    graph = net.graph(net.quantize("input", E3M1, layer="stem/input"))
    with pytest.raises(UserError, match="^stem/input: QCDQ has no minifloats; export to qonnx or a packed"):
        to_qcdq(graph)


def layout_graphs():
    """Graphs of one or two operations that meet NHWC in other ways than convolutions do."""
    shape, rng = (4, 5, 6), np.random.default_rng(0)
    nets = {}

    def case(name, build, shape=shape):
        net = Net(*shape)
        nets[name] = net.graph(build(net))

    for operand in [(6,), (5, 1), (5, 6), (4, 1, 6), (1, 4, 1, 1), (1,), ()]:
        array = rng.integers(1, 9, operand).astype(np.float32)
        case(f"subtract {operand}", lambda net, a=array: net.add("subtract", a, "input"))
    for axes in itertools.chain.from_iterable(itertools.combinations((1, 2, 3), n) for n in (1, 2, 3)):
        case(f"sum {axes}", lambda net, a=axes: net.add("sum", "input", axes=a))
        case(f"max {axes}", lambda net, a=axes: net.add("max", "input", axes=a))
    for p in itertools.permutations((1, 2, 3)):
        case(f"transpose {p}", lambda net, p=p: net.add("transpose", "input", permutation=(0, *p)))
    for sizes in [(120,), (20, 6), (5, 4, 6), (2, 2, 5, 6)]:
        case(f"reshape {sizes}", lambda net, s=sizes: net.add("reshape", "input", shape=(-1, *s)))
    for sizes in [(120,), (20, 6), (2, 2, 5, 6)]:
        back = {"shape": (-1, 6, 5, 4)}
        case(f"reshape from {sizes}", lambda net, b=back: net.add("reshape", "input", **b), sizes)
    case("dense", lambda net: net.add("dense", "input", rng.integers(-9, 9, (6, 3))))
    case("dense 3", lambda net: net.add("dense", "input", rng.integers(-9, 9, (6, 3))), (5, 6))
    pads = ((0, 0), (1, 0), (0, 2), (3, 1))
    case("pad", lambda net: net.add("pad", "input", padding=pads))
    bounds = {"start": (0, 1, 0, 2), "stop": (None, None, 4, 5), "step": (1, 2, 1, 2)}
    case("slice", lambda net: net.add("slice", "input", **bounds))
    case("concatenate", lambda net: net.add("concatenate", "input", "input", axis=2))
    pool = {"window": (3, 2), "strides": (2, 1), "padding": ((1, 0), (1, 1))}
    case("sum_pool", lambda net: net.add("sum_pool", "input", **pool))
    case("max_pool", lambda net: net.add("max_pool", "input", **pool))
    case("power", lambda net: net.add("power", "input", exponent=3))
    case("nothing", lambda net: "input")
    dilated = {"strides": (1, 2), "padding": ((2, 1), (0, 3)), "dilation": (2, 1), "groups": 3}
    kernel = rng.integers(-4, 5, (3, 2, 2, 9))
    case("conv", lambda net: net.add("conv", "input", kernel, **dilated))
    return nets


@pytest.mark.parametrize("name", layout_graphs())
@pytest.mark.parametrize("batch", [None, 3])
def test_layouts(name, batch):
    graph = layout_graphs()[name]
    x = np.random.default_rng(1).integers(-9, 10, (3, *graph.shape)).astype(np.float32)
    np.testing.assert_array_equal(run(to_onnx_float(graph, batch), x), nchw(execute(graph, x)))


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "logistic", "erf", "sqrt", "rsqrt", "sin", "cos"])
def test_functions(name):
    net = Net(4, 3)
    graph = net.graph(net.add(name, "input"))
    x = np.random.default_rng(1).uniform(0.1, 3, (2, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(run(to_onnx_float(graph), x), execute(graph, x), 1e-5)


def test_plain_onnx_has_no_quantizers():
    with pytest.raises(UserError, match="^stem/input: plain ONNX has no quantizers"):
        to_onnx_float(residual_net(U4, N4))
