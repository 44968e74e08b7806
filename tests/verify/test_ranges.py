"""Ranges of integers are followed through everything that keeps them integers, and no further."""

import dataclasses

import numpy as np
import pytest

from qflax.verify import load
from qflax.verify.ranges import Analysis

UINT4 = {"kind": "integer", "bits": 4, "signed": False, "narrow": False}
BIPOLAR = {"kind": "integer", "bits": 1, "signed": True, "narrow": False}
WINDOW = dict(window=[2, 2], strides=[2, 2])
NONE = [[0, 0], [0, 0]]

# Operation, constant, attributes, range of what comes out of -5 ... 10 (zero point 5); None: not integers.
CASES = {
    "max_pool": ("max_pool", None, dict(**WINDOW, padding=NONE), (-5, 10)),
    "sum_pool": ("sum_pool", None, dict(**WINDOW, padding=NONE), (-20, 40)),
    "sum": ("sum", None, dict(axes=[1, 2]), (-80, 160)),
    "max": ("max", None, dict(axes=[1, 2]), (-5, 10)),
    "reshape": ("reshape", None, dict(shape=[-1, 32]), (-5, 10)),
    "transpose": ("transpose", None, dict(permutation=[0, 3, 1, 2]), (-5, 10)),
    "slice": ("slice", None, dict(start=[0, 0, 0, 0], stop=[None] * 4, step=[1, 2, 2, 1]), (-5, 10)),
    "pad": ("pad", None, dict(padding=[[0, 0], [1, 1], [1, 1], [0, 0]]), (-5, 10)),
    "maximum": ("maximum", 0.0, {}, (0, 10)),
    "minimum": ("minimum", 3.0, {}, (-5, 3)),
    "multiply 1": ("multiply", 1.0, {}, (-5, 10)),
    "add": ("add", 5.0, {}, (0, 15)),
    "subtract": ("subtract", [[1.0, 2.0]], {}, (-7, 9)),
    "multiply": ("multiply", 0.3, {}, (-5, 10)),
    "add half": ("add", 0.5, {}, None),
    "maximum half": ("maximum", 0.5, {}, None),
    "multiply negative": ("multiply", -1.0, {}, None),
    "exp": ("exp", None, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_ranges(packed, tmp_path, case):
    operation, operand, attributes, expected = CASES[case]
    file = packed((4, 4, 2))
    numbers = [file.floats(n) for n in (0.7, 5.0, *([] if operand is None else [operand]))]
    codes = file.node("quantize", [0, *numbers[:2]], format=UINT4, rounding="half_even")
    y = file.node(operation, [codes, *numbers[2:]], **attributes)
    size = {"pad": 72, "slice": 8, "max_pool": 8, "sum_pool": 8, "sum": 2, "max": 2}.get(operation, 32)
    analysis = Analysis(load(file.save(tmp_path / "n", np.zeros((1, size)))))
    grid = analysis.grids.get(y)
    assert (grid and (grid.low, grid.high)) == expected
    if expected:
        np.testing.assert_allclose(grid.scale, 0.3 if case == "multiply" else 1)
    assert [node.operation for node in analysis.inexact] == (["exp"] if case == "exp" else [])


def test_joined_integers_and_those_of_two_scales(packed, tmp_path):
    file = packed((4,))
    scale, zero, five, half = (file.floats(n) for n in (0.7, 0.0, 5.0, 0.5))
    a = file.node("quantize", [0, scale, zero], format=UINT4, rounding="half_even")
    b = file.node("quantize", [0, scale, five], format=BIPOLAR, rounding="half_even")
    scaled = file.node("multiply", [a, half])
    joined = file.node("concatenate", [a, b], axis=1)
    added = file.node("add", [a, b])
    mixed = file.node("concatenate", [a, scaled], axis=1)
    different = file.node("add", [a, scaled])
    grids = Analysis(load(file.save(tmp_path / "n", np.zeros((1, 4))))).grids
    assert (grids[b].low, grids[b].high) == (-6, -4)
    assert (grids[joined].low, grids[joined].high) == (-6, 15)
    assert (grids[added].low, grids[added].high) == (-6, 11)
    assert mixed not in grids and different not in grids


def test_sums_beyond_float32_are_not_exact(packed, tmp_path):
    for bits, exact in ((8, True), (16, False)):
        file = packed((600,))
        kernel = file.integers(np.full((600, 1), 127), bits)
        numbers = [file.floats(n) for n in (0.7, 0.0)]
        fmt = dataclasses.asdict(Format(bits=bits))
        x = file.node("quantize", [0, *numbers], format=fmt, rounding="half_even")
        file.node("dense", [x, kernel], "head")
        analysis = Analysis(load(file.save(tmp_path / "n", [[0.0]])))
        assert len(analysis.layers) == 1 and (not analysis.inexact) == exact


@dataclasses.dataclass
class Format:
    bits: int
    kind: str = "integer"
    signed: bool = True
    narrow: bool = False


@pytest.mark.parametrize("scales", ["one", "per_input"])
def test_inputs_behind_a_scale(packed, tmp_path, scales):
    """One scale is that of the sums; one for every input leaves no integers to sum."""
    file = packed((3,))
    kernel = file.integers(np.array([[7, -7], [1, 2], [0, 3]]), 4)
    numbers = [file.floats(n) for n in (0.7, 0.0, 0.3 if scales == "one" else [0.3, 0.4, 0.5])]
    x = file.node("quantize", [0, *numbers[:2]], format=UINT4, rounding="half_even")
    file.node("dense", [file.node("multiply", [x, numbers[2]]), kernel], "head")
    analysis = Analysis(load(file.save(tmp_path / "n", [[0.0, 0.0]])))
    assert len(analysis.layers) == (scales == "one") and len(analysis.inexact) == 1
    if scales == "one":
        assert analysis.layers[0].extremes() == ([0, -105], [120, 75])


def test_a_stack_of_kernels_is_no_layer(packed, tmp_path):
    file = packed((2, 3))
    kernels = file.integers(np.ones((2, 3, 4)), 4)
    numbers = [file.floats(n) for n in (0.7, 0.0)]
    x = file.node("quantize", [0, *numbers], format=UINT4, rounding="half_even")
    x = file.node("reshape", [x], shape=[-1, 1, 2, 3])
    file.node("dense", [file.node("transpose", [x], permutation=[0, 2, 1, 3]), kernels], "stack")
    analysis = Analysis(load(file.save(tmp_path / "n", np.zeros((1, 8)))))
    assert not analysis.layers and [node.layer for node in analysis.float_layers] == ["stack"]
