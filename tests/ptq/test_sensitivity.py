"""Each layer's quantizers alone, against models in which only they are."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special

from qflax.errors import UserError
from qflax.layers import Activation, Add, AveragePool, Conv, Dense, Quantize
from qflax.ptq.sensitivity import Sensitivity, sensitivities, table
from qflax.quantizers import (
    FLOAT,
    PARAMETERS,
    STATISTICS,
    IntegerBias,
    MixedPrecision,
    Quantization,
    Rule,
    Uniform,
    calibrate,
    value_of,
)
from qflax.quantizers.spec import kind_of

RNG = np.random.default_rng(0)
CLASSES = 5
TRACES = collections.Counter()


class Net(nn.Module):
    """A stem, residual blocks and a classifier, with places that only rules quantize."""

    quantization: Quantization = FLOAT
    blocks: int = 1

    @nn.compact
    def __call__(self, x, *, train):
        TRACES[self.blocks] += 1
        policy = {"quantization": self.quantization}
        x = Quantize(name="input", **policy)(x)
        x = Activation(name="z_act", **policy)(value_of(Conv(6, (3, 3), name="stem", **policy)(x)))
        for i in range(self.blocks):
            y = Conv(6, (3, 3), use_bias=False, name=f"block{i}_conv", **policy)(x)
            y = nn.BatchNorm(use_running_average=not train, name=f"block{i}_norm")(value_of(y))
            y = Add(name=f"block{i}_add", **policy)(y, x)
            x = Activation(name=f"block{i}_act", **policy)(y)
        x = AveragePool(name="pool", **policy)(x)
        return value_of(Dense(CLASSES, name="classifier", **policy)(x))


def images(batches, size):
    return [RNG.normal(size=(size, 6, 6, 3)).astype(np.float32) for _ in range(batches)]


CALIBRATION = images(2, 8)
# Two batches have labels.
EVALUATION = [
    *((x, RNG.integers(0, CLASSES, 16)) for x in images(2, 16)),
    *((x, None) for x in images(1, 16)),
]
WEIGHTS = Uniform(bits=8, granularity="per_channel", statistic="absmax")
ACTIVATIONS = Uniform(bits=8, scale="static", statistic="absmax")
POLICY = Quantization(
    weights=WEIGHTS,
    activations=ACTIVATIONS,
    rules=(Rule("input", {"activations": {"bits": 4}}), Rule("block0_add", {"activations": {}})),
)


@functools.cache
def variables_of(blocks=1):
    """Float variables with statistics of data, as after training."""
    variables = Net(blocks=blocks).init(jax.random.key(1), CALIBRATION[0], train=True)
    noise = 0.5 * jax.random.normal(jax.random.key(2), (6, CLASSES))
    variables["params"]["classifier"]["kernel"] += noise
    variables["batch_stats"]["block0_norm"]["mean"] += 0.3
    return variables


def measure(policy=POLICY, variables=None, evaluation=EVALUATION, **options):
    return sensitivities(Net, policy, variables or variables_of(), CALIBRATION, evaluation, **options)


@functools.cache
def measured():
    return measure()


def fresh_variables(model):
    """Those of quantizers; compiled, weights need not be made."""

    @jax.jit
    def initial(x):
        variables = model.init(jax.random.key(0), x, train=False)
        return {name: variables.get(name, {}) for name in (PARAMETERS, STATISTICS)}

    return initial(CALIBRATION[0])


def logits_of(quantization):
    model = Net(quantization)
    x, _ = zip(*EVALUATION, strict=True)
    variables = {**variables_of(), **fresh_variables(model)}
    variables = calibrate(model, variables, CALIBRATION, train=False)
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, np.concatenate(x)))


def alone(path, role, spec):
    """A policy that quantizes this alone."""
    return Quantization(rules=(Rule(path, {role: {"kind": kind_of(spec), **dataclasses.asdict(spec)}}),))


def compared(logits, reference):
    """Divergence, agreement and accuracy."""
    p, q = (scipy.special.softmax(x.astype(np.float64), -1) for x in (reference, logits))
    labels = np.concatenate([labels for _, labels in EVALUATION if labels is not None])
    choices = np.argmax(logits, -1)
    return (
        np.mean(scipy.special.rel_entr(p, q).sum(-1)),
        np.mean(choices == np.argmax(reference, -1)),
        np.mean(choices[: len(labels)] == labels),
    )


def message_of(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.thorough
def test_a_row_is_what_a_model_shows_in_which_a_rule_quantizes_that_alone():
    reference = logits_of(FLOAT)
    for row in measured():
        # Wider quantizers are measured too, but other rounding of the float sums shows in their divergence.
        if row.bits == 4:
            spec = dataclasses.replace(WEIGHTS if row.role == "weights" else ACTIVATIONS, bits=4)
            divergence, agreement, accuracy = compared(logits_of(alone(row.path, row.role, spec)), reference)
            assert row.divergence == pytest.approx(divergence, rel=1e-4), row
            assert (row.agreement, row.accuracy) == (agreement, accuracy), row


def test_outputs_and_biases_are_float_and_earlier_ranges_forgotten():
    outputs = dataclasses.replace(POLICY, outputs=Uniform(bits=2, statistic="absmax"))
    stale = jax.tree.map(lambda x: x + 3, fresh_variables(Net(outputs)))
    policy = dataclasses.replace(outputs, biases=IntegerBias(bits=4))
    got = measure(policy, {**variables_of(), **stale}, bits=(4,))
    expected = [row for row in measured() if row.bits == 4]
    assert [row.path for row in got] == [row.path for row in expected]
    divergences = [row.divergence for row in expected]
    np.testing.assert_allclose([row.divergence for row in got], divergences, rtol=1e-4)


def test_rows_come_in_the_order_of_the_network_with_their_sizes():
    sizes = {(row.path, row.role): row.elements for row in measured()}
    assert list(sizes.items()) == [
        (("input", "activations"), 6 * 6 * 3),
        (("stem", "weights"), 9 * 3 * 6),
        (("z_act", "activations"), 6 * 6 * 6),
        (("block0_conv", "weights"), 9 * 6 * 6),
        (("block0_add", "activations"), 2 * 6 * 6 * 6),
        (("block0_act", "activations"), 6 * 6 * 6),
        (("classifier", "weights"), 6 * CLASSES),
    ]
    assert [row.bits for row in measured()] == [8, 4, 2] * len(sizes)


def test_narrower_is_worse():
    rows = measured()
    for wide, middle, narrow in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert 0 <= wide.divergence < middle.divergence < narrow.divergence < np.log(CLASSES)
        assert 0.9 < wide.agreement <= 1


MIXED = Quantization(
    weights=MixedPrecision(bits=4, max_bits=6, statistic="absmax"),
    activations=ACTIVATIONS,
    rules=(
        Rule("input", {"activations": {"kind": "minifloat", "exponent_bits": 4, "mantissa_bits": 2}}),
        Rule("block0_conv", {"weights": {"kind": "accumulator_aware", "bits": 5, "accumulator_bits": 16}}),
        Rule("pool/output", {"activations": {"kind": "truncation", "bits": 5}}),
        Rule("classifier", {"weights": {"min_bits": 3}}),
    ),
)


@pytest.mark.thorough
def test_each_kind_is_measured_at_the_widths_that_it_has_and_once_at_each():
    reported = []
    rows = measure(MIXED, bits=(8, 1, 2), progress=reported.append)
    widths = collections.defaultdict(list)
    for row in rows:
        assert np.isfinite(row.divergence) and row.divergence > 0
        widths[row.path].append(row.bits)
    assert widths == {
        "input": [7],
        "stem": [6, 2],
        "z_act": [8, 1, 2],
        "block0_conv": [8, 2],
        "block0_act": [8, 1, 2],
        "pool/output": [5],
        "classifier": [6, 3],
    }
    assert len(reported) == len(rows) and set(reported) == set(rows)


def test_deeper_networks_take_no_more_programs():
    def traces(blocks):
        variables, before = variables_of(blocks), TRACES[blocks]
        make = functools.partial(Net, blocks=blocks)
        rows = sensitivities(make, POLICY, variables, CALIBRATION, EVALUATION, bits=(4,), roles=("weights",))
        assert len(rows) == blocks + 2
        return TRACES[blocks] - before

    assert traces(1) == traces(3)


def test_without_labels_there_is_agreement_only():
    evaluation = [(x, None) for x, _ in EVALUATION]
    rows = measure(evaluation=evaluation, bits=(4,), roles=("activations",))
    expected = [row for row in measured() if row.bits == 4 and row.role == "activations"]
    for row, other in zip(rows, expected, strict=True):
        assert row.accuracy is None and row.agreement == other.agreement
    assert "agreement" in table(rows) and "accuracy" not in table(rows)


def test_the_table_has_a_line_per_layer_and_columns_per_width():
    row = functools.partial(Sensitivity, elements=1200, agreement=1.0)
    rows = [
        row(path="z", role="weights", bits=2, divergence=0.5, accuracy=0.25),
        row(path="z", role="weights", bits=8, divergence=1.234e-5, accuracy=0.75),
        row(path="a", role="activations", bits=7, divergence=0.0, accuracy=0.5),
    ]
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines[0][3:] == [word for b in (8, 7, 2) for word in (f"{b}-bit", "divergence", "accuracy")]
    assert lines[1:] == [
        ["z", "weights", "1,200", "1.23e-05", "75.00%", "0.5", "25.00%"],
        ["a", "activations", "1,200", "0", "50.00%"],
    ]


def test_unknown_roles_and_impossible_widths_are_refused():
    assert "did you mean 'weights'" in message_of(measure, roles=("weight",))
    for width in (0, 17, 2.5):
        assert f"bits={width}: " in message_of(measure, bits=(8, width))


def test_narrow_widths_do_not_let_weights_freeze():
    """Wider ones that are rounded otherwise than to the nearest point are measured at four bits, too."""
    floor = Rule("classifier", {"weights": {"kind": "uniform", "bits": 8, "rounding": "floor"}})
    policy = Quantization(weights=Uniform(bits=4), rules=(floor,), freeze_oscillating=True)
    rows = measure(policy, evaluation=EVALUATION[:1], bits=(4,), roles=("weights",))
    assert {row.path: row.bits for row in rows} == {"stem": 4, "block0_conv": 4, "classifier": 4}
