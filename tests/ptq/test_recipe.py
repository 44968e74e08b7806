"""Recipes: orders that make sense, and what each method is given."""

import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.ptq.divergence import compare_outputs
from qflax.ptq.recipe import METHODS, Networks, Settings, apply_recipe, check_recipe
from qflax.ptq.reconstruction import Reconstruction
from qflax.quantizers import (
    AccumulatorAware,
    Minifloat,
    MixedPrecision,
    Quantization,
    Rule,
    Uniform,
    widths_frozen,
)

SETTINGS = Settings(reconstruction=Reconstruction(iterations=60, batch_size=16, learning_rate=0.05))
INT3 = Quantization(
    weights=Uniform(bits=3, granularity="per_channel", statistic="mse"),
    activations=Uniform(bits=4, statistic="mse"),
)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            ("ranges", "adaroud"),
            r"no method 'adaroud' \(did you mean 'adaround'\?\); choices: equalization",
        ),
        (("equalization",), "without 'ranges' no quantizer has a scale"),
        (
            ("bias_correction", "ranges"),
            "'bias_correction' needs quantizers with a scale; put 'ranges'",
        ),
        (("ranges", "equalization"), "'equalization' moves the ranges; put it before 'ranges'"),
        (("ranges", "gptq", "ranges"), "'ranges' would undo the 'gptq' before it"),
        (("ranges", "adaround", "brecq"), "'brecq' would undo the 'adaround' before it"),
    ],
)
def test_an_impossible_recipe_is_told_in_a_line(recipe, message):
    with pytest.raises(UserError, match=f"config.ptq.recipe.*{message}") as error:
        check_recipe(recipe, "config.ptq.recipe")
    assert "\n" not in str(error.value)


def networks(small_net, policy, float_variables, batches):
    model = small_net(policy)
    fresh = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(batches[0])
    return Networks(
        model=model,
        reference=small_net(),
        immediate=small_net(policy, momentum=0.0),
        immediate_reference=small_net(momentum=0.0),
        variables={**fresh, **float_variables},
        reference_variables=float_variables,
    )


def divergence(found, batch):
    goal = found.reference.apply(found.reference_variables, batch, train=False)
    logits = found.model.apply(found.variables, batch, train=False)
    return compare_outputs(np.asarray(goal), np.asarray(logits), np.zeros(len(batch), np.int32))["divergence"]


def test_every_method_works_and_the_float_function_stays(small_net, float_variables, batches):
    recipe, told = ("equalization", "ranges", "norm_reestimation", "bias_correction", "gptq"), []
    recipe += ("analytic_bias_correction",)
    start = networks(small_net, INT3, float_variables, batches)
    end = apply_recipe(start, recipe, batches, SETTINGS, done=lambda *row: told.append(row))
    assert [method for method, _ in told] == list(recipe)
    goal, found = (n.reference.apply(n.reference_variables, batches[0], train=False) for n in (start, end))
    np.testing.assert_allclose(found, goal, atol=1e-4)
    by_method = {method: divergence(n, batches[0]) for method, n in told if method != "equalization"}
    assert by_method["gptq"] < 0.8 * by_method["ranges"]
    assert set(METHODS) == {*recipe, "adaround", "brecq"}


def test_calibration_over_the_set_gets_to_the_quantizers(small_net, float_variables, batches):
    n = networks(small_net, INT3, float_variables, batches)
    scales = [
        apply_recipe(n, ("ranges",), batches, Settings(over=over)).variables["quantizer_params"]["act"]
        for over in ("batches", "set")
    ]
    assert scales[0]["activations"]["scale"] != scales[1]["activations"]["scale"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["minifloat", "accumulator_aware", "mixed"])
def test_recipes_are_for_every_format(small_net, float_variables, batches, kind):
    eight = Uniform(bits=8, statistic="mse")
    inputs = (Rule("pool/output", {"activations": {"bits": 8}}),)
    policies = {
        "minifloat": Quantization(
            weights=Minifloat(exponent_bits=2, mantissa_bits=1, scale="static", granularity="per_channel"),
            activations=Minifloat(exponent_bits=3, mantissa_bits=2, scale="range"),
        ),
        # The stem's input is float.
        "accumulator_aware": Quantization(
            weights=AccumulatorAware(bits=4, accumulator_bits=12),
            activations=eight,
            rules=(*inputs, Rule("stem", {"weights": {"kind": "uniform", "bits": 8}})),
        ),
        "mixed": Quantization(weights=MixedPrecision(bits=3), activations=MixedPrecision(bits=4)),
    }
    n = networks(small_net, policies[kind], float_variables, batches)
    by_method = {}
    end = apply_recipe(
        n,
        ("ranges", "norm_reestimation", *(["gptq"] if kind == "minifloat" else [])),
        batches,
        SETTINGS,
        done=lambda method, found: by_method.update({method: divergence(found, batches[0])}),
    )
    assert list(by_method.values())[-1] < by_method["ranges"]
    assert kind != "mixed" or widths_frozen(end.variables["quantizer_stats"])
    if kind == "accumulator_aware":
        from qflax.layers import layer_costs

        costs = layer_costs(n.model, end.variables, batches[0][:1], train=False)
        bounded = [cost for cost in costs if cost.macs and cost.path != "stem"]
        assert len(bounded) == 4 and all(c.accumulation.exact_bits <= 12 for c in bounded)
