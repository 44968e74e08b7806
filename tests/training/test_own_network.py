"""Networks of the user's own: `config.model = "MODULE:NAME"`."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.data import Dataset
from qflax.deploy import export
from qflax.errors import UserError
from qflax.linen import quantize
from qflax.quantizers import Uniform, calibrate
from qflax.training import build, evaluate_workdir, post_training, train
from qflax.training.parallel import Devices
from qflax.training.state import initial_variables
from qflax.training.stream import stream_of
from qflax.training.workdir import load_workdir, serving
from qflax.verify import verify

SOURCE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp


class Net(nn.Module):
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(16, (3, 3), strides=2, use_bias=False, dtype=self.dtype)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Conv(32, (3, 3), strides=4, dtype=self.dtype)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


class Untrained(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        return images


class Features(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        return images[:, 0, 0], images


class Remembers(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        calls = self.variable("memory", "calls", jnp.zeros, ())
        return images[:, 0, :10, 0] + calls.value


class Noisy(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dropout(0.5, rng_collection="noise", deterministic=not train)(images.mean((1, 2)))
        return nn.Dense(self.num_classes)(x)


class OfList(nn.Module):
    num_classes: int
    widths: object = dataclasses.field(default_factory=lambda: {1, 2})

    @nn.compact
    def __call__(self, images, train=False):
        return images[:, 0, :10, 0]


class Narrow(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


class Wide(nn.Module):
    num_classes: int
    width: int


class Masked(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, mask, train=False):
        return nn.Dense(self.num_classes)((images * mask).mean((1, 2)))


def nothing(num_classes):
    return num_classes


def ten():
    return Net(10)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder, with a module of networks."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "own_networks.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
    sys.modules.pop("own_networks", None)


def own(config, name="Net"):
    config.model = f"own_networks:{name}"
    return config


@pytest.fixture(scope="module")
def float_run(make_tiny_config, tmp_path_factory):
    config = own(make_tiny_config())
    config.weights = config.activations = None
    config.num_devices, config.optimizer = min(2, len(jax.devices())), "adam"
    config.learning_rate, config.augmentation.crop_padding = 0.02, 0
    config.num_train_steps, config.eval_every_epochs, config.checkpoint_every_steps = 150, 10.0, 150
    workdir = tmp_path_factory.mktemp("float")
    return workdir, train(config, workdir)


def test_trains(float_run):
    workdir, result = float_run
    assert result["test_accuracy"] > 0.3
    assert evaluate_workdir(workdir)[0]["accuracy"] == result["test_accuracy"]
    _, state = load_workdir(workdir)
    assert set(state.variables["params"]) == {"Conv_0", "BatchNorm_0", "Conv_1", "classifier"}


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["calibrated", "trained"])
def test_is_quantized_exported_and_verified(how, make_tiny_config, float_run, tmp_path):
    config, workdir = own(make_tiny_config()), tmp_path / "run"
    config.init_from = str(float_run[0])
    config.rules = ({"layers": "input", "activations": {"bits": 8}}, {"layers": "relu_1", "activations": {}})
    config.learning_rate = 0.02
    if how == "trained":
        result = train(config, workdir)
    else:
        config.ptq.recipe = ("equalization", "ranges", "norm_reestimation", "bias_correction", "gptq")
        config.ptq.report_examples = 128
        result = post_training.quantize(config, workdir)
    assert result["test_accuracy"] > float_run[1]["test_accuracy"] - 0.1
    costs = {cost.path: cost for cost in evaluate_workdir(workdir)[1]}
    assert [costs[name].weight_bits for name in ("Conv_0", "Conv_1", "classifier")] == [4, 4, 4]
    assert [costs[name].activation_bits for name in ("input", "Conv_1/input", "relu_1")] == [8, 4, 4]
    serve, variables, shape, _ = serving(workdir)
    made = export(serve, variables, shape, tmp_path / "net.qflax", format="packed")
    layers = [node.layer for node in made.graph.nodes if node.operation in ("conv", "dense")]
    assert layers == ["Conv_0", "Conv_1", "classifier"]
    assert verify(tmp_path / "net.qflax").ok


def observed(config, num_devices):
    """Batch statistics after two steps."""
    config.batch_size, config.augmentation = 64, dict(config.augmentation, crop_padding=0, mixup_alpha=0.0)
    devices, network = Devices(num_devices), build.model(config)
    state = build.state(config, initial_variables(network, (32, 32, 3), 1))
    state, step = devices.replicate(state), build.train_step(config, devices)
    numbers = build.hyperparameters(config), build.penalties(config, 2)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    dataset = Dataset(images=images, labels=np.arange(64, dtype=np.int32) % 10, num_classes=10, name="noise")
    _, data = next(stream_of(dataset, 3, 64, devices).dispatches(0, 1, 1))
    state, _ = devices.pmap(step)(state, data, np.float32(0.0), *numbers)
    return jax.device_get(state).observed["batch_stats"]


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_norms_see_the_batch_of_all_devices(make_tiny_config):
    config = own(make_tiny_config())
    config.weights = config.activations = None
    one, two = (observed(config, n) for n in (1, 2))
    # Sums of a batch in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, two)


def test_norms_of_the_network_keep_their_momentum_or_none(make_tiny_config):
    config = own(make_tiny_config())
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    means = {}
    for immediate in (False, True):
        network = build.float_model(config, immediate=immediate)
        variables = initial_variables(network, (32, 32, 3), 0)
        _, state = network.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
        )
        means[immediate] = state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(means[False], 0.1 * means[True], rtol=1e-5)


def test_nothing_drops_out_of_calibration():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))

    model = quantize(Dropping(), activations=Uniform(bits=8, statistic="absmax"))
    x = jnp.ones((4, 8))
    variables = model.init(jax.random.key(0), x, train=False)
    ranges = [
        calibrate(model, variables, [x], train=train)["quantizer_stats"]["Dense_0"] for train in (False, True)
    ]
    jax.tree.map(np.testing.assert_array_equal, *ranges)


def test_dropout_draws_anew_on_every_device_and_in_every_step(make_tiny_config):
    config = own(make_tiny_config())
    step = build.train_step(config, Devices(1))
    config.batch_size = 8
    state = build.state(config, initial_variables(build.model(config), (32, 32, 3), 1))
    images = np.zeros((64, 32, 32, 3), np.uint8)
    dataset = Dataset(images=images, labels=np.zeros(64, np.int32), num_classes=10, name="none")
    _, data = next(stream_of(dataset, 3, 32, Devices(1)).dispatches(0, 1, 1))
    keys = [
        jax.random.key_data(step.inputs(state.replace(step=jnp.int32(at)), index, data)[2]["dropout"])
        for at, index in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(key.tolist()) for key in keys}) == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own_networks:Nett", r"own_networks.py has no class or function 'Nett' \(did you mean 'Net'"),
        ("own_network:Net", "no module 'own_network'; run in the folder"),
        ("own_networks.more:Net", "no module 'own_networks.more'"),
        ("own_networks:", "must be MODULE:NAME"),
        ("own_networks:Untrained", "has no argument 'train'; give it train=False"),
        ("own_networks:nothing", "makes a int; must make a flax.linen.Module"),
        ("own_networks:ten", "has no argument 'num_classes'"),
        ("own_networks:Wide", "Wide': missing a required argument: 'width'; give it a default"),
        ("own_networks:Masked", "__call__ of Masked: missing a required argument: 'mask'; give it a default"),
        (
            "own_networks:Features",
            r"makes \[2, 3\] and \[2, 32, 32, 3\] of images .* make logits \[2, 10\]",
        ),
        ("own_networks:Noisy", "cannot be called with train=True: .*noise.*drawn from quantization, dropout"),
        ("own_networks:OfList", "an attribute of OfList cannot be hashed .*make it a tuple"),
        ("own_networks:Remembers", "has variables in memory, which training does not keep"),
        ("resnet21", "did you mean 'resnet32'.*MODULE:NAME of a Flax network of your own"),
    ],
)
def test_an_impossible_network_is_told(model, message, make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.weights = config.activations = None
    config.model = model
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_only_the_resnets_have_is_told(make_tiny_config, tmp_path):
    config = own(make_tiny_config())
    config.norm = "folded"
    with pytest.raises(UserError, match="config.norm='folded': is for the ResNets"):
        train(config, tmp_path / "run")
    config = own(make_tiny_config(), "Narrow")
    config.dtype = "bfloat16"
    with pytest.raises(UserError, match="has no argument 'dtype'.*config.dtype='float32'"):
        train(config, tmp_path / "run")


def test_computes_in_bfloat16(make_tiny_config):
    config = own(make_tiny_config())
    text = str(
        jax.make_jaxpr(
            lambda x: build.model(config, dtype="bfloat16").init(jax.random.key(0), x, train=False)
        )(jnp.zeros((1, 32, 32, 3)))
    )
    assert "bf16" in text
