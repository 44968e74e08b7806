"""What modules pass to each other can be read, and replaced."""

import jax
import numpy as np

from qflax.ptq.taps import apply_with_hooks, capturing, collect, record_calls, run
from qflax.quantizers import Quantization, Uniform, calibrate, value_of

QUANTIZED = Quantization(weights=Uniform(bits=4), activations=Uniform(bits=4))


def test_what_is_captured_is_what_flax_captures(small_net, float_variables, batches):
    inputs, outputs = collect(
        capturing(small_net(), inputs=["block"], outputs=["act", "block/conv2"]), float_variables, batches
    )
    assert inputs["block"].shape == (48, 4, 4, 16)
    np.testing.assert_array_equal(inputs["block"], outputs["act"])
    keep = {"capture_intermediates": True, "mutable": ["intermediates"], "train": False}
    state = small_net().apply(float_variables, batches[1], **keep)[1]["intermediates"]
    expected = state["block"]["conv2"]["__call__"][0]
    np.testing.assert_allclose(outputs["block/conv2"][16:32], expected, atol=1e-5)


def test_a_given_input_with_its_grid_leads_to_the_same_output(small_net, float_variables, batches):
    model = small_net(QUANTIZED)
    variables = {**model.init(jax.random.key(0), batches[0], train=False), **float_variables}
    variables = calibrate(model, variables, batches, train=False)
    expected = model.apply(variables, batches[0], train=False)
    captured = run(model, variables, batches[0], inputs=["block"])[0]["block"]
    noise = np.random.default_rng(9).normal(size=batches[0].shape).astype(np.float32)
    _, outputs = run(model, variables, noise, given={"block": captured}, outputs=["classifier"])
    np.testing.assert_array_equal(outputs["classifier"], expected)


def test_a_hook_stands_in_for_the_call(small_net, float_variables, batches):
    hooks = {"act": lambda call, x: 0 * call(x)}
    found = apply_with_hooks(small_net(), float_variables, batches[0], hooks, train=False)
    zeros = run(
        small_net(),
        float_variables,
        batches[0],
        given={"block": 0 * jax.numpy.zeros((16, 4, 4, 16))},
        outputs=["classifier"],
    )[1]["classifier"]
    np.testing.assert_array_equal(found, zeros)


def test_calls_are_recorded_in_their_order_with_the_arrays_between_them(small_net, float_variables, batches):
    calls = {call.path: call for call in record_calls(small_net(), float_variables, batches[0][:1])}
    paths = list(calls)
    assert paths.index("block") < paths.index("block/conv1") < paths.index("classifier")
    assert calls["block"].inputs[0] == calls["act"].output == calls["block/conv1"].inputs[0]
    assert calls["block/add"].inputs == (calls["block/norm2"].output, calls["act"].output)
    assert value_of(calls["block/conv2"].module.feature_group_count) == 4
