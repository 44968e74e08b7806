"""QONNX against an executor of graphs in NumPy, bit for bit where arithmetic is exact."""

import json
import math
import warnings

import numpy as np
import pytest

from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.qonnx import to_qonnx
from qflax.errors import UserError
from qflax.numerics import IntegerFormat, MinifloatFormat

pytestmark = pytest.mark.exact

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of packages that qonnx imports.
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.cleanup import cleanup_model

U1, U4, U8 = (IntegerFormat(bits=bits, signed=False) for bits in (1, 4, 8))
BIPOLAR, S8, S16 = (IntegerFormat(bits=bits) for bits in (1, 8, 16))
N2, N4, N8 = (IntegerFormat(bits=bits, narrow=True) for bits in (2, 4, 8))
E3M1, E2M1 = (
    MinifloatFormat(exponent_bits=3, mantissa_bits=1),
    MinifloatFormat(exponent_bits=2, mantissa_bits=1),
)
E4M3 = MinifloatFormat(exponent_bits=4, mantissa_bits=3, specials="nan")


class Net:
    """A graph in the making."""

    def __init__(self, *shape, seed=0):
        self.shape, self.nodes, self.constants = shape, [], {}
        self.rng = np.random.default_rng(seed)

    def constant(self, array, fmt=None, bits=None):
        name = f"constant{len(self.constants)}"
        array = np.asarray(array, np.float32)
        self.constants[name] = Constant(array=array, format=fmt, accumulator_bits=bits)
        return name

    def weights(self, shape, fmt, bits=None):
        if isinstance(fmt, MinifloatFormat):
            array = self.rng.choice(fmt.values, shape) * self.rng.choice([-1, 1], shape)
        else:
            codes = [-1, 1] if fmt.bipolar else np.arange(fmt.lowest, fmt.highest + 1)
            array = self.rng.choice(codes, shape)
        return self.constant(array, fmt, bits)

    def add(self, operation, *inputs, layer="", **attributes):
        inputs = tuple(x if isinstance(x, str) else self.constant(x) for x in inputs)
        output = f"value{len(self.nodes)}"
        node = Node(operation=operation, inputs=inputs, output=output, attributes=attributes, layer=layer)
        self.nodes.append(node)
        return output

    def quantize(self, x, fmt, scale=1, zero_point=0, rounding="half_even", **options):
        grid = (scale, zero_point) if isinstance(fmt, IntegerFormat) else (scale,)
        return self.add("quantize", x, *grid, format=fmt, rounding=rounding, **options)

    def conv(self, x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=1, layer=""):
        return self.add(
            "conv", x, kernel, strides=strides, padding=padding, dilation=dilation, groups=groups, layer=layer
        )

    def graph(self, output, **metadata):
        return Graph(
            input="input",
            shape=self.shape,
            output=output,
            nodes=tuple(self.nodes),
            constants=self.constants,
            metadata=metadata,
        )


def execute(graph, x):
    """The output of a graph, as the table in `qflax.deploy.graph` says; sums in float64."""
    values = {graph.input: x, **{name: constant.array for name, constant in graph.constants.items()}}
    for node in graph.nodes:
        inputs = [values[name] for name in node.inputs]
        y = EXECUTE[node.operation](*inputs, **node.attributes)
        values[node.output] = np.asarray(y, np.float32)
    return values[graph.output]


def _quantize(x, scale, zero_point=0, *, format, rounding):
    u = x / scale
    if isinstance(format, MinifloatFormat):
        return nearest(format, u)
    u = u + zero_point
    if format.bipolar:
        return np.where(u >= 0, 1, -1)
    rounded = {"half_even": np.round, "floor": np.floor, "ceil": np.ceil, "toward_zero": np.trunc}[rounding](
        u
    )
    return np.clip(rounded, format.lowest, format.highest) - zero_point


def nearest(fmt, u):
    """The nearest number of a format; of two, the one of even pattern."""
    values, magnitude = fmt.values, np.abs(u).astype(np.float64)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    down, up = magnitude - values[above - 1], values[above] - magnitude
    code = np.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)
    return np.copysign(values[code], u)


def _windows(x, window, strides, padding, dilation=(1, 1), value=0.0):
    """[batch, height', width', channels, window height, window width]"""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)), constant_values=value)
    span = [d * (n - 1) + 1 for d, n in zip(dilation, window, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, span, (1, 2))
    return windows[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


def _conv(x, kernel, strides, padding, dilation, groups):
    windows = _windows(x, kernel.shape[:2], strides, padding, dilation)
    parts = zip(np.split(windows, groups, 3), np.split(kernel.astype(np.float64), groups, 3), strict=True)
    return np.concatenate([np.einsum("bhwcij,ijco->bhwo", *part) for part in parts], -1)


def _max_pool(x, window, strides, padding):
    return _windows(x, window, strides, padding, value=-np.inf).max((4, 5))


def _sum_pool(x, window, strides, padding):
    return _windows(x, window, strides, padding).sum((4, 5))


def _slice(x, start, stop, step):
    return x[tuple(slice(*bounds) for bounds in zip(start, stop, step, strict=True))]


def _power(x, exponent):
    return math.prod([x] * exponent)


EXECUTE = {
    "quantize": _quantize,
    "conv": _conv,
    "dense": lambda x, kernel: x.astype(np.float64) @ kernel.astype(np.float64),
    **{name: getattr(np, name) for name in ("multiply", "divide", "add", "subtract", "maximum", "minimum")},
    **{
        name: getattr(np, name) for name in ("negative", "absolute", "floor", "ceil", "round", "sign", "sqrt")
    },
    **{name: getattr(np, name) for name in ("exp", "log", "tanh", "sin", "cos", "concatenate")},
    "concatenate": lambda *inputs, axis: np.concatenate(inputs, axis),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select": lambda which, a, b: np.where(which > 0, a, b),
    "power": _power,
    "max_pool": _max_pool,
    "sum_pool": _sum_pool,
    "sum": lambda x, axes: x.astype(np.float64).sum(axes),
    "max": lambda x, axes: x.max(axes),
    "pad": lambda x, padding: np.pad(x, padding),
    "slice": _slice,
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, permutation: x.transpose(permutation),
}


def residual_net(activations, weights, classifier=N8, seed=0):
    """A small residual network: all strides, paddings, kinds of shortcuts and pools."""
    net = Net(9, 8, 3, seed=seed)
    scales = net.rng.uniform(0.5, 2, (8, 1)).astype(np.float32)[..., 0]
    x = net.quantize("input", U8, np.float32(0.37), 11.0, layer="stem/input")
    x = net.conv(x, net.weights((3, 3, 3, 8), N8), (2, 2), ((0, 1), (1, 1)), layer="stem/conv")
    x = net.add("add", net.add("multiply", x, scales / 300, layer="stem"), scales, layer="stem/bias")
    x = net.add("maximum", x, 0.0)
    x = net.quantize(x, activations, np.float32(0.1), layer="stem/output")
    y = net.conv(x, net.weights((3, 3, 4, 8), weights, 14), groups=2, layer="block/conv1")
    y = net.add("multiply", y, scales / 100)
    y = net.quantize(y, activations, scales / 8, layer="block/conv1")
    y = net.conv(
        y, net.weights((3, 2, 8, 16), weights), (2, 1), ((1, 1), (0, 1)), (1, 1), layer="block/conv2"
    )
    y = net.add("multiply", y, np.float32(0.3))
    shortcut = net.add("slice", x, start=(0,) * 4, stop=(None,) * 4, step=(1, 2, 1, 1))
    shortcut = net.add("pad", shortcut, padding=((0, 0), (0, 0), (0, 0), (4, 4)))
    x = net.add("add", net.add("multiply", shortcut, np.float32(0.1)), y)
    x = net.quantize(net.add("maximum", 0.0, x), activations, np.float32(0.2), layer="block/output")
    pooled = net.add("max_pool", x, window=(3, 3), strides=(2, 1), padding=((1, 1), (1, 1)))
    picked = net.add("slice", x, start=(0,) * 4, stop=(None,) * 4, step=(1, 2, 1, 1))
    total = net.add("sum", net.add("concatenate", pooled, picked, axis=3), axes=(1, 2))
    if isinstance(activations, IntegerFormat):
        fmt = IntegerFormat(bits=8, signed=activations.signed)
        total = net.quantize(total, fmt, 4.0, rounding="floor", layer="pool")
    y = net.add("dense", total, net.weights((32, 5), classifier, 20), layer="classifier")
    bias = net.rng.integers(-5000, 5000, 5), IntegerFormat(bits=32)
    y = net.add("add", y, net.constant(*bias) if classifier is N8 else net.weights((5,), classifier))
    return net.graph(net.add("multiply", y, np.float32(0.013)))


INTEGERS = [
    (U4, N4),
    (U1, N2),
    (S8, S8),
    (U8, BIPOLAR),
    (BIPOLAR, N4),
    (IntegerFormat(bits=3), U4),
    (S16, N2),
]
MINIFLOATS = [(E3M1, E3M1), (E2M1, E3M1), (E3M1, E2M1)]


def nchw(x):
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def run_qonnx(graph, x, transform=None):
    model = ModelWrapper(to_qonnx(graph, len(x)))
    model = transform(model) if transform else model
    feed = {model.graph.input[0].name: np.ascontiguousarray(nchw(x))}
    return execute_onnx(model, feed)[model.graph.output[0].name]


def inputs_of(graph, batch=2):
    return np.random.default_rng(1).uniform(-40, 60, (batch, *graph.shape)).astype(np.float32)


@pytest.mark.parametrize(("activations", "weights"), INTEGERS + MINIFLOATS)
def test_qonnx_executes_as_the_graph_bit_for_bit(activations, weights):
    graph = residual_net(activations, weights, weights if activations in (E3M1, E2M1) else N8)
    x = inputs_of(graph)
    np.testing.assert_array_equal(run_qonnx(graph, x), execute(graph, x))


@pytest.mark.parametrize(("activations", "weights"), [(U4, N4), (E3M1, E3M1)])
def test_cleanup_and_datatype_inference_change_no_number(activations, weights):
    graph = residual_net(activations, weights, weights if activations is E3M1 else N8)
    x = inputs_of(graph, 1)
    y = run_qonnx(graph, x, lambda model: cleanup_model(model).transform(InferDataTypes()))
    np.testing.assert_array_equal(y, execute(graph, x))


def test_tools_see_integer_types_at_every_sum():
    model = ModelWrapper(to_qonnx(residual_net(U4, N4))).transform(InferDataTypes())
    types = {
        node.name: [model.get_tensor_datatype(name).name for name in (*node.input, *node.output)]
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul")
    }
    assert types == {
        "stem/conv/Conv": ["INT32", "INT8", "INT32"],
        "block/conv1/Conv": ["UINT4", "INT4", "INT32"],
        "block/conv2/Conv": ["UINT4", "INT4", "INT32"],
        "classifier/MatMul": ["FLOAT32", "INT8", "FLOAT32"],  # Nothing is inferred for Trunc.
    }


def test_model_is_valid_and_says_what_readers_need():
    graph = residual_net(U4, N4)
    probe = {"count": 2, "low": 0.0, "high": 1.0, "outputs": [[1.5]], "sums": [[0, 3]]}
    graph.metadata["probe"] = probe
    model = to_qonnx(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10 and model.producer_name == "qflax"
    assert {of.domain: of.version for of in model.opset_import} == {"": 20, "qonnx.custom_op.general": 2}
    properties = json.loads({entry.key: entry.value for entry in model.metadata_props}["qflax"])
    del probe["sums"]
    assert properties == {
        "shape": [9, 8, 3],
        "accumulator_bits": {"block/conv1/Conv": 14, "classifier/MatMul": 20},
        "probe": probe,
    }
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    outputs = {name for node in model.graph.node for name in node.output} - {"output"}
    assert shapes.keys() == outputs
    assert all(dim.dim_value > 0 for shape in shapes.values() for dim in shape.dim)
    assert [node.op_type for node in model.graph.node].count("Trunc") == 1
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} < used


def formats_and_ties(bits):
    """Integer formats of a width, and quarters of integers within and beyond their ranges."""
    formats = [
        IntegerFormat(bits=bits, signed=signed, narrow=narrow)
        for signed, narrow in ((False, False), (True, False), (True, True))
        if bits > 1 or not narrow
    ]
    return formats, np.arange(-(2.0 ** (bits + 1)), 2.0 ** (bits + 1), 0.25, np.float32)


@pytest.mark.filterwarnings("ignore:numpy.fix is deprecated:DeprecationWarning")  # Of qonnx.
@pytest.mark.parametrize("rounding", ["half_even", "floor", "ceil", "toward_zero"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_integer_format_on_ties_and_beyond_its_range(bits, rounding):
    formats, x = formats_and_ties(bits)
    net = Net(len(x))
    parts = [net.quantize("input", fmt, 1, 0 if fmt.bipolar else 3, rounding) for fmt in formats]
    graph = net.graph(net.add("concatenate", *parts, axis=1))
    np.testing.assert_array_equal(run_qonnx(graph, x[None]), execute(graph, x[None]))


@pytest.mark.parametrize("scale", [2, 8, 3, 0.5])
@pytest.mark.parametrize("fmt", [U8, S8, N4])
def test_truncation_keeps_the_numbers(fmt, scale):
    x = np.arange(-3000, 3000, dtype=np.float32)
    net = Net(len(x))
    source = IntegerFormat(bits=12, signed=fmt.signed)
    y = net.quantize(net.quantize("input", source), fmt, scale, rounding="floor")
    graph = net.graph(y)
    operations = [node.op_type for node in to_qonnx(graph).graph.node]
    assert operations == ["Quant", "Div", "Trunc" if scale in (2, 8) else "Quant"]
    np.testing.assert_array_equal(run_qonnx(graph, x[None]), execute(graph, x[None]))


@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
def test_choices_between_arrays_and_numbers(shape):
    net, x = Net(*shape), np.random.default_rng(0).integers(-3, 4, (2, *shape)).astype(np.float32)
    channels = np.arange(shape[-1], dtype=np.float32)
    y = net.add("select", net.add("subtract", "input", 1.0), "input", channels)
    y = net.add("select", y, -7.0, net.add("select", channels % 2, y, "input"))
    graph = net.graph(y)
    np.testing.assert_array_equal(run_qonnx(graph, x), nchw(execute(graph, x)))


FORMATS = {
    "e4m3": E4M3,
    "e5m2": MinifloatFormat(exponent_bits=5, mantissa_bits=2, specials="ieee"),
    "e4m3fnuz": MinifloatFormat(exponent_bits=4, mantissa_bits=3, bias=8, specials="fnuz"),
    **{
        f"e{e}m{m}": MinifloatFormat(exponent_bits=e, mantissa_bits=m)
        for e, m in ((3, 1), (2, 1), (3, 2), (2, 3), (3, 0), (1, 2), (5, 10))
    },
    "overflowing e4m3": MinifloatFormat(exponent_bits=4, mantissa_bits=3, specials="nan", saturate=False),
    "overflowing e5m2": MinifloatFormat(exponent_bits=5, mantissa_bits=2, specials="ieee", saturate=False),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_minifloats_are_qflax_own_on_values_ties_and_neighbours(fmt):
    points = np.concatenate(
        [fmt.values, (fmt.values[1:] + fmt.values[:-1]) / 2, fmt.max * np.array([1.01, 1.1, 8])]
    )
    points = points.astype(np.float32)
    x = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    )
    x = np.concatenate([x, -x])
    net = Net(len(x))
    graph = net.graph(net.quantize("input", fmt))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Of qonnx' powers, infinities and subnormals.
        y = run_qonnx(graph, x[None])[0]
    np.testing.assert_array_equal(y, fmt.unscaled(x))


def test_sums_of_minifloats_that_float32_holds():
    net = Net(5, 5, 16)
    x = net.quantize("input", E4M3, np.float32(3.7))
    y = net.conv(x, net.weights((3, 3, 16, 4), E2M1))
    y = net.quantize(net.add("multiply", y, np.float32(0.37)), E4M3, np.float32(0.5))
    graph = net.graph(net.add("multiply", y, np.float32(0.11)))
    x = inputs_of(graph)
    np.testing.assert_array_equal(run_qonnx(graph, x), nchw(execute(graph, x)))


@pytest.mark.parametrize("field", ["signed", "subnormals"])
def test_minifloats_that_qonnx_lacks_are_refused(field):
    net = Net(4)
    fmt = MinifloatFormat(exponent_bits=3, mantissa_bits=1, **{field: False})
    graph = net.graph(net.quantize("input", fmt, layer="block/output"))
    with pytest.raises(UserError, match="^block/output: QONNX has no minifloats without"):
        to_qonnx(graph)


def test_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(
        UserError, match=r"^onnx: not installed; run pip install -e '\.\[export\]' in the folder of qflax$"
    ):
        to_qonnx(residual_net(U4, N4))
