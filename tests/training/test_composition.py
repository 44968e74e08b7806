"""Quantizers of all kinds in one network: four rules, and it trains."""

import json

import jax
import numpy as np
import pytest

from qflax.training import train
from qflax.training.workdir import load_workdir

RULES = (
    dict(layers="conv_init", weights=dict(kind="uniform", bits=8, granularity="per_channel")),
    dict(layers="stage*", weights=dict(kind="accumulator_aware", bits=4, accumulator_bits=14)),
    dict(layers="classifier", weights=dict(kind="minifloat", exponent_bits=2, mantissa_bits=1, scale="log2")),
    dict(layers="*act*", activations=dict(kind="mixed_precision", bits=6)),
)


@pytest.mark.thorough
def test_four_rules_with_every_kind_of_quantizer_train(tiny_config, tmp_path):
    tiny_config.weights = tiny_config.activations = None
    tiny_config.rules = RULES
    tiny_config.size_targets = dict(weight_kib=0.0, activation_kib_sum=48.0, activation_kib_max=0.0)
    tiny_config.freeze_widths_after = 0.25
    tiny_config.oscillation_damping = 1e-4
    tiny_config.oscillation_freezing = (0.1, 0.01)
    tiny_config.quantizer_learning_rate = 0.02
    tiny_config.num_train_steps = 80
    tiny_config.eval_every_epochs = 1.0
    tiny_config.checkpoint_every_steps = 40
    tiny_config.log_every_steps = 10
    result = train(tiny_config, tmp_path)
    assert 0 < result["frozen_weights"] < 1
    assert result["widths_frozen"] and not result["missed_size_targets"]
    assert result["activation_bytes_sum"] <= 48 * 1024 < 6 / 8 * result["activation_elements"]
    assert 2 < result["accumulator_bits"] <= 14
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train_rows = [row for row in rows if row["group"] == "train"]
    assert train_rows[-1]["loss"] < 0.8 * train_rows[0]["loss"]
    penalties = {"size_penalty", "accumulator_penalty", "oscillation_penalty"}
    assert {*penalties, "widths_frozen"} <= train_rows[-1].keys()
    assert train_rows[0]["widths_frozen"] == 0 and train_rows[-1]["widths_frozen"] == 1
    frozen = [row["activation_kib_sum"] for row in train_rows if row["widths_frozen"] == 1]
    assert len(set(frozen)) == 1  # Frozen is frozen.
    assert train_rows[0]["frozen_weights"] == 0 < train_rows[-1]["frozen_weights"]
    layers = [row for row in rows if row["group"] == "layers"][-1]
    assert layers["stage1_block1/conv1/weight_bits"] == 4 and layers["conv_init/weight_bits"] == 8
    assert layers["classifier/weight_bits"] == 4
    assert 0 < layers["classifier/weights/oscillation/held"] < 1
    state = load_workdir(tmp_path)[1]
    accumulators = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.observed)
        if path[-1].key == "accumulator_bits"
    ]
    assert len(accumulators) == 6 and set(np.ravel(accumulators)) == {14}
