"""Every field with values of every kind: a configuration that passes can be saved, all else is one line."""

import copy
import importlib
import json
import random

import ml_collections
import numpy as np
import pytest

from qflax import config as config_lib
from qflax.errors import UserError
from qflax.quantizers import quantization_from_config
from qflax.quantizers.spec import KINDS

NAN, INF = float("nan"), float("inf")
NESTED = []
for _ in range(3000):
    NESTED = [NESTED]
CIRCULAR = []
CIRCULAR.append(CIRCULAR)
VALUES = (
    *("abc", "", "4", "a\0b", "x" * 5000, "\udcff", "\n", "%s{}"),
    *(None, True, False, b"x", 1j, object(), len, range(3), {1, 2}, {}, {"a": 1}, {1: 2}, [], (), ("a",)),
    *(
        NAN,
        INF,
        -INF,
        -1,
        0,
        4.0,
        -0.5,
        1e-320,
        1e30,
        1e300,
        10**12,
        2**31,
        2**63,
        10**400,
        -(10**400),
        10**5000,
    ),
    *(np.int32(3), np.float32(0.5), np.float64(0.5), np.bool_(True), np.array(3), np.array([1, 2])),
    *((NAN,) * 3, (True, True), (10**400,) * 3, NESTED, CIRCULAR),
)


DEFAULT = importlib.import_module("configs.default").get_config().to_dict()


def default():
    return copy.deepcopy(DEFAULT)


def paths(fields, prefix=()):
    for name, check in fields.items():
        yield (*prefix, name)
        if hasattr(check, "items"):
            yield from paths(check, (*prefix, name))


def outcome(fields):
    """The error's text, or None."""
    try:
        config_lib.validate(fields)
        quantization_from_config(ml_collections.ConfigDict(fields).to_dict())
    except UserError as error:
        text = str(error)
        assert len(" ".join(text.split())) < 1400
        return text
    json.dumps(config_lib.plain(fields), allow_nan=False)
    return None


@pytest.mark.parametrize("path", list(paths(config_lib.FIELDS)), ids=".".join)
def test_every_field_takes_or_refuses_any_value(path):
    refused = 0
    for value in VALUES:
        fields = default()
        group = fields
        for name in path[:-1]:
            group = group[name]
        group[path[-1]] = value
        text = outcome(fields)
        refused += text is not None
        assert text is None or path[-1] in text
    assert refused >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_spec_takes_or_refuses_any_value(kind):
    needed = {"minifloat": {"exponent_bits": 4, "mantissa_bits": 3}, "integer_bias": {}}.get(
        kind, {"bits": 4}
    )
    needed |= {"accumulator_bits": 16} if kind == "accumulator_aware" else {}
    role = {"truncation": "activations", "integer_bias": "biases"}.get(kind, "weights")
    assert outcome({**default(), role: {"kind": kind, **needed}}) is None
    for name in KINDS[kind].__dataclass_fields__:
        texts = [outcome({**default(), role: {"kind": kind, **needed, name: v}}) for v in VALUES]
        assert all(name in text for text in texts if text)
        assert sum(text is not None for text in texts) >= 25


def test_several_fields_at_random():
    rng, passed = random.Random(0), 0
    for _ in range(300):
        fields = default() | {name: rng.choice(VALUES) for name in rng.sample(list(config_lib.FIELDS), 3)}
        passed += outcome(fields) is None
    assert passed < 150


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"schedule": "step", "milestone_epochs": (82.0, 40.0)}, "must ascend"),
        ({"schedule": "step", "milestone_epochs": (82.0, 160.0)}, "behind the end"),
        ({"num_train_steps": 2**24 + 1}, "at most 16,777,216"),
        ({"num_epochs": 1e7}, "at most 1,000,000"),
        ({"num_devices": 10**6}, "at most 1,024"),
        ({"num_workers": 10**6}, "at most 1,024"),
        ({"keep_checkpoints": 10**12}, "at most"),
        ({"eval_batch_size": 10**12}, "at most"),
        ({"learning_rate": np.float32(0.1)}, r"numpy.float32.*item\(\)"),
        ({"rules": "conv"}, "tuple of mappings"),
        ({"rules": ("conv",)}, r"rules\[0\]='conv'"),
        ({"rules": ({"layers": 3, "weights": None},)}, r"rules\[0\]"),
        ({"rules": ({"layers": "*", "weights": "int4"},)}, r"rules\[0\].weights='int4'"),
        ({"rules": ({"layers": "*", "wieghts": None},)}, "did you mean 'weights'"),
        ({"weights": {"kind": ["uniform"], "bits": 4}}, "weights.kind"),
        ({"weights": {"kind": "unifrom", "bits": 4}}, "did you mean 'uniform'"),
        ({"weights": {"bits": 33}}, "1 to 16 bits"),
        ({"weights": {"kind": "accumulator_aware", "bits": 4, "accumulator_bits": 1000}}, "2 to 32"),
    ],
)
def test_contradictions(changes, part):
    with pytest.raises(UserError, match=part):
        fields = {**default(), **changes}
        config_lib.validate(fields)
        quantization_from_config(fields)
