"""Ranges of integers are followed through everything that keeps them integers, and no further."""

import dataclasses

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.verify import load, run
from qflax.verify.executor import evaluate
from qflax.verify.ranges import Analysis

UINT4 = {"kind": "integer", "bits": 4, "signed": False, "narrow": False}
INT32 = {"kind": "integer", "bits": 32, "signed": True, "narrow": False}
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
    "multiply negative": ("multiply", -1.0, {}, (-10, 5)),
    "multiply negative half": ("multiply", -0.5, {}, None),
    "exp": ("exp", None, {}, None),
    "max_pool of a border alone": ("max_pool", None, dict(**WINDOW, padding=[[2, 0], [0, 0]]), None),
}


@pytest.mark.parametrize("case", CASES)
def test_ranges(packed, tmp_path, case):
    operation, operand, attributes, expected = CASES[case]
    file = packed((4, 4, 2))
    numbers = [file.floats(n) for n in (0.7, 5.0, *([] if operand is None else [operand]))]
    codes = file.node("quantize", [0, *numbers[:2]], format=UINT4, rounding="half_even")
    y = file.node(operation, [codes, *numbers[2:]], **attributes)
    size = {
        "pad": 72,
        "slice": 8,
        "max_pool": 12 if "border" in case else 8,
        "sum_pool": 8,
        "sum": 2,
        "max": 2,
    }.get(operation, 32)
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
    unknown = file.node("concatenate", [0, scaled], axis=1)
    different = file.node("add", [a, scaled])
    grids = Analysis(load(file.save(tmp_path / "n", np.zeros((1, 4))))).grids
    assert (grids[b].low, grids[b].high) == (-6, -4)
    assert (grids[joined].low, grids[joined].high) == (-6, 15)
    assert (grids[added].low, grids[added].high) == (-6, 11)
    assert (grids[mixed].low, grids[mixed].high) == (0, 15)
    np.testing.assert_array_equal(grids[mixed].scale, [[1] * 4 + [0.5] * 4])
    assert unknown not in grids and different not in grids


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


class Sums:
    """A packed file in the making: sums [n, 2, 3, 6] of inputs from 0 to 15; tests go on from there.

    Attributes:
      constants: numbers of what is to be added.
      value: number of the last value.
    """

    kernel = np.random.default_rng(0).integers(-7, 8, (5, 6))

    def __init__(self, file, *constants):
        self.file, matrix = file, file.integers(self.kernel, 4)
        self.one, self.zero, *self.constants = (file.floats(n) for n in (1.0, 0.0, *constants))
        self.value = 0
        self.quantize(UINT4)
        self.node("dense", matrix)

    def quantize(self, fmt):
        self.node("quantize", self.one, self.zero, format=fmt, rounding="half_even")

    def node(self, operation, *others, **attributes):
        self.value = self.file.node(operation, [self.value, *others], **attributes)

    def extremes(self, path, size):
        (layer,) = Analysis(load(self.file.save(path, np.zeros((1, size))))).layers
        return layer.extremes()

    def expected(self, channels, *biases):
        """What the accumulators hold once these were added to values of the channels."""
        low, high = 15 * np.minimum(self.kernel, 0).sum(0), 15 * np.maximum(self.kernel, 0).sum(0)
        for bias in biases:
            for channel in range(6):
                added = np.broadcast_to(bias, channels.shape)[channels == channel]
                low[channel] += added.min(initial=0)
                high[channel] += added.max(initial=0)
        return low.tolist(), high.tolist()


# What may lie between sums and a constant that is added to them.
LAYOUTS = {
    "nothing": [],
    "reshape": [("reshape", dict(shape=[-1, 2, 3, 2, 3]))],
    "flatten": [("reshape", dict(shape=[-1, 36]))],
    "transpose": [("transpose", dict(permutation=[0, 3, 1, 2]))],
    "two": [("transpose", dict(permutation=[0, 3, 1, 2])), ("reshape", dict(shape=[-1, 12, 3]))],
    "there and back": [("reshape", dict(shape=[-1, 36])), ("reshape", dict(shape=[-1, 2, 3, 6]))],
    "slice": [("slice", dict(start=[0, 1, 0, 1], stop=[None, None, None, 5], step=[1, 1, 1, 2]))],
    "max": [("max", dict(axes=(1, 2)))],
    "max_pool": [("max_pool", dict(window=[2, 2], strides=[1, 1], padding=NONE))],
    "round": [("round", {})],
}


@pytest.mark.parametrize("operation", ["add", "subtract"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulators_hold_all_constants_that_are_added(packed, tmp_path, layout, operation):
    channels = np.broadcast_to(np.arange(6, dtype=np.float32), (1, 2, 3, 6))
    for name, attributes in LAYOUTS[layout]:
        channels = evaluate(name, [channels], attributes)
    rng, shape = np.random.default_rng(1), channels.shape[1:]
    biases = [rng.integers(-900, 900, shape), rng.integers(-900, 900, shape[-1:])]
    sums = Sums(packed((2, 3, 5)), *biases)
    for name, attributes in LAYOUTS[layout]:
        sums.node(name, **attributes)
    for constant in sums.constants:
        sums.node(operation, constant)
    sign = -1 if operation == "subtract" else 1
    expected = sums.expected(channels, *(sign * bias for bias in biases))
    assert sums.extremes(tmp_path / "n", channels.size) == expected


def test_constants_are_added_from_either_side_and_past_a_quantizer_that_changes_nothing(packed, tmp_path):
    bias, channels = np.array([10, -20, 30, -40, 50, -60]), np.broadcast_to(np.arange(6), (1, 2, 3, 6))
    for place in range(3):
        sums = Sums(packed((2, 3, 5)), bias)
        if place == 0:
            sums.quantize(INT32)
        first, *rest = [sums.value, *sums.constants][:: 1 if place == 0 else -1]
        sums.value = sums.file.node("subtract" if place == 2 else "add", [first, *rest])
        assert sums.extremes(tmp_path / "n", 36) == sums.expected(channels, -bias if place == 2 else bias)


def test_what_comes_after_another_operation_is_no_bias(packed, tmp_path):
    sums = Sums(packed((2, 3, 5)), 1000.0, 0.5)
    sums.node("maximum", sums.zero)
    sums.node("add", sums.constants[0])
    sums.node("add", sums.constants[1])
    assert sums.extremes(tmp_path / "n", 36) == sums.expected(np.zeros((1, 2, 3, 6)))


def test_constants_for_layers_side_by_side(packed, tmp_path):
    """Each takes its own part, and zeros around them are as their neighbour."""
    file, rng = packed((3,)), np.random.default_rng(0)
    kernels = [file.integers(rng.integers(-7, 8, (3, n)), 4) for n in (2, 4)]
    one, zero, bias = (file.floats(n) for n in (1.0, 0.0, [1.0, 2, -40, -50, 5, 6, 7, 80]))
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    y = file.node("concatenate", [file.node("dense", [x, kernel]) for kernel in kernels], axis=1)
    y = file.node("pad", [y], padding=[[0, 0], [1, 1]])
    file.node("add", [y, bias])
    layers = Analysis(load(file.save(tmp_path / "n", np.zeros((1, 8))))).layers
    assert [layer.bias_low for layer in layers] == [[0, -40], [-50, 0, 0, 0]]
    assert [layer.bias_high for layer in layers] == [[2, 0], [0, 5, 6, 80]]
    assert [len(layer.outputs) for layer in layers] == [1, 1]


@pytest.mark.parametrize("fits", [True, False])
def test_a_bias_in_units_of_its_own(packed, tmp_path, fits):
    """It is on the sums' grid where its scale is a multiple of theirs."""
    file = packed((2,))
    kernel, bias = file.integers(np.ones((2, 1)), 4), file.integers(np.array([-100]), 8)
    one, zero, half, own = (file.floats(n) for n in (1.0, 0.0, 0.5, 3.5 if fits else 0.333))
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    y = file.node("multiply", [file.node("dense", [x, kernel]), half])
    file.node("add", [y, file.node("multiply", [bias, own])])
    (layer,) = Analysis(load(file.save(tmp_path / "n", [[0.0]]))).layers
    assert layer.extremes() == ([-700 if fits else 0], [30])


def test_scales_of_places(packed, tmp_path):
    """A window over several of them leaves no grid; a sum that is added to it is no error."""
    file = packed((4, 4, 1))
    scales = np.arange(1.0, 17).reshape(4, 4, 1)
    one, zero, large, small = (file.floats(n) for n in (1.0, 0.0, scales, scales[::2, ::2]))
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    pooled = file.node("max_pool", [file.node("multiply", [x, large])], **WINDOW, padding=NONE)
    other = file.node("multiply", [file.node("max_pool", [x], **WINDOW, padding=NONE), small])
    y = file.node("add", [pooled, other])
    grids = Analysis(load(file.save(tmp_path / "n", np.zeros((1, 4))))).grids
    assert pooled not in grids and y not in grids and grids[other].scale.shape == (1, 2, 2, 1)


def test_scales_are_limited(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("qflax.verify.ranges._KEPT", 30)
    file = packed((4, 4, 1))
    one, zero, scales = (file.floats(n) for n in (1.0, 0.0, np.arange(1.0, 17).reshape(4, 4, 1)))
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    file.node("multiply", [file.node("multiply", [x, scales]), scales])
    with pytest.raises(UserError, match="scales of more than 30 elements together"):
        Analysis(load(file.save(tmp_path / "n", np.zeros((1, 16)))))


@pytest.mark.parametrize(
    "size, scale, fine", [(32, 1, True), (33, 1, False), (20, 0.5, True), (21, 0.5, False)]
)
def test_weights_are_as_large_as_sums_of_them_are_exact(packed, tmp_path, size, scale, fine):
    """Their zero point alone may make them so."""
    file = packed((8,))
    kernel, fmt = file.integers(np.ones((8, 1)), 2), {**INT32, "bits": 2}
    one, zero, zero_point, factor = (file.floats(n) for n in (1.0, 0.0, -2 - 2.0**size, scale))
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    kernel = file.node("quantize", [kernel, one, zero_point], format=fmt, rounding="half_even")
    file.node("dense", [x, file.node("multiply", [kernel, factor])], "layer")
    network = load(file.save(tmp_path / "n", [[0.0]]))
    if fine:
        (layer,) = Analysis(network).layers
        assert layer.extremes() == ([0], [15 * 8 * 2**size])
    else:
        with pytest.raises(UserError, match=f"layer: weights of up to {2**size}; sums are exact for at most"):
            Analysis(network)


@pytest.mark.parametrize("rounding", ["round", "floor", "ceil", "toward zero", "none"])
@pytest.mark.parametrize("limits", [(-512.0, 511.0), (0.0, 1023.0), (-511.5, 511.0), (0.0, None)])
def test_rounding_and_clipping_to_whole_numbers_makes_integers(packed, tmp_path, rounding, limits):
    file = packed((3,))
    kernel = file.integers(np.array([[1], [-1], [7]]), 4, accumulator_bits=16)
    scale, *ends = (file.floats(n) for n in (0.37, *limits) if n is not None)
    x = file.node("divide", [0, scale])
    if rounding == "toward zero":
        x = file.node("multiply", [file.node("sign", [x]), file.node("floor", [file.node("absolute", [x])])])
    elif rounding != "none":
        x = file.node(rounding, [x])
    for operation, end in zip(("maximum", "minimum"), ends, strict=False):
        x = file.node(operation, [x, end])
    file.node("dense", [x, kernel], "layer")
    analysis = Analysis(load(file.save(tmp_path / "n", [[0.0]])))
    if rounding == "none" or limits[1] is None or limits[0] % 1:
        assert not analysis.layers and len(analysis.float_layers) == 1
    else:
        (layer,) = analysis.layers
        low, high = (int(limit) for limit in limits)
        assert (layer.x_low, layer.x_high) == (low, high) and layer.weight_bits == 4
        assert layer.extremes() == ([8 * low - high], [8 * high - low]) and not analysis.inexact


@pytest.mark.parametrize("zero_point", [0.0, 5.0, -(2.0**24)])
def test_the_widest_quantizers_reach_what_float32_makes_of_their_ends(packed, tmp_path, zero_point):
    file, scale = packed((2,)), 2.0**-30
    numbers = [file.floats(n) for n in (scale, zero_point)]
    x = file.node("quantize", [0, *numbers], format=INT32, rounding="half_even")
    network = load(file.save(tmp_path / "n", np.zeros((1, 2))))
    grid, y = Analysis(network).grids[x], run(network, np.float32([[-9, 9]]))
    assert (grid.low, grid.high) == (int(y.min()), int(y.max()))


@pytest.mark.parametrize("integers", [True, False])
def test_a_factor_of_integers_is_no_scale(packed, tmp_path, integers):
    file, factor = packed((2,)), np.array([100.0, 50.0])
    kernel = file.integers(np.ones((2, 1)), 4)
    factor = file.integers(factor, 8) if integers else file.floats(factor[:1])
    one, zero = file.floats(1.0), file.floats(0.0)
    x = file.node("quantize", [0, one, zero], format=UINT4, rounding="half_even")
    file.node("dense", [file.node("multiply", [x, factor]), kernel], "layer")
    (layer,) = Analysis(load(file.save(tmp_path / "n", [[0.0]]))).layers
    assert layer.x_high == (1500 if integers else 15)
    assert layer.scale == (1 if integers else 100)


INT25 = {"kind": "integer", "bits": 25, "signed": False, "narrow": False}


def whole_numbers(file, high):
    """0 ... `high`, rounded and clipped."""
    x = file.node("round", [0])
    for operation, end in (("maximum", 0.0), ("minimum", high)):
        x = file.node(operation, [x, file.ends[end]])
    return x


@pytest.mark.parametrize(
    ("high", "added", "largest"),
    [(2.0**24 - 1, 2.0**24, 2**25), (2.0**24 - 1, 2.0, 2**24 + 2), (2.0**24 - 9, 2.0, 2**24 - 7)],
)
def test_sums_have_room_for_what_float32_rounds_them_to(packed, tmp_path, high, added, largest):
    file = packed((1,))
    kernel, term = file.integers(np.array([[1]]), 4, accumulator_bits=32), file.floats(added)
    file.ends = {end: file.floats(end) for end in (0.0, high)}
    file.node("dense", [file.node("add", [whole_numbers(file, high), term]), kernel], "layer")
    network = load(file.save(tmp_path / "n", [[0.0]]))
    (layer,) = Analysis(network).layers
    assert layer.x_high == largest >= run(network, np.float32([[high]])).item() and layer.attained()


@pytest.mark.parametrize(("factor", "known"), [(1 + 9e-7, False), (1.0, True)])
def test_scales_that_differ_a_little_are_not_those_of_large_integers(packed, tmp_path, factor, known):
    file = packed((1,))
    kernel, factor = file.integers(np.array([[1]]), 4, accumulator_bits=32), file.floats(factor)
    file.ends = {end: file.floats(end) for end in (0.0, 2.0**23 - 1)}
    x = whole_numbers(file, 2.0**23 - 1)
    x = file.node("round", [file.node("add", [x, file.node("multiply", [x, factor])])])
    file.node("dense", [x, kernel], "layer")
    analysis = Analysis(load(file.save(tmp_path / "n", [[0.0]])))
    assert len(analysis.layers) == known and len(analysis.float_layers) == (not known)


def test_a_scale_that_leaves_float32_ends_what_is_known(packed, tmp_path):
    """Infinity does not become an integer again by a small scale."""
    file = packed((8,))
    kernel = file.integers(np.ones((8, 1)), 4, accumulator_bits=13)
    one, *factors = (file.floats(n) for n in (1.0, 2.0**127, 2.0**-100, 2.0**-27))
    cap = file.floats(2.0**20)
    zero = file.floats(0.0)
    x = file.node("quantize", [0, one, zero], format=INT25, rounding="half_even")
    for factor in factors:
        x = file.node("multiply", [x, factor])
    file.node("dense", [file.node("minimum", [x, cap]), kernel], "layer")
    network = load(file.save(tmp_path / "n", [[0.0]]))
    assert run(network, np.full((1, 8), 2, np.float32)).item() == 2**23
    assert not Analysis(network).layers
