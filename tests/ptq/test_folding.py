"""Folding of batch norms."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from qflax.errors import UserError
from qflax.layers import Conv
from qflax.models import build_model
from qflax.ptq import fold_norms

FIELDS = {"stem": "3x3", "num_classes": 10, "batch_norm_momentum": 0.9, "batch_norm_epsilon": 1e-3}


@pytest.mark.thorough
@pytest.mark.parametrize(("shortcut", "residual"), [("A", "signed"), ("B", "unsigned")])
def test_the_network_without_norms_computes_the_same(shortcut, residual):
    normed, folded = (
        build_model("resnet8", shortcut=shortcut, residual=residual, norm=norm, **FIELDS)
        for norm in ("batch", "folded")
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(lambda x: normed.init(jax.random.key(0), x, train=False))(x)
    variables = jax.tree.map(
        lambda v: v if v.ndim > 2 else np.float32(rng.uniform(0.5, 1.5, v.shape)), variables
    )
    weights = fold_norms(normed, variables, x[:1])
    abstract = jax.eval_shape(lambda: folded.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(np.shape, weights["params"]) == jax.tree.map(np.shape, abstract["params"])
    assert not weights["batch_stats"] and not abstract.get("batch_stats")
    expected = normed.apply(variables, x, train=False)
    found = folded.apply(weights, x, train=False)
    # Products of kernels and gains are rounded, and so is each of up to 576 sums of theirs.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.max(np.abs(expected)))


class Shared(nn.Module):
    """The outputs of the first layer go to its norm, and to a function as well; without norms if folded."""

    folded: bool = False
    shared: bool = True

    @nn.compact
    def __call__(self, x, *, train):
        for name in ("first", "second"):
            y = Conv(4, (3, 3), use_bias=self.folded, name=name)(x)
            x = y
            if not self.folded:
                norm = {} if self.shared else {"use_scale": False, "use_bias": False}
                x = nn.BatchNorm(use_running_average=not train, name=f"{name}_norm", **norm)(y)
            if name == "first" and self.shared:
                x += nn.sigmoid(y)
        return x


@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_whose_outputs_are_read_elsewhere_is_named(shared):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 5, 3)).astype(np.float32)
    variables = Shared(shared=shared).init(jax.random.key(0), x, train=False)
    variables = jax.tree.map(lambda v: v + np.float32(rng.uniform(0.1, 1, v.shape)), variables)
    if shared:
        with pytest.raises(UserError, match="^first_norm: .*a convolution or dense layer of its own"):
            fold_norms(Shared(), variables, x)
    else:
        found = Shared(folded=True, shared=False).apply(
            fold_norms(Shared(shared=False), variables, x), x, train=False
        )
        np.testing.assert_allclose(
            found, Shared(shared=False).apply(variables, x, train=False), rtol=1e-4, atol=1e-5
        )


class Preactivation(nn.Module):
    """A norm that follows no layer."""

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name="first_norm")(x))


def test_a_norm_that_follows_no_layer_is_named():
    x = np.ones((2, 4), np.float32)
    variables = Preactivation().init(jax.random.key(0), x, train=False)
    with pytest.raises(UserError, match="first_norm: .*config.norm='batch'") as error:
        fold_norms(Preactivation(), variables, x)
    assert "\n" not in str(error.value)
