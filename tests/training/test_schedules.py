"""Learning rate schedules."""

import numpy as np
import pytest

from qflax.errors import UserError
from qflax.training.schedules import relative_learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "step", "constant"])
def test_warmup_rises_linearly_to_the_peak_and_the_first_step_moves(schedule):
    rates = relative_learning_rate(schedule, 100, 10)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates.max() == 1 and rates.shape == (100,) and rates.dtype == np.float32


def test_cosine_follows_its_formula():
    rates = relative_learning_rate("cosine", 50, 0)
    np.testing.assert_allclose(rates, (1 + np.cos(np.pi * np.arange(50) / 50)) / 2, atol=1e-6)


def test_onecycle_falls_linearly():
    rates = relative_learning_rate("onecycle", 30, 10)
    np.testing.assert_allclose(rates[10:], 1 - np.arange(20) / 20, atol=1e-6)


def test_step_multiplies_at_milestones_counted_from_the_start():
    rates = relative_learning_rate("step", 30, 5, (10, 20), 0.1)
    np.testing.assert_allclose(rates[[9, 10, 19, 20, 29]], [1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


def test_milestones_on_one_step_multiply_twice():
    rates = relative_learning_rate("step", 30, 0, (10, 10), 0.1)
    np.testing.assert_allclose(rates[[9, 10]], [1, 0.01], rtol=1e-5)


def test_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_epochs"):
        relative_learning_rate("cosine", 10, 10)
