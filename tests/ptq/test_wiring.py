"""Chains of layers, and the parts of a reconstruction."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Activation, Conv, MaxPool
from qflax.linen import quantize
from qflax.models import build_model
from qflax.ptq.gptq import gptq
from qflax.ptq.parts import block_parts, layer_parts
from qflax.ptq.reconstruction import Reconstruction, reconstruct
from qflax.ptq.wiring import Wiring
from qflax.quantizers import FLOAT, Quantization, Rule, Uniform, calibrate, value_of

KEY = jax.random.key(0)


def test_chains_end_where_arrays_part(small_net, float_variables, batches):
    chains = {c.layer: c for c in Wiring(small_net(), float_variables, batches[0][:1]).chains}
    assert list(chains) == ["stem", "block/conv1", "block/conv2", "hidden", "classifier"]
    stem = chains["stem"]
    assert (stem.norm, stem.activation, stem.last, stem.consumer) == ("norm", "act", "act", None)
    first = chains["block/conv1"]
    assert (first.norm, first.last, first.consumer) == ("block/norm1", "block/act1", "block/conv2")
    assert (chains["block/conv2"].last, chains["block/conv2"].consumer) == ("block/norm2", None)
    assert (chains["hidden"].norm, chains["hidden"].consumer) == (None, "classifier")
    assert chains["classifier"].behind == ()


def test_a_shared_activation_ends_a_chain():
    fields = {"stem": "3x3", "shortcut": "B", "residual": "unsigned", "norm": "batch", "num_classes": 10}
    model = build_model("resnet8", **fields, batch_norm_momentum=0.9, batch_norm_epsilon=1e-5)
    image = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(KEY, image, train=False))
    chains = {chain.layer: chain for chain in Wiring(model, variables, image).chains}
    assert chains["stage1_block1/conv1"].last == "stage1_block1/act1"
    assert chains["stage1_block1/conv2"].last == "stage1_block1/norm2"


def test_parts_cover_every_kernel_and_quantizer_once(small_net, float_variables, batches):
    policy = Quantization(
        weights=Uniform(bits=4),
        activations=Uniform(bits=4),
        rules=(Rule("pool/output", {"activations": {"bits": 8}}), Rule("classifier", {"weights": None})),
    )
    example = batches[0][:1]
    variables = {**small_net(policy).init(KEY, example, train=False), **float_variables}
    blocks = block_parts(small_net(policy), small_net(), variables, example)
    assert [(p.start, p.end) for p in blocks] == [
        ("stem", "act"),
        ("block", "block"),
        ("hidden", "act_hidden"),
    ]
    assert [k for p in blocks for k in p.kernels] == ["stem", "block/conv1", "block/conv2", "hidden"]
    assert [a for p in blocks for a in p.activations] == [
        "act/activations",
        "block/act1/activations",
        "block/act2/activations",
        "act_hidden/activations",
    ]
    layers = layer_parts(small_net(policy), small_net(), variables, example)
    assert [(p.start, p.end) for p in layers][1] == ("block/conv1", "block/act1")
    assert not any(p.activations for p in layers)


def test_layers_are_reconstructed_up_to_their_activations_which_stay_float(batches):
    class Net(nn.Module):
        quantization: Quantization = FLOAT

        @nn.compact
        def __call__(self, x, *, train=False):
            policy = {"quantization": self.quantization}
            x = value_of(Conv(4, (3, 3), name="first", **policy)(x))
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            x = Activation(name="act", **policy)(x)
            x = value_of(Conv(4, (3, 3), name="second", **policy)(x))
            x = Activation(name="act2", **policy)(x)
            return value_of(Conv(4, (1, 1), name="third", **policy)(MaxPool((2, 2), 2, ((0, 0),) * 2)(x)))

    spec = Uniform(bits=3)
    model = Net(Quantization(weights=spec, activations=spec, outputs=spec))
    variables = model.init(jax.random.key(0), batches[0])
    parts = layer_parts(model, Net(), variables, batches[0][:1])
    assert [(part.start, part.end) for part in parts] == [
        *(("first", "act"), ("second", "act2"), ("third", "third")),
    ]
    assert [part.unquantized for part in parts] == [
        *(("first", "norm", "act"), ("second", "act2"), ("third",)),
    ]


def test_without_kernels_to_round_there_are_no_parts(small_net, float_variables, batches):
    policy = Quantization(activations=Uniform(bits=4))
    example = batches[0][:1]
    variables = {**small_net(policy).init(KEY, example, train=False), **float_variables}
    with pytest.raises(UserError, match="layer has weights on a grid"):
        block_parts(small_net(policy), small_net(), variables, example)


class Other(nn.Module):
    """A network of plain Flax with layers and norms that no method for channels of the last axis knows."""

    @nn.compact
    def __call__(self, x, *, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(axis=1)(nn.Conv(4, (3, 3))(x)))
        x = nn.remat(nn.Conv)(4, (3, 3), name="saved")(x)
        x = nn.ConvTranspose(4, (2, 2))(x)
        x = norm(axis=3)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.thorough
def test_layers_of_other_axes_and_traces_are_left_alone(batches):
    model = quantize(Other(), weights=Uniform(bits=4), activations=Uniform(bits=8))
    variables = calibrate(model, model.init(KEY, batches[0], train=False), batches)
    reference = quantize(Other())
    chains = {chain.layer: chain for chain in Wiring(reference, variables, batches[0]).chains}
    assert {layer: chain.norm for layer, chain in chains.items()} == {
        "Conv_0": None,
        "Conv_1": "BatchNorm_1",
        "Dense_0": None,
    }
    for parts in (layer_parts, block_parts):
        found = parts(model, reference, variables, batches[0])
        assert [part.kernels for part in found] == [("Conv_0",), ("Conv_1",), ("Dense_0",)]
    told = []
    rounded = gptq(model, variables, batches, progress=told.append)
    assert told == ["gptq leaves alone saved, ConvTranspose_0"]
    settings = Reconstruction(iterations=2, batch_size=4, drop=0.0)
    reconstructed = reconstruct(model, variables, reference, variables, batches, found, settings)
    for name, kernels in [*rounded["params"].items(), *reconstructed["params"].items()]:
        if "kernel" in kernels:
            same = np.array_equal(kernels["kernel"], variables["params"][name]["kernel"])
            assert same == (name in ("saved", "ConvTranspose_0"))
