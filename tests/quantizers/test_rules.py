"""Default specs and ordered rules on layer paths."""

import dataclasses

import pytest

from qflax.errors import UserError
from qflax.quantizers import AccumulatorAware, Minifloat, MixedPrecision, Uniform, quantization_from_config
from qflax.quantizers.spec import kind_of

WEIGHTS = {"bits": 4, "granularity": "per_channel"}
ACTIVATIONS = {"bits": 3}


def policy(*rules, weights=WEIGHTS, activations=ACTIVATIONS):
    fields = dict(weights=weights, activations=activations, outputs=None, biases=None, rules=rules)
    return quantization_from_config(fields)


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_hold_without_rules_and_only_where_a_layer_takes_them():
    p = policy()
    assert p.spec("weights", "conv") == Uniform(bits=4, granularity="per_channel")
    assert p.spec("activations", "act") == Uniform(bits=3)
    assert p.spec("activations", "input", by_default=False) is None
    assert policy(weights=None).spec("weights", "conv") is None


def test_rule_changes_fields_of_the_default_for_its_layers_only():
    p = policy({"layers": "conv_init", "weights": {"bits": 8}})
    assert p.spec("weights", "conv_init") == Uniform(bits=8, granularity="per_channel")
    assert p.spec("weights", "conv_other").bits == 4
    assert p.spec("activations", "conv_init").bits == 3


def test_later_rules_override_earlier_ones_field_by_field():
    p = policy(
        {"layers": "stage1*", "weights": {"bits": 8}},
        {"layers": "*conv2", "weights": {"scale": "log2"}},
        {"layers": "stage1_block2/*", "weights": {"bits": 2}},
    )
    assert p.spec("weights", "stage1_block1/conv1").bits == 8
    spec = p.spec("weights", "stage1_block2/conv2")
    assert (spec.bits, spec.scale, spec.granularity) == (2, "log2", "per_channel")


def test_none_is_float_until_a_later_rule():
    p = policy(
        {"layers": "*", "weights": None, "activations": None}, {"layers": "conv2", "weights": {"bits": 5}}
    )
    assert p.spec("weights", "conv1") is None
    assert p.spec("activations", "conv1") is None
    assert p.spec("weights", "conv2") == Uniform(bits=5, granularity="per_channel")


def test_rule_quantizes_a_place_that_is_float_by_default():
    p = policy({"layers": "*/add", "activations": {}})
    assert p.spec("activations", "block/add", by_default=False) == Uniform(bits=3)


def test_kind_starts_a_spec_of_its_own():
    p = policy({"layers": "conv", "weights": {"kind": "uniform", "bits": 8}})
    assert p.spec("weights", "conv") == Uniform(bits=8)


def test_rule_without_a_default_needs_bits():
    assert "rules[0].weights.bits" in message_of(
        policy({"layers": "conv", "weights": {"scale": "lsq"}}, weights=None).spec, "weights", "conv"
    )
    p = policy({"layers": "conv", "weights": {"bits": 8}}, weights=None)
    assert p.spec("weights", "conv") == Uniform(bits=8)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ({"weights": {"bits": 8}}, ["rules[0]", "'layers'"]),
        ("conv", ["rules[0]='conv'", "mapping"]),
        ({"layers": "*", "weight": {"bits": 8}}, ["rules[0].weight", "did you mean 'weights'"]),
        ({"layers": "*", "weights": 8}, ["rules[0].weights=8", "None or a mapping"]),
        ({"layers": "conv_init"}, ["rules[0]=", "changes nothing"]),
    ],
)
def test_impossible_rule_is_refused_when_the_policy_is_made(rule, parts):
    message = message_of(policy, rule)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"bits": 77}, ["rules[1].weights.bits=77", "1 to 16"]),
        ({"bist": 7}, ["rules[1].weights.bist", "did you mean 'bits'"]),
    ],
)
def test_impossible_override_is_refused_where_it_applies(fields, parts):
    p = policy({"layers": "*", "weights": {"bits": 8}}, {"layers": "conv", "weights": fields})
    message = message_of(p.spec, "weights", "conv")
    for part in parts:
        assert part in message


def test_a_rule_may_build_on_an_earlier_one_where_there_is_no_default():
    rules = {"layers": "*", "weights": {"bits": 8}}, {"layers": "conv", "weights": {"scale": "range"}}
    assert policy(*rules, weights=None).spec("weights", "conv") == Uniform(bits=8, scale="range")


SITES = [("weights", "conv_init"), ("activations", "act_init"), ("weights", "classifier")]


def test_rules_that_match_pass_the_check():
    rules = ({"layers": "conv_init", "weights": None}, {"layers": "*", "activations": None, "weights": None})
    policy(*rules).check(SITES)
    policy().check([])


def test_rule_that_matches_no_layer_is_refused_with_the_closest():
    message = message_of(
        policy({"layers": "*", "weights": {}}, {"layers": "conv_int", "weights": {}}).check, SITES
    )
    assert "rules[1]" in message and "'conv_int'" in message
    assert "did you mean 'conv_init'" in message and "classifier" in message


def test_role_that_no_matched_layer_has_is_refused():
    message = message_of(policy({"layers": "conv*", "activations": {"bits": 8}}).check, SITES)
    assert "rules[0]" in message and "no activations" in message and "weights" in message


@pytest.mark.parametrize(
    "base,change",
    [
        (AccumulatorAware(bits=4, accumulator_bits=16), {"accumulator_bits": 12, "bits": 8}),
        (Minifloat(exponent_bits=4, mantissa_bits=3, specials="nan"), {"scale": "range"}),
        (Minifloat(exponent_bits=4, mantissa_bits=3), {"exponent_bits": 5, "mantissa_bits": 2}),
        (MixedPrecision(bits=4), {"max_bits": 6}),
        (Uniform(bits=4, scale="range"), {"bits": 8}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_some_fields_of_any_kind_can_be_changed(base, change):
    fields = {"kind": kind_of(base), **dataclasses.asdict(base)}
    expected = dataclasses.replace(base, **change)
    assert policy({"layers": "a*", "weights": change}, weights=fields).spec("weights", "abc") == expected
    then = policy({"layers": "*", "weights": fields}, {"layers": "a*", "weights": change})
    assert then.spec("weights", "abc") == expected and then.spec("weights", "b") == base


def test_a_field_of_another_kind_is_an_error_that_lists_the_kind_s():
    p = policy(
        {"layers": "*", "weights": {"granularty": "per_channel"}},
        weights={"kind": "mixed_precision", "bits": 4},
    )
    message = message_of(p.spec, "weights", "conv")
    assert "rules[0].weights.granularty" in message and "did you mean 'granularity'" in message
