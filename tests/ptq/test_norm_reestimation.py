"""Norm statistics after quantization."""

import jax
import numpy as np
import pytest

from qflax.ptq import reestimate_norms
from qflax.quantizers import Quantization, Uniform, calibrate

COARSE = Quantization(weights=Uniform(bits=2), activations=Uniform(bits=2))


@pytest.fixture(scope="module")
def quantized(small_net, float_variables, batches):
    model = small_net(COARSE)
    variables = {**model.init(jax.random.key(0), batches[0], train=False), **float_variables}
    return calibrate(model, variables, batches, train=False)


def reestimated(small_net, quantized, float_variables, batches, policy=COARSE):
    models = small_net(policy, momentum=0.0), small_net(momentum=0.0)
    return reestimate_norms(models[0], quantized, models[1], float_variables, batches)


def test_statistics_move_by_what_quantization_changes(small_net, quantized, float_variables, batches):
    found = reestimated(small_net, quantized, float_variables, batches)["batch_stats"]
    both = [
        [
            model.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]["norm"]
            for batch in batches
        ]
        for model, variables in (
            (small_net(COARSE, momentum=0.0), quantized),
            (small_net(momentum=0.0), float_variables),
        )
    ]
    (own_mean, own_var), (goal_mean, goal_var) = (
        [np.mean([statistics[name] for statistics in part], 0) for name in ("mean", "var")] for part in both
    )
    old = float_variables["batch_stats"]["norm"]
    assert np.max(np.abs(own_mean - goal_mean)) > 1e-2
    np.testing.assert_allclose(found["norm"]["mean"], old["mean"] + own_mean - goal_mean, atol=1e-6)
    np.testing.assert_allclose(found["norm"]["var"], old["var"] * own_var / goal_var, rtol=1e-5)


def test_images_unlike_those_of_training_change_nothing_in_a_float_network(
    small_net, float_variables, batches
):
    others = [3 * batch + 1 for batch in batches]
    found = reestimated(small_net, float_variables, float_variables, others, Quantization())
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], float_variables["batch_stats"])


def test_without_norms_there_is_nothing_to_reestimate(small_net):
    variables = {"params": {}}
    assert reestimate_norms(small_net(), variables, small_net(), variables, []) == variables
