"""Exports are written once they are known to compute what was trained."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from networks import SHAPE, images, value

from qflax.deploy import exporting, packed
from qflax.deploy.exporting import export
from qflax.deploy.lowering import evaluate, lower
from qflax.deploy.probe import probe_input
from qflax.deploy.runner import IntegerRunner, enough_bits, execute
from qflax.deploy.table import layer_table
from qflax.errors import UserError
from qflax.layers import Dense
from qflax.linen import quantize
from qflax.quantizers import Quantization, Uniform, calibrate
from qflax.verify import verify

pytestmark = pytest.mark.exact


@pytest.mark.thorough
def test_a_packed_file_runs_without_what_made_it(tmp_path, trained):
    function, variables = trained("int4")
    result = export(function, variables, SHAPE, tmp_path / "file", format="packed", metadata={"step": 3})
    assert result.exact and result.difference == 0
    x = images(10)
    y = IntegerRunner(packed.load(tmp_path / "file"))(x)
    np.testing.assert_array_equal(y, jax.jit(function)(variables, x))


@pytest.mark.thorough
def test_the_probe_tells_what_was_trained(tmp_path, trained):
    function, variables = trained("a2q+")
    export(function, variables, SHAPE, tmp_path / "file", format="packed", metadata={"step": 3})
    graph = packed.load(tmp_path / "file")
    probe = graph.metadata["probe"]
    x = probe_input(SHAPE, probe["low"], probe["high"])
    assert graph.metadata["step"] == 3 and x.shape == (2, *SHAPE) and set(np.unique(x)) <= set(range(256))
    np.testing.assert_array_equal(np.float32(probe["outputs"]), jax.jit(function)(variables, x))
    names = {graph.nodes[place].operation for place, _ in probe["sums"]}
    assert names == {"quantize"} and sum(total != 0 for _, total in probe["sums"]) > 3


class Wide(nn.Module):
    """Long sums of codes of many bits."""

    bits: int

    @nn.compact
    def __call__(self, x):
        wide = Uniform(bits=self.bits, scale="static")
        policy = Quantization(weights=wide, activations=wide)
        positive = nn.initializers.constant(0.5)
        layer = Dense(2, kernel_init=positive, quantize_input=True, quantization=policy, name="head")
        return value(layer(x / 255))


def test_sums_that_float32_does_not_hold_are_no_error(tmp_path):
    model, x = Wide(14), np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    result = export(model.apply, variables, (16,), tmp_path / "file", format="packed")
    assert not result.exact and "int14" in layer_table(result.graph)
    assert verify(tmp_path / "file").ok


def test_sums_beyond_32_bits_are_exported_exactly(tmp_path):
    model, x = Wide(16), np.full((2, 100_000), 255, np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    result = export(model.apply, variables, (100_000,), tmp_path / "file", format="packed")
    with enough_bits(result.graph):
        codes = execute(result.graph, probe_input((100_000,), 0, 255))[0]
    ((place, total),) = result.graph.metadata["probe"]["sums"]
    assert total == np.asarray(codes[result.graph.nodes[place].output], np.int64).sum() > 2**31
    export(model.apply, variables, (100_000,), tmp_path / "stablehlo", format="stablehlo")
    served = jax.export.deserialize(bytearray((tmp_path / "stablehlo").read_bytes()))
    expected = jax.jit(model.apply)(variables, x)
    run = IntegerRunner(packed.load(tmp_path / "file"))
    for y in (run(x), served.call(x)):
        np.testing.assert_allclose(y, expected, rtol=1e-4)
    assert run.extremes["head"][1] > 2**40


def test_stablehlo_serves_any_batch(tmp_path, trained):
    function, variables = trained("mixed")
    with jax.default_matmul_precision("bfloat16"):
        export(function, variables, SHAPE, tmp_path / "file", format="stablehlo")
    served = jax.export.deserialize(bytearray((tmp_path / "file").read_bytes()))
    for count in (1, 7):
        x = images(count)
        np.testing.assert_array_equal(served.call(x), jax.jit(function)(variables, x))
    text = served.mlir_module()
    # Else accelerators would round the operands of sums in float32.
    assert "i8" in text and "HIGHEST" in text and "DEFAULT" not in text


def test_nothing_is_written_over_or_wrongly(tmp_path, trained, monkeypatch):
    function, variables = trained("int4")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is there already; delete it, or choose another --output"):
        export(function, variables, SHAPE, file, format="packed")
    with pytest.raises(UserError, match="no such folder"):
        export(function, variables, SHAPE, tmp_path / "none" / "file", format="packed")
    with pytest.raises(UserError, match="format='onnx'.*packed, qonnx, qcdq, stablehlo"):
        export(function, variables, SHAPE, tmp_path / "new", format="onnx")
    wrong = {
        "on the probe its outputs would differ": lambda x: function(variables, x * 0.5),
        r"its outputs would be \(2, 1\), and .* are \(2, 4\)": lambda x: function(variables, x)[:, :1],
    }
    for message, other in wrong.items():
        monkeypatch.setattr(exporting, "lower", lambda *_, other=other: lower(other, SHAPE))
        with pytest.raises(UserError, match=f"not written: {message}"):
            export(function, variables, SHAPE, tmp_path / "new", format="packed")
    assert file.read_text() == "mine" and not (tmp_path / "new").exists()


def test_the_table_has_a_line_per_kernel(trained, tmp_path):
    function, variables = trained("a2q+")
    lines = layer_table(export(function, variables, SHAPE, tmp_path / "f", format="packed").graph).split("\n")
    assert [line.split()[0] for line in lines[1:]] == [
        "stem",
        "depthwise",
        "pointwise",
        "hidden",
        "classifier",
    ]
    assert all(line.endswith("12 bits") and " int4 " in line for line in lines[1:])


class Own(nn.Module):
    """A user's arithmetic, which XLA fuses, or divides by a reciprocal for."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        if self.kind == "layer scale":
            x = x + 0.3 * nn.relu(nn.Dense(16)(x))
        x = nn.Dense(8)(x)
        if self.kind == "temperature":
            return x / 0.7
        if self.kind == "scale and shift":
            return x * self.param("scale", nn.initializers.normal(), (8,)) + 0.1
        return nn.hard_silu(x)


@pytest.mark.parametrize("kind", ["temperature", "scale and shift", "layer scale", "hard silu"])
def test_a_network_is_evaluated_as_its_graph_is(kind):
    model = quantize(Own(kind), weights=Uniform(bits=4), activations=Uniform(bits=4))
    x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    function = functools.partial(model.apply, variables)
    graph = lower(function, (12,))
    with jax.disable_jit():
        expected = execute(graph, x)[0][graph.output]
    np.testing.assert_array_equal(evaluate(function, x), expected)


@pytest.mark.parametrize("kind", ["temperature", "scale and shift", "layer scale", "hard silu"])
def test_arithmetic_of_the_user_s_is_exported_operation_by_operation(tmp_path, kind):
    model = quantize(Own(kind), weights=Uniform(bits=4), activations=Uniform(bits=4))
    x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    result = export(
        model.apply, variables, (12,), str(tmp_path / "file"), format="packed", low=-2.0, high=2.0
    )
    assert result.exact and result.difference <= 1e-6  # No code is another one here.
    report = verify(tmp_path / "file")
    assert report.ok and report.probe_difference == 0


@pytest.mark.parametrize("statistic", ["mean", "mse", "kl", "percentile"])
def test_scales_from_any_statistic_of_the_weights_are_the_same_in_every_program(tmp_path, statistic):
    weights = Uniform(bits=4, scale="statistic", statistic=statistic, granularity="per_channel")
    policy = Quantization(weights=weights, activations=Uniform(bits=8, scale="static"))
    model = Dense(64, quantize_input=True, quantization=policy)
    x = np.random.default_rng(0).normal(size=(32, 500)).astype(np.float32)
    variables = calibrate(model, model.init(jax.random.key(0), x), [x])
    result = export(
        lambda v, x: value(model.apply(v, x)),
        *(variables, (500,), tmp_path / "file"),
        **dict(format="packed", low=-2.0, high=2.0),
    )
    assert result.exact and result.difference == 0
