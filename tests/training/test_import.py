"""A workdir of torchvision's weights, and runs that start from such weights."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from torchvision_weights import images, state_dict

from qflax.errors import UserError
from qflax.training import build, train
from qflax.training.start import start_from
from qflax.training.workdir import import_weights, load_workdir


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """File of a ResNet-18's weights, and torch's logits."""
    vectors = golden("torchvision").case("resnet18")
    texts = (text.split(",") if text else [] for text in vectors["shapes"].tolist())
    shapes = dict(zip(vectors["names"].tolist(), (tuple(map(int, text)) for text in texts), strict=True))
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(state_dict(shapes), file)
    return file, vectors["logits"]


def config_of(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.crop.image_size = 64
    return config


def test_an_imported_workdir_computes_torch_s_logits(weights, tmp_path):
    file, expected = weights
    assert import_weights(file, config_of("resnet18_fp32"), tmp_path / "run") == 11_689_512
    config, state = load_workdir(tmp_path / "run")
    inputs = images(64).transpose(0, 2, 3, 1)
    logits = jax.jit(lambda v: build.model(config).apply(v, inputs, train=False))(state.served)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)  # Sums of 4,608 products in float32.
    assert state.step == 0
    with pytest.raises(UserError, match="there is a config.json already; choose another --workdir"):
        import_weights(file, config, tmp_path / "run")
    with pytest.raises(UserError, match="made without training .*; to train on from it, choose another"):
        train(config, tmp_path / "run")
    assert load_workdir(tmp_path / "run")[1].step == 0


def test_a_quantized_run_starts_from_the_file_itself(weights):
    file, _ = weights
    config = config_of("resnet18_int4")
    abstract = build.abstract_state(config).variables
    config.init_from = str(file)
    variables, kept = start_from(config, abstract)
    assert not kept
    kernel = variables["params"]["stage1_block1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 64, 64) and kernel.std() > 0
    assert variables["quantizer_params"] == abstract["quantizer_params"]


@pytest.mark.parametrize(
    ("name", "fields", "part"),
    [
        ("resnet18_int4", {}, "config.weights: imported weights are float; .*configs/resnet18_fp32.py"),
        ("resnet18_fp32", {"model": "resnet34"}, "looks like resnet18 and the model is resnet34"),
        ("resnet18_fp32", {"dataset": "cifar10"}, "1000 classes and the model 10"),
        ("resnet18_fp32", {"stem": "3x3"}, "stem is 7x7 and the model's 3x3"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line_and_nothing_is_made(weights, tmp_path, name, fields, part):
    config = config_of(name)
    config.update(fields)
    with pytest.raises(UserError, match=part) as error:
        import_weights(weights[0], config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_starting_from_another_network_s_file_names_the_field(weights):
    config = config_of("resnet18_w4a4_cifar10")
    config.init_from = str(weights[0])
    abstract = build.abstract_state(config).variables
    with pytest.raises(
        UserError, match="config.init_from=.*resnet18.safetensors': another network's weights"
    ):
        start_from(config, abstract)
