"""What a walk gives to layers is what they get, however the network is connected."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from qflax.layers import Activation, Conv
from qflax.ptq import walk as walk_module
from qflax.ptq.taps import run
from qflax.ptq.variables import changed
from qflax.ptq.walk import Walk
from qflax.quantizers import Quantization, Uniform, calibrate, value_of

pytestmark = pytest.mark.exact
QUANTIZED = Quantization(weights=Uniform(bits=4), activations=Uniform(bits=4))


class Pair(nn.Module):
    """Two layers."""

    def setup(self):
        self.a = Conv(4, (3, 3), quantization=QUANTIZED)
        self.act = Activation(quantization=QUANTIZED)
        self.b = Conv(4, (3, 3), quantization=QUANTIZED)

    def __call__(self, x, *, shortcut=None):
        x = self.second(self.first(x))
        return x if shortcut is None else x + shortcut

    def first(self, x):
        return self.act(self.a(x))

    def second(self, x):
        return value_of(self.b(x))


class SecondAlone(Pair):
    """Whose first layer is called before it is."""

    def __call__(self, x):
        return self.second(x)


class Switched(Pair):
    """Whose first argument is not an array."""

    def __call__(self, on, x):
        return self.second(self.first(x)) if on else x


class Connected(nn.Module):
    """Blocks that are connected in some way."""

    how: str

    @nn.compact
    def __call__(self, x, *, train):
        del train
        kinds = {"rematerialized": nn.remat(Pair), "one layer before": SecondAlone, "switched": Switched}
        first, second, last = Pair(name="z"), kinds.get(self.how, Pair)(name="y"), Pair(name="x")
        if self.how == "twice":
            return last(second(first(first(x))))
        if self.how == "by name":
            return last(x=second(x=first(x=x)))
        if self.how == "one layer before":
            return last(second(second.first(first(x))))
        if self.how == "switched":
            return last(second(True, first(x)))
        if self.how == "a shortcut around a block":
            begun = first(x)
            return last(second(begun), shortcut=begun)
        return last(second(first(x)))


STARTS = {
    "one after the other": ("z", "y", "x"),
    "a shortcut around a block": ("z", "y", "x"),
    "twice": ("y", "x"),
    "by name": (),
    "one layer before": ("z", "x"),
    "switched": ("z", "x"),
    "rematerialized": ("z", "x"),
}
LAYERS = [f"{block}/{layer}" for block in "zyx" for layer in "ab"]
BATCHES = [np.random.default_rng(i).normal(size=(2, 5, 5, 4)).astype(np.float32) for i in range(2)]


def ready(how):
    model = Connected(how)
    variables = model.init(jax.random.key(0), BATCHES[0], train=False)
    return model, calibrate(model, variables, BATCHES, train=False)


def visited(model, variables):
    """What is given on the way, of which every layer has to get what it gets from the images."""
    # What is in another trace can be called there alone.
    layers = [layer for layer in LAYERS if not (model.how == "rematerialized" and layer.startswith("y/"))]
    walk, given_on_the_way = Walk(model, variables, BATCHES, layers), []
    for layer in layers:
        for i, (x, given) in enumerate(walk.to(layer, variables)):
            np.testing.assert_array_equal(x, BATCHES[i])
            found = run(model, variables, x, given=given, inputs=[layer])[0][layer]
            np.testing.assert_array_equal(found, run(model, variables, x, inputs=[layer])[0][layer])
            given_on_the_way.append(tuple(given))
        assert i + 1 == len(BATCHES)
        variables = changed(variables, "params", layer, kernel=functools.partial(np.multiply, 1.5))
    return given_on_the_way


@pytest.mark.parametrize("how", STARTS)
def test_layers_get_what_they_get_from_the_images(how):
    found = visited(*ready(how))
    assert tuple(start for (start,) in dict.fromkeys(filter(None, found))) == STARTS[how]
    if how == "one after the other":
        assert found == [(block,) for block in "zyx" for _ in "ab" for _ in BATCHES]


def test_no_more_is_held_than_is_allowed(monkeypatch):
    model, variables = ready("one after the other")
    size = sum(batch.nbytes for batch in BATCHES)
    monkeypatch.setattr(walk_module, "_MOST_BYTES", size)
    assert set(visited(model, variables)) == {("z",), ("y",), ("x",)}
    monkeypatch.setattr(walk_module, "_MOST_BYTES", size - 1)
    assert set(visited(model, variables)) == {()}


def test_what_lies_behind_is_not_computed():
    model, variables = ready("one after the other")
    walk, products = Walk(model, variables, BATCHES, LAYERS), []
    for layer in LAYERS:
        x, given = next(walk.to(layer, variables))
        function = jax.jit(
            lambda variables, x, given, layer=layer: run(model, variables, x, given=given, inputs=[layer])[0]
        )
        products.append(function.lower(variables, x, given).as_text().count("stablehlo.convolution"))
    assert products == [0, 1, 0, 1, 0, 1]
