"""A good file is verified; every mutation of it is caught, and the layer named."""

import numpy as np
import pytest

from qflax.cli import main
from qflax.errors import UserError
from qflax.verify import table, verify
from qflax.verify.extremes import width


def bounds(kernel, low, high):
    flat = np.asarray(kernel, np.int64).reshape(-1, np.shape(kernel)[-1])
    positive, negative = np.maximum(flat, 0).sum(0), np.maximum(-flat, 0).sum(0)
    return (low * positive - high * negative), (high * positive - low * negative)


def test_a_good_file(small, tmp_path):
    report = verify(small.save(tmp_path / "n"))
    assert report.ok and report.failures == () and report.dialect == "packed"
    assert report.probe_difference == 0 and report.probe == "2 examples, all outputs are equal"
    conv, dense = report.layers
    assert (conv.layer, conv.kind, conv.depth, conv.weight_bits, conv.inputs) == (
        *("block/conv", "conv", 18, 4),
        (-5, 10),
    )
    low, high = bounds(small.parts["kernel"], -5, 10)
    assert conv.extremes == (low.min(), high.max()) and conv.needed == width(*conv.extremes) <= 12
    assert conv.promised == 12 and conv.holds is True and conv.attained is True and conv.seen is None
    low, high = bounds(small.parts["matrix"], 0, 15)
    bias = small.parts["bias"]
    expected = (low + np.minimum(bias, 0)).min(), (high + np.maximum(bias, 0)).max()
    assert dense.extremes == expected and dense.inputs == (0, 15) and dense.promised == 24
    text = table(report)
    assert "block/conv" in text and "accumulators: 2 of 2 layers of integers proven" in text
    assert text.endswith("\nverified") and "seen" not in text


def test_without_a_promise_it_is_32_bits(small, tmp_path):
    file = small.build()
    del file.graph["constants"][0]["accumulator_bits"]
    report = verify(file.save(tmp_path / "n", small.outputs, small.sums))
    assert report.ok and report.layers[0].promised == 32


def test_a_promise_that_does_not_hold(small, tmp_path):
    needed = verify(small.save(tmp_path / "n")).layers[0].needed
    assert verify(small.save(tmp_path / "n", bits=needed)).ok
    report = verify(small.save(tmp_path / "n", bits=needed - 1))
    assert len(report.failures) == 1 and report.probe_difference == 0
    assert report.failures[0].startswith("block/conv: does not hold: sums of ")
    assert report.failures[0].endswith(f"need {needed} bits, not {needed - 1}")
    assert not report.layers[0].holds and not report.layers[0].attained and report.layers[1].holds
    assert table(report).endswith("NOT verified: 1 failure") and "FAILED: block/conv" in table(report)


def test_one_code_or_bias_beyond_the_bound(small, tmp_path):
    matrix, bias = np.zeros((36, 3), int), np.zeros(3)
    matrix[:34, 0] = 4  # 34 * 4 * 15 = 2040 of at most 2047.

    def classifier():
        report = verify(small.save(tmp_path / "n", matrix=matrix, bias=bias, bits2=12))
        named = any(line.startswith("classifier: does not hold") for line in report.failures)
        assert named != report.layers[1].holds
        return report.layers[1]

    assert classifier().extremes == (0, 2040) and classifier().needed == 12
    matrix[34, 0] = 1
    assert classifier().extremes == (0, 2055) and classifier().needed == 13
    matrix[34, 0], bias[0] = 0, 7
    assert classifier().extremes == (0, 2047) and classifier().holds
    bias[0] = 8
    assert classifier().extremes == (0, 2048) and not classifier().holds
    matrix[0, 1], bias[0], bias[1] = -100, 0, -549
    assert classifier().extremes == (-2049, 2040) and not classifier().holds


MUTATIONS = {
    "zero_point": (dict(zero_point=np.float32(0)), "first different in input"),
    "scale": (dict(scale=np.float32(17.4)), "first different in input"),
    "scale2": (
        dict(scale2=np.float32(0.36)),
        "first different in block/act (computed from block/norm, block/conv)",
    ),
    "factor": (dict(factor=np.float32([0.02, 0.03, 0.012, 0.05])), "computed from block/norm, block/conv"),
    "offset": (dict(offset=np.float32([0.3, 0.1, 0.7, 0.2])), "computed from block/norm, block/conv"),
    "factor2": (dict(factor2=np.float32(0.012300001)), "first different in classifier"),
    "bias": (dict(bias=np.float32([1, 2, 3])), "first different in classifier"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_number_is_caught_and_placed(small, tmp_path, name):
    changes, place = MUTATIONS[name]
    report = verify(small.save(tmp_path / "n", **changes))
    assert not report.ok and len(report.failures) == 1
    assert (
        report.failures[0].startswith("probe: not as the trained network: ") and place in report.failures[0]
    )


def test_a_wrong_code_is_caught(small, tmp_path):
    kernel = small.parts["kernel"].copy()
    kernel[1, 1, 0, 2] += 1 if kernel[1, 1, 0, 2] < 7 else -1
    report = verify(small.save(tmp_path / "n", kernel=kernel))
    assert (
        len(report.failures) == 1
        and "in block/act (computed from block/norm, block/conv)" in report.failures[0]
    )


def test_wrong_sums_alone_are_caught(small, tmp_path):
    sums = [[index, value + 1] for index, value in small.sums]
    report = verify(small.build().save(tmp_path / "n", small.outputs, sums))
    assert not report.ok and "first different in input" in report.failures[0]


def test_outputs_that_are_not_numbers_are_caught(small, tmp_path):
    report = verify(small.save(tmp_path / "n", factor2=np.float32(np.nan)))
    assert not report.ok and np.isnan(report.probe_difference)


@pytest.mark.parametrize("name", ["zero_point", "scale", "scale2"])
def test_a_wrong_number_before_what_is_not_exact_is_caught(small, tmp_path, name):
    """A sigmoid at the end excuses differences behind it alone."""

    def report(**changes):
        file = small.build(**changes)
        file.node("logistic", [file.graph["output"]], "last")
        outputs = (1 / (1 + np.exp(-small.outputs.astype(np.float64)))).astype(np.float32)
        return verify(file.save(tmp_path / "n", outputs, small.sums))

    changes, place = MUTATIONS[name]
    assert report().ok and "outputs are equal" in report().probe
    assert not report(**changes).ok and place in report(**changes).failures[0]


def test_infinite_outputs_must_be_equal_and_excuse_no_others(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx_models import model

    F = np.float32
    nodes = [
        onnx.helper.make_node("Mul", ["x", "zero"], ["n"]),
        onnx.helper.make_node("Add", ["n", "c"], ["a"]),
        onnx.helper.make_node("MatMul", ["a", "k"], ["y"]),
    ]
    path, kernel = tmp_path / "n.onnx", F([[1, 0]] * 3)
    for c, ok in ((F([3e38, 3e38, -3e38]), False), (F([np.inf, 1, 1]), True)):
        model(path, nodes, dict(zero=F(0), c=c, k=kernel), (3,), (2,))
        report = verify(path)
        assert report.ok == ok, report
        assert ok or "other outputs are not finite" in report.failures[0]


def test_accuracy_and_what_was_seen(small, tmp_path):
    images = np.random.default_rng(5).integers(0, 256, (230, *small.shape)).astype(np.uint8)
    outputs, _ = small.execute(images.astype(np.float32))
    sums = small.seen["classifier"]
    labels = outputs.argmax(-1)
    labels[:23] = (labels[:23] + 1) % 3
    report = verify(small.save(tmp_path / "n"), images, labels)
    assert report.ok and report.accuracy == pytest.approx(207 / 230) and report.examples == 230
    low, high = report.layers[1].seen
    products = sums - small.parts["bias"]
    assert (low, high) == (min(sums.min(), products.min()), max(sums.max(), products.max()))
    low, high = report.layers[0].seen
    assert report.layers[0].extremes[0] <= low < high <= report.layers[0].extremes[1]
    assert "accuracy: 90.00% of 230 images" in table(report) and "seen" in table(report)
    with pytest.raises(UserError, match=r"takes images of \[6, 6, 2\], uint8"):
        verify(tmp_path / "n", images[:, :5], labels)


def test_bits_can_be_asked_for_beside_the_promise(small, tmp_path, capsys):
    path = small.save(tmp_path / "n", bits=22, bits2=24)
    first, second = (layer.needed for layer in verify(path).layers)
    assert first < second < 22
    for bits, promised, failures in [
        (30, [22, 24], []),
        (second, [second] * 2, []),
        (second - 1, [second - 1] * 2, ["classifier"]),
        (first, [first] * 2, ["classifier"]),
        (first - 1, [first - 1] * 2, ["block/conv", "classifier"]),
    ]:
        report = verify(path, bits=bits)
        assert [layer.promised for layer in report.layers] == promised
        assert [line.split(":")[0] for line in report.failures] == failures
        assert main(["verify", str(path), f"--accumulator_bits={bits}"]) == bool(failures)
    assert f"need {first} bits, not {first - 1}" in capsys.readouterr().out
    file = small.build()
    del file.graph["constants"][0]["accumulator_bits"]
    report = verify(file.save(tmp_path / "m", small.outputs, small.sums), bits=40)
    assert [layer.promised for layer in report.layers] == [40, 24]
    for bits in (1, 65):
        assert main(["verify", str(path), f"--accumulator_bits={bits}"]) == 2
        assert capsys.readouterr().err == f"error: accumulator_bits={bits}: an accumulator has 2 to 64\n"


def test_where_data_is_is_told_for_nothing_without_them(small, tmp_path, capsys):
    assert main(["verify", str(small.save(tmp_path / "n")), "--data_dir=x"]) == 2
    assert capsys.readouterr().err == "error: --data_dir: is for --data, which is missing\n"


@pytest.mark.parametrize("place", ["Analysis._dense", "_measure"])
def test_what_is_not_foreseen_of_a_file_is_one_line(small, tmp_path, monkeypatch, capsys, place):
    def fail(*_):
        raise ValueError("operands\ncould not be broadcast")

    path = small.save(tmp_path / "n")
    monkeypatch.setattr(f"qflax.verify.checks.{place}", fail)
    images = np.zeros((2, *small.shape), np.uint8)
    with pytest.raises(UserError, match="could not be broadcast") as error:
        verify(path, images, np.zeros(2, int))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert ("integers at dense of 'classifier'" in str(error.value)) == (place != "_measure")


def test_data_for_sums_that_no_accumulator_holds(packed, tmp_path):
    """They are found to be too many, whatever is seen of them."""
    file, wide = packed((4, 4, 1)), {"kind": "integer", "bits": 32, "signed": False, "narrow": False}
    kernel = file.stored((4, 4, 1, 2), [2**31] * 32, 32, wide)
    one, zero = file.floats(1.0), file.floats(0.0)
    x = file.node("quantize", [0, one, zero], format=wide, rounding="half_even")
    valid = dict(strides=[1, 1], padding=[[0, 0], [0, 0]], dilation=[1, 1], groups=1)
    file.node("reshape", [file.node("conv", [x, kernel], "conv", **valid)], shape=[-1, 2])
    path = file.save(tmp_path / "n", [[0.0, 0.0]], high=0.0)
    report = verify(path, np.full((2, 4, 4, 1), 9, np.uint8), np.zeros(2, int))
    assert report.layers[0].needed > 64 and report.layers[0].seen == (0, 0)
    assert len(report.failures) == 1 and "need 69 bits, not 32" in report.failures[0]


@pytest.mark.parametrize("error, ok", [(0.0, True), (5e-5, True), (2e-4, False)])
def test_float_sums_have_a_tolerance(packed, probe, tmp_path, error, ok):
    file, matrix = packed((3,)), np.float32([[0.1, 0.7], [0.3, -0.2], [-0.9, 0.4]])
    file.node("dense", [0, file.floats(matrix)], "head")
    outputs = (probe(1, (3,)).astype(np.float64) @ matrix).astype(np.float32)
    outputs[0, 0] += error * np.abs(outputs).max()
    report = verify(file.save(tmp_path / "n", outputs))
    assert report.ok == ok
    assert (error == 0) == (report.probe == "1 examples, all outputs are equal")
    assert error == 0 or "as dense of 'head' is not exact" in report.probe
    layer = report.layers[0]
    assert layer.kind == "dense" and layer.depth == 3 and layer.needed is None and layer.promised is None
    text = table(report)
    assert "accumulators: 0 of 0 layers of integers proven; 1 other layers" in text
    nothing = "agrees with what was recorded; no layer of integers, so nothing was proven"
    assert text.endswith(f"\n{nothing if ok else 'NOT verified: 1 failure'}")


def test_a_proof_can_be_required(packed, small, tmp_path, capsys):
    assert verify(small.save(tmp_path / "n"), require_proof=True).ok
    file = packed((3,))
    file.node("dense", [0, file.floats(np.zeros((3, 2)))], "head")
    path = file.save(tmp_path / "n", [[0.0, 0.0]])
    assert verify(path).ok
    report = verify(path, require_proof=True)
    assert report.failures == ("head: a proof is required, but it does not sum integers of a known range",)
    assert main(["verify", str(path)]) == 0 and main(["verify", str(path), "--require_proof"]) == 1
    assert capsys.readouterr().out.endswith("\nNOT verified: 1 failure\n")
    file = packed((1,))
    file.node("sign", [0])
    report = verify(file.save(tmp_path / "n", [[1.0]]), require_proof=True)
    assert report.failures == ("there is no layer to prove anything of",)


def test_a_promise_for_sums_of_floats(packed, tmp_path):
    file = packed((3,))
    file.node("dense", [0, file.integers(np.ones((3, 2)), 4, accumulator_bits=16)], "head")
    report = verify(file.save(tmp_path / "n", [[0.0, 0.0]]))
    expected = "head: 16 bits are promised, but it does not sum integers of a known range"
    assert expected in report.failures
