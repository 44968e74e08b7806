"""Totals and the per-layer table."""

from qflax.layers import LayerCost
from qflax.training.table import cost_table, cost_totals

COSTS = (
    LayerCost(
        path="conv", kind="conv", roles=("weights",), weights=1000, biases=10, macs=50_000, weight_bits=3
    ),
    LayerCost(path="act", kind="activation", roles=("activations",), activations=400, activation_bits=5),
    LayerCost(path="add", kind="activation", roles=("activations",)),
    LayerCost(
        path="dense", kind="dense", roles=("weights",), weights=64, macs=64, weight_bits=8, input_bits=5
    ),
    LayerCost(path="act2", kind="activation", roles=("activations",), activations=100, activation_bits=8),
)


def test_totals_are_sums_and_the_maximum():
    assert cost_totals(COSTS) == {
        "quantized_parameters": 1074,
        "weight_bytes": 1000 * 3 / 8 + 10 * 4 + 64,
        "activation_elements": 500,
        "activation_bytes_sum": 400 * 5 / 8 + 100,
        "activation_bytes_max": 400 * 5 / 8,
        "macs": 50_064,
        "bit_operations": 50_000 * 3 * 32 + 64 * 8 * 5,
    }


def test_the_table_has_a_line_for_every_layer_that_does_something():
    text = cost_table(COSTS)
    first = [line.split()[0] for line in text.splitlines()]
    assert first[2:-1] == ["conv", "act", "dense", "act2", "total"]
    row = next(line for line in text.splitlines() if line.startswith("conv"))
    assert row.split()[1:6] == ["1,010", "3", "0.41", "0.050", "float"]
