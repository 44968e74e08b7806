"""The least sum of divergences under a budget, against all combinations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflax.errors import UserError
from qflax.ptq.allocation import allocate, rules_of
from qflax.ptq.sensitivity import Sensitivity
from qflax.quantizers import Uniform, quantization_from_config

# Elements -> bits -> divergence.
LAYERS = st.lists(
    st.tuples(
        # From biases to large kernels, next to which small ones must not get lost.
        st.one_of(st.integers(1, 300), st.sampled_from([2048, 36864, 2359296]), st.just(11**7)),
        st.dictionaries(st.sampled_from([1, 2, 3, 4, 8, 16]), st.floats(0, 10), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


def rows_of(layers, role="weights"):
    return [
        Sensitivity(
            path=f"layer{i}",
            role=role,
            bits=bits,
            divergence=divergence,
            agreement=0.5,
            accuracy=None,
            elements=elements,
        )
        for i, (elements, costs) in enumerate(layers)
        for bits, divergence in costs.items()
    ]


def size_and_cost(layers, widths):
    """Of a combination; a width costs no more than a narrower one that was measured."""
    size = sum(elements * bits for (elements, _), bits in zip(layers, widths, strict=True))
    costs = (
        min(cost for other, cost in costs.items() if other <= bits)
        for (_, costs), bits in zip(layers, widths, strict=True)
    )
    return size, sum(costs)


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@given(LAYERS, st.floats(0, 1), st.booleans(), st.floats(0, 1e6))
def test_no_combination_within_the_budget_is_better(layers, place, exact, fixed):
    combinations = itertools.product(*(costs for _, costs in layers))
    outcomes = [size_and_cost(layers, widths) for widths in combinations]
    sizes = sorted(size for size, _ in outcomes)
    if exact:
        fixed, budget = round(fixed), sizes[round(place * (len(sizes) - 1))] + round(fixed)
    else:
        budget = sizes[0] + place * (sizes[-1] - sizes[0]) + fixed + 0.5
    allocation = allocate(rows_of(layers), budget, fixed_bits=fixed)
    assert list(allocation) == [f"layer{i}" for i in range(len(layers))]
    size, cost = size_and_cost(layers, allocation.values())
    assert size + fixed <= budget
    best = min(cost for size, cost in outcomes if size + fixed <= budget)
    assert cost == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_large_layers_do_not_hide_that_the_budget_is_exceeded():
    layers = [(512 * 512 * 9 * n, {2: 3.0 / n, 3: 1.0 / n, 4: 0.5 / n, 8: 0.1 / n}) for n in range(1, 5)]
    layers.append((1, {2: 1e-3, 8: 1e-4}))
    rng = np.random.default_rng(0)
    for _ in range(20):
        widths = [rng.choice([2, 3, 4, 8]) for _ in layers[:-1]] + [8]
        budget = size_and_cost(layers, widths)[0] - 1
        size, _ = size_and_cost(layers, allocate(rows_of(layers), budget).values())
        assert size <= budget


def test_small_divergences_count_as_large_ones_do():
    layers = [(10, {2: 3e-8, 8: 1e-8}), (10, {2: 9e-8, 8: 2e-8}), (10, {2: 4e-8, 8: 1e-8})]
    for order in itertools.permutations(layers):
        widths = allocate(rows_of(order), 120).values()
        assert [bits == 8 for bits in widths] == [layer is layers[1] for layer in order]


def test_a_width_that_does_not_help_is_not_spent():
    layers = [(10, {2: 0.3, 4: 0.1, 8: 0.1}), (20, {2: 0.2, 4: 0.25, 8: 0.21})]
    assert allocate(rows_of(layers), 1e6) == {"layer0": 4, "layer1": 2}
    assert allocate(rows_of([(10, {8: 0.0, 2: 0.0})]), 1e6) == {"layer0": 2}


def test_only_rows_of_the_role_count():
    rows = rows_of([(10, {2: 0.3, 8: 0.1})]) + rows_of([(1000, {4: 0.3})], role="activations")
    assert allocate(rows, 80) == {"layer0": 8}
    assert allocate(rows, 4000, role="activations") == {"layer0": 4}


def test_too_small_a_budget_is_refused_with_the_smallest_possible():
    rows = rows_of([(10, {2: 0.3, 8: 0.1}), (7, {3: 0.1})])
    assert allocate(rows, 41 + 9, fixed_bits=9) == {"layer0": 2, "layer1": 3}
    message = message_of(allocate, rows, 49, fixed_bits=9)
    assert "budget_bits=49" in message and "50 bits" in message and "narrower" in message


def test_rows_that_say_nothing_are_refused():
    assert "roles=('activations',)" in message_of(allocate, rows_of([(1, {2: 0.1})]), 100, role="activations")
    assert "layer0" in message_of(allocate, rows_of([(1, {2: float("nan")})]), 100)


def test_rules_set_the_widths_of_these_layers_alone():
    fields = {"weights": {"bits": 8, "scale": "static"}, "activations": None, "outputs": None, "biases": None}
    earlier = ({"layers": "*", "weights": {"bits": 7}},)
    allocation = {"block/conv1": 4, "odd[1]*": 2, "conv?": 3}
    policy = quantization_from_config({**fields, "rules": earlier + rules_of(allocation)})
    for path, bits in allocation.items():
        assert policy.spec("weights", path) == Uniform(bits=bits, scale="static")
    for path in ("block/conv11", "odd1x", "odd[1]x", "conv1"):
        assert policy.spec("weights", path).bits == 7
    assert rules_of({"act": 4}, role="activations") == ({"layers": "act", "activations": {"bits": 4}},)
