"""What is exported is proved by the verifier, and what was tampered with is not."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import pytest
from networks import INPUT, INTEGER, LAYERS, POLICIES, SHAPE, images

from qflax.deploy import packed
from qflax.deploy.exporting import export
from qflax.deploy.table import layer_table
from qflax.errors import UserError
from qflax.layers import Conv, Dense, DenseGeneral, Einsum, Quantize, layer_costs
from qflax.quantizers import (
    AccumulatorAware,
    IntegerBias,
    MixedPrecision,
    Quantization,
    Rule,
    Uniform,
    calibrate,
    freeze_widths,
)
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


@pytest.mark.parametrize("format", ["packed", *ONNX])
@pytest.mark.parametrize("spec", [Uniform(bits=3, granularity="per_channel"), MixedPrecision(bits=3)])
def test_weights_that_have_frozen_are_exported_where_they_stand(tmp_path, spec, format):
    if format in ONNX:
        pytest.importorskip("onnx")
    policy = Quantization(weights=spec, rules=(INPUT,), freeze_oscillating=True)
    model, x = Single(functools.partial(Dense, 3), policy), images(4)[:, 0, 0] / 128 - 1
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    stats = freeze_widths(variables["quantizer_stats"])
    record = stats["layer"]["weights"]["oscillation"]
    record["held"] = np.arange(9).reshape(3, 3) % 2 == 0
    record["code"] = np.float32([[1, 2, -3], [3, 0, -1], [0, 1, 2]])
    variables = {**variables, "quantizer_stats": stats}
    result = export(model.apply, variables, x.shape[1:], tmp_path / "file", format=format, low=-1.0, high=1.0)
    assert verify(tmp_path / "file").ok
    codes = result.graph.constants[kernel_of(result.graph, "layer")].array
    np.testing.assert_array_equal(codes[record["held"]], record["code"][record["held"]])
    np.testing.assert_array_equal(run(load(tmp_path / "file"), x), model.apply(variables, x))


def tampered(file, change):
    """The same packed file with another graph."""
    graph = packed.load(file)
    other = file.with_name("tampered")
    packed.save(change(graph), other)
    return verify(other)


def with_constant(graph, name, change):
    """A graph with one constant changed."""
    constant = graph.constants[name]
    array = change(constant.array.copy())
    return dataclasses.replace(
        graph, constants={**graph.constants, name: dataclasses.replace(constant, array=array)}
    )


def kernel_of(graph, layer):
    return next(n.inputs[1] for n in graph.nodes if n.layer == layer and n.operation in ("conv", "dense"))


def test_a_code_past_the_bound_does_not_hold(tmp_path, trained):
    """12 bits hold 15 times inputs of 8 bits, not 17 times."""
    function, variables = trained("a2q+")
    export(function, variables, SHAPE, tmp_path / "file", format="packed")

    def raised(norm):
        def change(codes):
            channel = codes.reshape(-1, codes.shape[-1])[:, 0]  # A view.
            while np.abs(channel).sum() < norm:
                channel[np.flatnonzero((channel >= 0) & (channel < 7))[0]] += 1
            return codes

        return lambda graph: with_constant(graph, kernel_of(graph, "stem"), change)

    assert [layer.holds for layer in tampered(tmp_path / "file", raised(15)).layers] == [True] * 5
    report = tampered(tmp_path / "file", raised(17))
    assert not report.ok
    assert [layer.layer for layer in report.layers if not layer.holds] == ["stem"]


def test_raw_weights_rounded_instead_of_truncated_do_not_hold(tmp_path, trained):
    function, variables = trained("a2q+")
    export(function, variables, SHAPE, tmp_path / "file", format="packed")

    def rounded(graph):
        for layer in LAYERS:
            kernel = np.asarray(variables["params"][layer]["kernel"])
            scale = np.exp2(variables["quantizer_params"][layer]["weights"]["log2_scale"])
            codes = np.clip(np.round(kernel / scale), -7, 7).astype(np.float32)
            graph = with_constant(graph, kernel_of(graph, layer), lambda _, codes=codes: codes)
        return graph

    report = tampered(tmp_path / "file", rounded)
    assert not report.ok
    assert {"stem", "hidden"} <= {layer.layer for layer in report.layers if not layer.holds}


@pytest.mark.parametrize("what", ["scale", "zero point"])
def test_a_wrong_scale_and_a_missing_zero_point_are_found(tmp_path, trained, what):
    function, variables = trained("zero points")
    export(function, variables, SHAPE, tmp_path / "file", format="packed")

    def change(graph):
        quantizers = [node for node in graph.nodes if node.operation == "quantize"]
        node = next(node for node in quantizers if graph.constants[node.inputs[2]].array != 0)
        if what == "scale":
            return with_constant(graph, node.inputs[1], lambda scale: scale * np.float32(1.01))
        return with_constant(graph, node.inputs[2], np.zeros_like)

    report = tampered(tmp_path / "file", change)
    assert not report.ok and "input" in " ".join(report.failures)


class Single(nn.Module):
    """A quantizer and a layer."""

    layer: Callable[..., nn.Module]
    policy: Quantization

    @nn.compact
    def __call__(self, x):
        layer = self.layer(quantization=self.policy, name="layer")
        return layer(Quantize(quantization=self.policy, name="input")(x)).reshape(len(x), -1)


@pytest.mark.parametrize("rounding", ["half_even", "floor", "ceil", "toward_zero"])
@pytest.mark.parametrize(("bits", "signed"), [(9, True), (10, False), (16, True)])
def test_wide_activations_are_proven_in_every_format(tmp_path, bits, signed, rounding):
    wide = dict(kind="uniform", bits=bits, signed=signed, rounding=rounding, scale="static")
    weights = AccumulatorAware(bits=4, accumulator_bits=20)
    policy = Quantization(weights=weights, rules=(Rule("input", {"activations": wide}),))
    model = Single(functools.partial(Dense, 3), policy)
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    ranges = set()
    for format in ("packed", *ONNX):
        if format in ONNX:
            pytest.importorskip("onnx")
        export(model.apply, variables, (6,), tmp_path / format, format=format, low=-4.0, high=4.0)
        report = verify(tmp_path / format, require_proof=True)
        assert report.ok, report.failures
        ranges.add((report.layers[0].inputs, report.layers[0].extremes))
    assert len(ranges) == 1


BIASED = {
    "conv": functools.partial(Conv, 4, (3, 3)),
    "dense": functools.partial(Dense, 5),
    "dense general": functools.partial(DenseGeneral, (2, 3), axis=(-2, -1)),
    "einsum": functools.partial(Einsum, (3, 4, 2), "bhwc,ckd->bhwkd"),
}


@pytest.mark.parametrize("format", ["packed", *ONNX])
@pytest.mark.parametrize("kind", BIASED)
def test_biases_are_in_the_accumulator_wherever_they_are_added(tmp_path, kind, format):
    """By the cost table, by what `qflax export` prints, and by the verifier."""
    if format in ONNX:
        pytest.importorskip("onnx")
    weights = AccumulatorAware(bits=4, accumulator_bits=12)
    policy = Quantization(weights=weights, biases=IntegerBias(bits=32), rules=(INPUT,))

    model = Single(functools.partial(BIASED[kind], bias_init=nn.initializers.normal(300)), policy)
    x = images(4)[:, :6, :4] / 128 - 1
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    (cost,) = (cost for cost in layer_costs(model, variables, x[:1]) if cost.accumulation)
    bits = cost.accumulation.exact_bits
    assert bits > 12
    result = export(model.apply, variables, x.shape[1:], tmp_path / "file", format=format, low=-1.0, high=1.0)
    assert f"{bits} bits" in layer_table(result.graph).splitlines()[1]
    report = verify(tmp_path / "file")
    assert [layer.needed for layer in report.layers] == [bits] and not report.layers[0].holds
    assert len(report.failures) == 1 and f"need {bits} bits, not 12" in report.failures[0]


def test_biases_that_are_clipped_are_not_exported(tmp_path):
    """Behind weights that are all but zero a bias is too large a multiple of the scale."""
    policy = Quantization(
        weights=Uniform(bits=8, granularity="per_channel", scale="statistic"),
        biases=IntegerBias(bits=32),
        rules=(INPUT,),
    )
    model, x = Single(functools.partial(Dense, 3), policy), images(4)[:, 0, 0] / 128 - 1
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    kernel = variables["params"]["layer"]["kernel"] * np.float32([1, 1, 1e-9])
    variables = {**variables, "params": {"layer": {"kernel": kernel, "bias": np.ones(3, np.float32)}}}
    with pytest.raises(UserError, match="layer: cannot be exported: 1 integer biases are beyond 32 bits"):
        export(model.apply, variables, x.shape[1:], tmp_path / "file", format="packed")
