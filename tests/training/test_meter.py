"""Training metrics between two readings."""

import json

import numpy as np
import pytest

from qflax.training.meter import Meter


def row(*losses, bad=None):
    bad = bad or [0.0] * len(losses)
    columns = {"loss": losses, "learning_rate": [0.1] * len(losses), "bad_steps": bad}
    return {name: np.float32(values) for name, values in columns.items()}


def test_means_over_what_is_not_logged_yet():
    meter = Meter(8, seconds=5.0)
    meter.add(row(1.0, 2.0))
    meter.add(row(6.0))
    means = meter.read()
    assert means["loss"] == 3.0 and means["learning_rate"] == np.float32(0.1) and means["seconds"] > 5
    assert means["images_per_second"] > 0 and means.keys().isdisjoint({"bad_steps", "skipped_steps"})
    assert meter.read()["loss"] == 3.0  # Until it is logged.
    meter.logged()
    meter.add(row(7.0))
    assert meter.read()["loss"] == 7.0


def test_skipped_steps_are_counted_and_in_no_mean():
    meter = Meter(8)
    meter.add(row(1.0, np.nan, np.inf, 3.0, bad=[0, 1, 2, 0]))
    means = meter.read()
    assert means["loss"] == 2.0 and means["skipped_steps"] == 2.0
    assert meter.first_bad(2) is None
    assert meter.first_bad(1) == 1 and meter.first_bad(0) == 2


def test_what_an_earlier_start_passed_over_stays_so():
    earlier = Meter(8)
    earlier.add(row(1.0, np.nan, bad=[0, 1]))
    meter = Meter(8, unlogged=json.loads(json.dumps(earlier.unlogged())))
    assert meter.first_bad(0) is None
    meter.add(row(np.nan, 2.0, np.nan, bad=[2, 0, 1]))
    assert meter.first_bad(0) == 2 and meter.first_bad(1) == 2 and meter.first_bad(2) is None
    assert meter.read()["skipped_steps"] == 3
    meter.logged()
    meter.add(row(np.nan, bad=[1]))
    assert meter.first_bad(0) == 0


def test_only_skipped_steps():
    meter = Meter(8)
    meter.add(row(np.nan, bad=[1]))
    means = meter.read()
    assert "loss" not in means and means["skipped_steps"] == 1


def test_nothing_is_bad_before_the_first_step():
    assert Meter(8).first_bad(0) is None and Meter(8).rows() == {}


def test_a_process_without_the_steps_before_an_interruption_has_nothing_to_tell():
    meter = Meter(8, 5.0, None)
    assert meter.read() == {}
    meter.logged()
    meter.add(row(2.0))
    assert meter.read()["loss"] == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_meter_goes_on_to_the_same_means(seed):
    losses = np.random.default_rng(seed).lognormal(size=37).astype(np.float32)
    whole, first = Meter(8), Meter(8)
    for meter in (whole, first):
        meter.add(row(*losses[:20]))
    record = json.loads(json.dumps(first.unlogged()))
    second = Meter(8, seconds=99.0, unlogged=record)
    for meter in (whole, second):
        meter.add(row(*losses[20:]))
    a, b = whole.read(), second.read()
    assert a["loss"] == b["loss"] and a["loss"] == np.mean(losses)
    assert b["seconds"] >= record["elapsed"] and b["seconds"] < 99
