"""torchvision's weights: logits as in torch, and differences named with what to do."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from torchvision_weights import images, state_dict, uniform

from qflax.errors import UserError
from qflax.models import build_model
from qflax.models.torchvision import from_torchvision

SOURCE = "weights.pth"


@pytest.fixture(scope="module")
def shapes(golden):
    """Function from a network's name to the names and shapes of torchvision's state dict."""

    def read(name):
        vectors = golden("torchvision").case(name)
        texts = (text.split(",") if text else [] for text in vectors["shapes"].tolist())
        return {
            key: tuple(map(int, text)) for key, text in zip(vectors["names"].tolist(), texts, strict=True)
        }

    return read


def module_pair(ours, theirs, shape=None, features=4):
    """Arrays of a layer by our path and by torch's name: a convolution [out, in, h, w], or a norm."""
    if shape is not None:
        array = uniform(theirs, shape, -1, 1)
        order = (2, 3, 1, 0) if len(shape) == 4 else (1, 0)
        return {("params", *ours, "kernel"): array.transpose(order)}, {f"{theirs}.weight": array}
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    arrays = {leaf: uniform(f"{theirs}.{name}", (features,), -1, 1) for leaf, name in names.items()}
    collections = {leaf: "batch_stats" if leaf in ("mean", "var") else "params" for leaf in names}
    return (
        {(collections[leaf], *ours, leaf): array for leaf, array in arrays.items()},
        {f"{theirs}.{name}": arrays[leaf] for leaf, name in names.items()}
        | {f"{theirs}.num_batches_tracked": np.array(7)},
    )


def network(blocks=(2, 1), convs=2, classes=3, stem=7):
    """A narrow ResNet's variables and the same ones as torchvision names and lays them out."""
    layers = [(("conv_init",), "conv1", (4, 3, stem, stem)), (("norm_init",), "bn1", None)]
    for i, count in enumerate(blocks, start=1):
        for j in range(count):
            block, layer = f"stage{i}_block{j + 1}", f"layer{i}.{j}"
            for k in range(1, convs + 1):
                layers.append(((block, f"conv{k}"), f"{layer}.conv{k}", (4, 4, 3, 3)))
                layers.append(((block, f"norm{k}"), f"{layer}.bn{k}", None))
            if j == 0:
                layers.append(((block, "conv_shortcut"), f"{layer}.downsample.0", (4, 4, 1, 1)))
                layers.append(((block, "norm_shortcut"), f"{layer}.downsample.1", None))
    layers.append((("classifier",), "fc", (classes, 4)))
    bias = uniform("fc.bias", (classes,), -1, 1)
    variables, state = {("params", "classifier", "bias"): bias}, {"fc.bias": bias}
    for layer in layers:
        ours, theirs = module_pair(*layer)
        variables |= ours
        state |= theirs
    return state, unflatten_dict(variables)


def blank(variables):
    return jax.tree.map(np.zeros_like, variables)


def refusal(state, variables):
    with pytest.raises(UserError) as caught:
        from_torchvision(state, variables, SOURCE)
    message = str(caught.value)
    assert message.startswith(f"{SOURCE}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("convs", [2, 3])
def test_every_array_finds_its_place_and_layout(convs):
    state, variables = network(convs=convs)
    imported = from_torchvision(state, blank(variables), SOURCE)
    jax.tree.map(np.testing.assert_array_equal, imported, variables)


def test_other_collections_stay_and_nothing_is_changed_in_place():
    state, variables = network()
    before = {**blank(variables), "quantizers": {"classifier": {"step": np.ones(1)}}}
    imported = from_torchvision(state, before, SOURCE)
    assert imported["quantizers"] is before["quantizers"] and imported.keys() == before.keys()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before["params"]))
    imported["params"]["norm_init"]["scale"][:] = 5
    assert not np.any(state["bn1.weight"] == 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_dtypes_become_float32(dtype):
    state, variables = network()
    rounded = {name: array.astype(dtype) for name, array in state.items()}
    for leaf, exact in zip(
        jax.tree.leaves(from_torchvision(rounded, variables, SOURCE)), jax.tree.leaves(variables), strict=True
    ):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, exact.astype(dtype).astype(np.float32))


def test_other_depth_is_named():
    message = refusal(network(blocks=(3, 4, 6, 3))[0], network(blocks=(2, 2, 2, 2))[1])
    assert "looks like resnet34 and the model is resnet18" in message
    assert "layer1.2.bn1.bias: (4,) there, missing here" in message
    assert message.count(" there, ") == 3 and "; ...)" in message
    message = refusal(network(blocks=(3, 4, 6, 3))[0], network(blocks=(3, 4, 6, 3), convs=3)[1])
    assert "looks like resnet34 and the model is resnet50" in message
    assert "layer1.0.bn3.bias: missing there, (4,) here" in message


def test_other_classes_and_stem_are_named():
    message = refusal(network(classes=1000)[0], network(classes=10)[1])
    assert "fc.bias: (1000,) there, (10,) here; fc.weight: (1000, 4) there, (10, 4) here)" in message
    assert "1000 classes and the model 10" in message and "stem" not in message
    message = refusal(network(stem=7)[0], network(stem=3)[1])
    assert "stem is 7x7 and the model's 3x3" in message and "classes" not in message
    message = refusal(network(stem=7, classes=5)[0], network(stem=3)[1])
    assert "5 classes and the model 3" in message and "stem is 7x7" in message


def test_other_names_are_listed():
    state, variables = network()
    del state["layer1.0.bn1.running_var"]
    state["extra.weight"] = np.ones(1, np.float32)
    message = refusal(state, variables)
    assert "extra.weight: (1,) there, missing here" in message
    assert "layer1.0.bn1.running_var: missing there, (4,) here" in message
    assert "plain resnet8" in message and "..." not in message
    message = refusal({"encoder.weight": np.ones((2, 2))}, variables)
    assert "as torchvision names its weights" in message


def test_each_shape_is_checked():
    state, variables = network(blocks=(1,))
    for name in state.keys() - {"fc.weight"}:
        if name.endswith("num_batches_tracked"):
            continue
        wrong = {**state, name: np.ones((*state[name].shape[:-1], 9), np.float32)}
        assert f"({name}: " in refusal(wrong, variables)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_logits_are_those_of_torchvision(golden, shapes, name):
    vectors = golden("torchvision")
    inputs = images(int(vectors["images_size"])).transpose(0, 2, 3, 1)
    model = build_model(
        name,
        num_classes=1000,
        stem="7x7",
        shortcut="B",
        residual="signed",
        norm="batch",
        batch_norm_momentum=0.9,
        batch_norm_epsilon=1e-5,
    )
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    variables = from_torchvision(state_dict(shapes(name)), template, SOURCE)
    logits = jax.jit(lambda variables: model.apply(variables, inputs, train=False))(variables)
    expected = vectors.case(name)["logits"]
    # Logits reach 7, where float32 has steps of 5e-7: other orders of summation gave 4e-6.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.1
