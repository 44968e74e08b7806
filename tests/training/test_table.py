"""Totals and the per-layer table."""

import numpy as np

from qflax.layers import Accumulation, LayerCost
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


def test_accumulators_by_type_by_norm_and_exactly():
    bounds = Accumulation(
        depth=72,
        input_signed=False,
        weight_signed=True,
        positive=np.uint32([40, 3]),
        negative=np.uint32([10, 60]),
        weight_bits=4,
        input_bits=4,
        x_min=0,
        x_max=15,
    )
    cost = LayerCost(
        path="conv", kind="conv", roles=("weights",), macs=72, weight_bits=2.5, accumulation=bounds
    )
    # 72 * 8 * 16 = 9216; (3 + 60) * 16 = 1008; -60 * 15 = -900.
    row = next(line for line in cost_table([cost]).splitlines() if line.startswith("conv")).split()
    assert row[-3:] == ["15", "11", "11"] and "2.50" in row
    assert cost_totals([cost])["accumulator_bits"] == 11
    assert "accumulator_bits" not in cost_totals(COSTS)


def test_targets_are_listed_with_what_was_reached():
    weights = (1000 * 3 / 8 + 10 * 4 + 64) / 1024
    targets = {"weight_kib": 0.2, "activation_kib_sum": 0.0, "activation_kib_max": 1.0}
    last = cost_table(COSTS, targets, dict.fromkeys(targets, 0.1)).splitlines()[-2:]
    assert last[0] == f"weight_kib {weights:.2f}, target 0.20, penalty {0.1 * (weights - 0.2) ** 2:.4g}"
    assert last[1] == "activation_kib_max 0.24, target 1.00, penalty 0"
