"""Specs are validated when made, and their messages say what to write instead."""

import dataclasses

import pytest

from qflax.errors import UserError
from qflax.quantizers import ROLES, IntegerBias, Uniform, spec_from_dict
from qflax.quantizers.uniform import SCALES


def message_of(function, *args, **fields):
    with pytest.raises(UserError) as caught:
        function(*args, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"bits": 0}, ["bits=0", "1 to 16"]),
        ({"bits": 17}, ["bits=17", "1 to 16"]),
        ({"bits": 4.0}, ["bits=4.0"]),
        ({"bits": True}, ["bits=True"]),
        ({"bits": 4, "scale": "lqs"}, ["scale='lqs'", "did you mean 'lsq'", "choices", "dorefa"]),
        ({"bits": 4, "granularity": "channel"}, ["granularity='channel'", "per_tensor", "per_channel"]),
        ({"bits": 4, "statistic": "min"}, ["statistic='min'", "absmax", "mse"]),
        ({"bits": 4, "clip_gradient": "ste"}, ["clip_gradient='ste'", "straight_through"]),
        ({"bits": 4, "rounding": "up"}, ["rounding='up'", "ceil"]),
        ({"bits": 4, "surrogate": "EWGS"}, ["surrogate='EWGS'", "ewgs"]),
        ({"bits": 4, "surrogate": "tanh", "rounding": "ceil"}, ["surrogate='tanh'", "rounding='ceil'"]),
        ({"bits": 4, "surrogate": "tanh", "strength": 0.0}, ["strength=0.0", "positive"]),
        ({"bits": 4, "percentile": 0}, ["percentile=0", "(0, 100]"]),
        ({"bits": 4, "percentile": 100.1}, ["percentile=100.1"]),
        ({"bits": 4, "momentum": 0.0}, ["momentum=0.0", "(0, 1]"]),
        ({"bits": 4, "momentum": float("nan")}, ["momentum=nan"]),
        ({"bits": 4, "momentum": 0.5}, ["momentum=0.5", "only scale='ema'", "leave it at 0.1"]),
        ({"bits": 4, "strength": 0.5}, ["strength=0.5", "surrogate='identity'"]),
        ({"bits": 4, "scale": "constant"}, ["scale_value=None", "positive"]),
        ({"bits": 4, "scale": "constant", "scale_value": -1.0}, ["scale_value=-1.0", "positive"]),
        ({"bits": 4, "scale_value": 0.1}, ["scale_value=0.1", "constant"]),
        (
            {"bits": 4, "symmetric": False, "scale": "pact"},
            ["symmetric=False", "'pact'", "static, ema, lsq, range"],
        ),
        ({"bits": 4, "symmetric": False, "granularity": "per_channel"}, ["symmetric=False", "per tensor"]),
        ({"bits": 4, "symmetric": False, "statistic": "kl"}, ["statistic='kl'", "absmax, percentile, mse"]),
        ({"bits": 1, "symmetric": False, "signed": True}, ["symmetric=False", "bits=1", "signed=True"]),
        (
            {"bits": 4, "symmetric": False, "rounding": "toward_zero"},
            ["symmetric=False with rounding='toward_zero'", "half_even, floor, ceil, stochastic"],
        ),
    ],
)
def test_impossible_value_is_named_with_the_choices(fields, parts):
    message = message_of(Uniform, **fields)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"bits": 4, "kind": "unifrom"}, ["weights.kind='unifrom'", "did you mean 'uniform'"]),
        ({"bit": 4}, ["weights.bit:", "did you mean 'bits'", "granularity"]),
        ({"scale": "lsq"}, ["weights.bits"]),
        ({"bits": 99}, ["weights.bits=99"]),
        (4, ["weights=4"]),
    ],
)
def test_mapping_errors_name_the_config_field(fields, parts):
    message = message_of(spec_from_dict, fields, "weights", "weights")
    for part in parts:
        assert part in message


def test_none_is_float_and_kind_may_be_left_out():
    assert spec_from_dict(None, "weights", "weights") is None
    assert spec_from_dict({"bits": 3, "scale": "ema"}, "activations", "here") == Uniform(bits=3, scale="ema")
    assert spec_from_dict({"kind": "uniform", "bits": 3}, "weights", "weights") == Uniform(bits=3)


def test_spec_survives_the_way_through_a_mapping():
    spec = Uniform(bits=5, scale="constant", scale_value=0.25, surrogate="ewgs", narrow=False)
    assert spec_from_dict(dataclasses.asdict(spec), "weights", "x") == spec
    assert hash(spec) == hash(dataclasses.replace(spec))


@pytest.mark.parametrize("scale", SCALES)
def test_scale_brings_its_paper_s_gradient_and_statistic_unless_overridden(scale):
    value = 0.5 if scale == "constant" else None
    spec = Uniform(bits=4, scale=scale, scale_value=value)
    assert (spec.estimator.clip, spec.range_statistic) == SCALES[scale]
    spec = Uniform(bits=4, scale=scale, scale_value=value, clip_gradient="after_rounding", statistic="kl")
    assert (spec.estimator.clip, spec.range_statistic) == ("after_rounding", "kl")


def test_asymmetric_lsq_starts_from_the_squared_error():
    assert Uniform(bits=4, scale="lsq", symmetric=False).range_statistic == "mse"


@pytest.mark.parametrize(
    ("fields", "layer", "expected"),
    [
        ({}, (True, True), (-7, 7)),
        ({}, (True, False), (-8, 7)),
        ({}, (False, False), (0, 15)),
        ({"signed": True}, (False, False), (-8, 7)),
        ({"signed": False}, (True, True), (0, 15)),
        ({"narrow": False}, (True, True), (-8, 7)),
        ({"narrow": True}, (True, False), (-7, 7)),
        ({"narrow": True}, (False, False), (0, 15)),
        ({"symmetric": False}, (True, False), (0, 15)),
        ({"symmetric": False, "signed": True}, (False, False), (-8, 7)),
    ],
)
def test_format_takes_the_layer_s_choice_where_the_spec_has_none(fields, layer, expected):
    fmt = Uniform(bits=4, **fields).number_format(signed=layer[0], narrow=layer[1])
    assert (fmt.lowest, fmt.highest) == expected


@pytest.mark.parametrize(
    ("role", "kind", "fields"),
    [
        ("activations", "accumulator_aware", {"bits": 4, "accumulator_bits": 16}),
        ("weights", "truncation", {"bits": 8}),
        ("outputs", "truncation", {"bits": 8}),
        ("biases", "uniform", {"bits": 8}),
        ("weights", "integer_bias", {}),
    ],
)
def test_a_role_has_kinds_of_its_own(role, kind, fields):
    message = message_of(spec_from_dict, {"kind": kind, **fields}, role, f"rules[2].{role}")
    assert message.startswith(f"rules[2].{role}.kind={kind!r}")
    assert all(choice in message for choice in ROLES[role]) and kind not in ROLES[role]


def test_biases_are_integers_without_naming_the_kind():
    assert spec_from_dict({"bits": 16}, "biases", "biases") == IntegerBias(bits=16)
