"""Any Linen module is quantized by rules on its paths, whatever its code does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_networks import MobileNet, PlainCNN

from qflax.deploy import export
from qflax.errors import UserError
from qflax.layers import layer_costs
from qflax.linen import describe, description, quantize
from qflax.ptq import set_ranges
from qflax.ptq.recipe import Networks, Settings, apply_recipe
from qflax.ptq.reconstruction import Reconstruction
from qflax.quantizers import (
    AccumulatorAware,
    IntegerBias,
    Minifloat,
    MixedPrecision,
    QuantizedArray,
    Rule,
    Uniform,
    calibrate,
    freeze_widths,
    frozen_share,
    set_oscillation_threshold,
)
from qflax.verify import verify

W4, A8 = Uniform(bits=4, granularity="per_channel"), Uniform(bits=8)
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def ready(model, *inputs, **call):
    """Calibrated variables."""
    return calibrate(model, jax.jit(model.init)(jax.random.key(0), *inputs), [inputs[0]], **call)


class Everything(nn.Module):
    """Places of all sorts."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(8, name="shared")
        x = nn.relu(shared(x))
        x = nn.silu(shared(x)) + x
        x = nn.LayerNorm(name="norm")(x) @ self.param("matrix", nn.initializers.ones_init(), (8, 8))
        self.sow("intermediates", "seen", x)
        return nn.Dense(4, use_bias=False, name="last")(nn.gelu(x))


def test_description():
    model = quantize(
        Everything(),
        weights=W4,
        activations=A8,
        rules=[
            Rule("shared", {"weights": {"bits": 6}}),
            dict(layers="last", weights=None),
            dict(layers="*add_0", activations=dict(bits=5)),
            dict(layers="nowhere", weights=dict(bits=2)),
        ],
    )
    found = describe(model, jnp.zeros((2, 8)))
    places = {place.path: place for place in found.places}
    assert list(places) == [
        *(
            "input",
            "shared/input",
            "shared",
            "relu_0",
            "silu_0",
            "add_0",
            "norm/output",
            "last/input",
            "last",
            "",
        ),
    ]
    assert places["shared"].specs["weights"].bits == 6 and places["add_0"].specs["activations"].bits == 5
    assert places["last"].specs["weights"] is None and "float" in places["last"].note
    assert places["relu_0"].note == "no rule is for it"
    assert places[""].note.startswith("matrix: ")
    (problem,) = found.problems
    assert problem.startswith("rules[3]: no layer matches 'nowhere'")
    assert "uniform bits=6 granularity=per_channel" in str(found) and "PROBLEM: rules[3]" in str(found)


def test_rule_that_matches_nothing_is_refused():
    model = quantize(Everything(), weights=W4, rules=[dict(layers="shard", weights=dict(bits=2))])
    with pytest.raises(UserError, match=r"rules\[0\]: no layer matches 'shard' \(did you mean 'shared'"):
        model.init(jax.random.key(0), jnp.zeros((2, 8)))


def test_parameters_keep_their_names_and_values():
    x = jnp.ones((2, 8))
    plain = Everything().init(jax.random.key(0), x)["params"]
    model = quantize(Everything(), weights=W4, activations=A8)
    variables = model.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(plain)


def test_float_policy_computes_what_the_model_does():
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    variables = Everything().init(jax.random.key(0), x)
    y = quantize(Everything()).apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(y, Everything().apply({"params": variables["params"]}, x), rtol=1e-6)


def test_what_the_model_stores_are_plain_arrays():
    model, x = quantize(Everything(), weights=W4, activations=A8), jnp.ones((2, 8))
    variables = ready(model, x)
    _, state = model.apply(variables, x, mutable=["intermediates"], capture_intermediates=True)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    assert leaves and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def test_layer_behind_operations_that_move_values_multiplies_codes():
    """The grid of a quantized function reaches the next layer, which has no quantizer of its own then."""

    class Moving(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = jnp.pad(nn.max_pool(x, (2, 2), (2, 2)), ((0, 0), (1, 1), (0, 0), (0, 0)))
            x = jnp.concatenate([x, x[:, ::-1]], axis=-1).swapaxes(1, 2)
            first, second = jnp.split(x, 2, axis=1)
            x = jnp.tile(jnp.stack([first, second], 1)[..., jnp.array([3, 0, 0])], (1, 1, 1, 2, 1))
            x = jnp.take(x, np.array([0, 1, 1]), axis=2).reshape(len(x), -1)
            return nn.Dense(3)(x)

    model = quantize(
        Moving(), weights=W4, activations=A8, rules=[dict(layers="relu_0", activations=dict(bits=3))]
    )
    x = IMAGES[:, :8, :8]
    variables = ready(model, x)
    costs = {cost.path: cost for cost in layer_costs(model, variables, x[:1])}
    assert costs["Dense_0"].input_bits == 3 and costs["Dense_0"].accumulation is not None
    assert "activations" not in variables["quantizer_params"]["Dense_0"].get("input", {})


def test_sums_beyond_32_bits_are_plain_numbers():
    """Whatever the batch."""

    class Summing(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sum(nn.relu(nn.Dense(1)(x))) / x.size

    rule = dict(layers="relu_0", activations=dict(kind="uniform", bits=16, scale="constant", scale_value=1.0))
    model, x = quantize(Summing(), rules=[rule]), jnp.ones((2**17, 1))
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}}
    assert model.apply(variables, x) == model.apply(variables, x[:2]) == 2


def test_sign_of_inputs_is_known():
    """Behind a ReLU no code is spent on negative numbers."""

    class Signs(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.Dense(8)(nn.relu(x) * 2 + 1)
            return nn.Dense(8)(nn.sigmoid(x) - 1)

    model = quantize(Signs(), weights=W4, activations=A8)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    costs = {cost.path: cost for cost in layer_costs(model, ready(model, x), x[:1])}
    signs = [costs[f"Dense_{i}"].accumulation.input_signed for i in range(3)]
    assert signs == [True, False, True]


SCALES = {
    "number": (lambda t: 2.0, True),
    "integer of a shape": (lambda t: np.prod((2, 1)), True),
    "parameter": (lambda t: t, False),
    "constant": (lambda t: jnp.float32(2), False),
    "one element": (lambda t: np.full((1, 1), 2.0, np.float32), False),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("operation", [jnp.multiply, jnp.divide], ids=["mul", "div"])
def test_eager_and_traced_calls_are_quantized_alike(scale, operation):
    """Only of numbers the sign is known: a parameter has a value in an eager call alone."""
    value, known = SCALES[scale]

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            return nn.Dense(3)(operation(x, value(self.param("t", nn.initializers.constant(2.0), ()))))

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    spec = dict(kind="uniform", bits=4, scale="static", statistic="absmax")
    for rules in ([], [dict(layers="relu_0", activations=spec)]):
        model = quantize(Scaled(), weights=spec, activations=spec, rules=rules)
        inits = [init(jax.random.key(0), x) for init in (model.init, jax.jit(model.init))]
        assert jax.tree.structure(inits[0]) == jax.tree.structure(inits[1])
        variables = calibrate(model, inits[0], [x])
        own_quantizer = not (rules and known and operation is jnp.divide)
        assert ("input" in variables["quantizer_stats"]["Dense_1"]) == own_quantizer
        expected = jax.jit(model.apply)(variables, x)
        for given in (variables, jax.device_get(variables)):
            np.testing.assert_allclose(model.apply(given, x), expected, rtol=1e-6)
        if own_quantizer:
            costs = {cost.path: cost for cost in layer_costs(model, variables, x[:1])}
            assert costs["Dense_1"].accumulation.input_signed != known


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x / (x + 1),
        lambda x: x / x,
        lambda x: x / jnp.max(x),
        lambda x: x / jnp.sum(x),
        lambda x: x[:, :1] / x[:, 1:2],
        lambda x: x / np.full((1, 1), 2.0, np.float32),
        lambda x: x * np.full((1, 1), 2.0, np.float32),
        lambda x: x * x,
        lambda x: x * jnp.max(x),
        lambda x: 1 / x,
        lambda x: (x * 1j).imag,
        lambda x: jnp.pad(x, ((0, 0), (1, 0)), constant_values=jnp.min(x)),
    ],
)
def test_operations_that_leave_the_grid(operation):
    class Leaving(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, bias_init=nn.initializers.constant(5.0))(x))
            self.sow("intermediates", "x", x)
            x = operation(x)
            self.sow("intermediates", "y", x)
            return nn.Dense(3)(x)

    model = quantize(Leaving(), weights=W4, activations=A8, rules=[dict(layers="relu_0", activations={})])
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    variables = ready(model, x)
    assert "input" in variables["quantizer_params"]["Dense_1"]
    _, state = model.apply(variables, x, mutable=["intermediates"])
    (before,), (after,) = (state["intermediates"][name] for name in "xy")
    np.testing.assert_allclose(after, operation(before), rtol=1e-6)


def test_function_of_the_users_own_with_a_name_of_jax():
    """Is not taken for the one of JAX: its results may be negative, and it is no activation function."""

    @jax.jit
    def relu(x):
        return x - 1

    @jax.custom_jvp
    def exp(x):
        return x - 1

    exp.defjvp(lambda x, tangent: (x[0] - 1, tangent[0]))

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(exp(nn.Dense(8)(relu(nn.relu(x)))))

    model, x = quantize(Own(), weights=W4, activations=A8), jax.random.normal(jax.random.key(0), (4, 8))
    costs = {cost.path: cost for cost in layer_costs(model, ready(model, x), x[:1])}
    assert all(costs[f"Dense_{i}"].accumulation.input_signed for i in range(2))
    assert sum("relu" in place.path for place in describe(model, x).places) == 1


def test_equation_at_the_call_and_kernels_of_batch_axes():
    class Unusual(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Einsum((8, 6), name="einsum")(x, "bd,de->be")
            return nn.DenseGeneral(3, axis=-1, batch_dims=(0,), name="apart")(x)

    x = jax.random.normal(jax.random.key(0), (4, 8))
    model = quantize(Unusual(), weights=W4, activations=A8)
    costs = {cost.path: cost for cost in layer_costs(model, ready(model, x), x)}
    assert costs["einsum"].weight_bits == 4 and costs["einsum"].input_bits == 8
    (alone,) = (place for place in describe(model, x).places if place.path == "apart")
    assert alone.what == "parameters" and "kernel" in alone.note


class Residual(nn.Module):
    """Has places of all sorts, and gets and returns what cannot be negative."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        self.sow("intermediates", "seen", y)
        return nn.relu(nn.Dense(8)(y) + x)


class OfBlocks(nn.Module):
    block: type

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8)(x))
        for i in range(2):
            x = self.block(name=f"block{i}")(x, train)
        return nn.Dense(3)(x)


@pytest.mark.thorough
@pytest.mark.parametrize("lifted", [nn.remat, nn.jit], ids=["remat", "jit"])
@pytest.mark.parametrize(
    "rules", [[], ["*relu_*"], ["*relu_*", "*add_0"]], ids=["layers", "functions", "all"]
)
def test_lifted_modules_are_quantized_as_others(lifted, rules):
    """Signs and grids are known inside, and behind them."""
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    blocks = Residual, lifted(Residual, static_argnums=2)
    assert blocks[1].__call__ is not Residual.__call__
    fields = dict(weights=W4, activations=Uniform(bits=4, scale="lsq"))
    rules = [dict(layers=layers, activations={}) for layers in rules]
    ours, theirs = (quantize(OfBlocks(block), **fields, rules=rules) for block in blocks)
    assert str(describe(theirs, x)) == str(describe(ours, x))
    variables = calibrate(ours, ours.init(jax.random.key(0), x), [x])
    assert jax.tree.structure(
        calibrate(theirs, theirs.init(jax.random.key(0), x), [x])
    ) == jax.tree.structure(variables)

    learned = {name: variables.pop(name) for name in ("params", "quantizer_params")}

    def loss(learned, model, **call):
        y = model.apply({**variables, **learned}, x, **call)
        return jnp.sum((y[0] if call else y) ** 2), y

    training = dict(train=True, mutable=["batch_stats", "quantizer_stats", "intermediates"])
    for call in ({}, training):
        of_loss = jax.value_and_grad(functools.partial(loss, **call), has_aux=True)
        results = [of_loss(learned, model) for model in (ours, theirs)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    variables.update(learned)
    kept = jax.eval_shape(
        lambda v: theirs.apply(v, x, mutable=["intermediates"], capture_intermediates=True), variables
    )
    assert "seen" in kept[1]["intermediates"]["block0"]


def test_a_function_that_was_compiled_for_another_model():
    """Flax's nn.jit would take the program of a module that differs in its quantizers only."""
    block = nn.jit(Residual, static_argnums=2)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    OfBlocks(block).init(jax.random.key(0), x)
    for rules in ([], [dict(layers="block1/Dense_0", weights=dict(bits=2))]):
        model = quantize(OfBlocks(block), weights=W4, rules=rules)
        costs = {cost.path: cost for cost in layer_costs(model, model.init(jax.random.key(0), x), x)}
        assert [costs[f"block{i}/Dense_0"].weight_bits for i in range(2)] == [4, 2 if rules else 4]


class Repeated(nn.Module):
    """A block behind itself, with weights of its own each time, and layers side by side."""

    axes: dict

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(8)(nn.relu(nn.Dense(8)(x))) + x, None

        lifted = dict(variable_axes=self.axes, split_rngs={"params": True})
        x, _ = nn.scan(Block, length=3, **lifted)(name="blocks")(x, None)
        return nn.vmap(nn.Dense, in_axes=None, axis_size=3, **lifted)(8, name="heads")(x).mean(0)


def test_repeated_layers():
    x = jax.random.normal(jax.random.key(0), (4, 8))
    specs = [dict(kind="uniform", bits=8, statistic="absmax", signed=signed) for signed in (None, True)]
    model = quantize(Repeated({True: 0}), weights=specs[0], activations=specs[1])
    variables = ready(model, x)
    assert variables["quantizer_params"]["blocks"]["Dense_0"]["weights"]["scale"].shape == (3,)
    plain = Repeated({True: 0}).apply({"params": variables["params"]}, x)
    difference = model.apply(variables, x) - plain
    assert 0 < np.abs(difference).max() < 0.05 * np.abs(plain).max()
    model = quantize(Repeated({True: 0}), activations=A8)
    signs = {
        place.path: place.specs["activations"].signed
        for place in describe(model, x).places
        if place.what == "input"
    }
    assert signs == {"blocks/Dense_0/input": False, "blocks/Dense_1/input": True, "heads/input": True}
    rules = [dict(layers="blocks/relu_0", activations={}), dict(layers="blocks/add_0", activations={})]
    model = quantize(Repeated({True: 0}), weights=specs[0], activations=specs[0], rules=rules)
    difference = model.apply(ready(model, x), x) - plain
    assert 0 < np.abs(difference).max() < 0.05 * np.abs(plain).max()


def test_repeated_layers_have_averages_of_their_own():
    batches = [np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i in range(2)]
    static = dict(kind="uniform", bits=8, scale="static", statistic="absmax")
    model = quantize(Repeated({True: 0}), activations=static)
    variables = model.init(jax.random.key(0), batches[0])
    found, last = (
        calibrate(model, variables, images, over=over, momentum=1.0)["quantizer_stats"]
        for images, over in ((batches, "ema"), (batches[1:], "batches"))
    )
    ranges = [stats["blocks"]["Dense_0"]["input"]["activations"]["x_max"] for stats in (found, last)]
    assert ranges[0].shape == (3,) and len(np.unique(ranges[0])) == 3
    np.testing.assert_allclose(*ranges, rtol=1e-6)
    with pytest.raises(UserError, match="over='set': blocks/.*use 'batches' or 'ema'"):
        calibrate(model, variables, batches, over="set")


def test_weights_that_oscillate_freeze_in_repeated_layers():
    x = jax.random.normal(jax.random.key(0), (4, 8))
    model = quantize(Repeated({True: 0}), weights=W4, activations=A8, freeze_oscillating=True)
    variables = ready(model, x)
    stats = set_oscillation_threshold(variables["quantizer_stats"], 0.015)
    variables = {**variables, "quantizer_stats": stats}
    step = jax.jit(functools.partial(model.apply, mutable=["quantizer_stats"]))
    noise = np.random.default_rng(0)
    for _ in range(8):
        params = jax.tree.map(lambda p: p + 0.05 * noise.normal(size=p.shape), variables["params"])
        variables = {**variables, **step({**variables, "params": params}, x)[1]}
    assert 0.1 < frozen_share(variables["quantizer_stats"]) < 0.9
    stats = variables["quantizer_stats"]
    for layer in (stats["blocks"]["Dense_0"], stats["heads"]):
        record = layer["weights"]["oscillation"]
        shares = np.mean(record["held"], (-2, -1))
        assert shares.shape == (3,) and len(np.unique(shares)) > 1 and record["threshold"].shape == (3,)


def test_a_repetition_that_keeps_no_quantizers_is_told():
    x = jnp.ones((4, 8))
    model = quantize(Repeated({"params": 0}), weights=W4, activations=A8)
    with pytest.raises(UserError, match=r"nn.scan, nn.vmap.*variable_axes=\{True: 0\}"):
        model.init(jax.random.key(0), x)
    model = quantize(Repeated({True: 0}), weights=W4, activations=A8)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(UserError, match="no quantizer_params given; apply the model with all variables"):
        model.apply({"params": variables["params"]}, x)


def test_dropout_keeps_the_grid_and_its_expectation():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Dense(16)(x))
            self.sow("intermediates", "before", x)
            x = nn.Dropout(0.25, deterministic=not train)(x)
            self.sow("intermediates", "after", x)
            return nn.Dense(3)(x)

    model = quantize(
        Dropping(), weights=W4, activations=A8, rules=[dict(layers="relu_0", activations=dict(bits=3))]
    )
    x = jax.random.normal(jax.random.key(0), (32, 8))
    variables = ready(model, x)
    assert "input" not in variables["quantizer_params"]["Dense_1"]
    for train in (False, True):
        call = dict(train=train, rngs={"dropout": jax.random.key(1)})
        _, state = model.apply(variables, x, mutable=["intermediates"], **call)
        before, after = (state["intermediates"][name][0] for name in ("before", "after"))
        kept = (after != 0) | (before == 0)
        np.testing.assert_allclose(after[kept], before[kept] / (0.75 if train else 1.0), rtol=1e-6)
        assert (0.05 < (~kept).mean() < 0.25) if train else kept.all()
        loss = lambda v, call=call: jnp.sum(model.apply(v, x, **call) ** 2)  # noqa: E731
        gradient = jax.grad(loss, allow_int=True)(variables)
        assert np.abs(gradient["params"]["Dense_0"]["kernel"]).max() > 0
        assert np.abs(gradient["quantizer_params"]["relu_0"]["activations"]["scale"]) > 0


def test_dropout_keeps_the_sign():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
            return nn.Dense(3, name="last")(x)

    model, x = quantize(Dropping(), weights=W4, activations=A8), jnp.ones((4, 8))
    with description.collecting() as found:
        variables = model.init(jax.random.key(0), x)
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    specs = [place.specs["activations"] for place in found if place.path == "last/input"]
    assert [spec.signed for spec in specs] == [False, False]


def test_what_calibration_cannot_reach_is_told():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(5))(x)

    model, x = quantize(Normalized(), weights=Uniform(bits=8, scale="static")), jnp.ones((4, 8))
    with pytest.warns(UserWarning, match="weights: not calibrated: .*nn.WeightNorm"):
        calibrate(model, model.init(jax.random.key(0), x), [x])


def test_what_an_earlier_calibration_has_reached_is_calibrated():
    class WithHead(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            y = nn.Dense(5)(x)
            return y + nn.Dense(5, name="head")(x) if train or self.is_initializing() else y

    model, x = quantize(WithHead(), weights=Uniform(bits=8, scale="static")), jnp.ones((4, 8))
    variables = model.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="head/weights: not calibrated"):
        calibrate(model, variables, [x])
    calibrate(model, calibrate(model, variables, [x], train=True), [x])  # Without a word.


def test_a_plain_model_is_not_described():
    with pytest.raises(UserError, match="describe: Dense is not quantized; give what qflax.quantize"):
        describe(nn.Dense(3), jnp.ones((1, 2)))


def test_partitioned_kernels_stay_so():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b", "c"))
    model = nn.DenseGeneral((5, 2), kernel_init=init)
    x = jnp.ones((4, 8))
    ours = quantize(model, weights=W4).init(jax.random.key(0), x)["params"]["kernel"]
    theirs = model.init(jax.random.key(0), x)["params"]["kernel"]
    assert ours.names == theirs.names
    np.testing.assert_array_equal(ours.value, theirs.value)


def test_projected_kernels_stay_partitioned():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            init = nn.with_partitioning(nn.initializers.normal(5.0), ("a", "b"))
            return nn.Dense(4, kernel_init=init, name="layer")(x)

    weights = AccumulatorAware(bits=4, accumulator_bits=8)
    model = quantize(Net(), weights=weights, activations=Uniform(bits=4))
    x = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    found, projected = set_ranges(model, variables, [x])
    before, after = (tree["params"]["layer"]["kernel"] for tree in (variables, found))
    assert projected and after.names == before.names
    assert np.abs(after.value).sum() < 0.9 * np.abs(before.value).sum()


@pytest.mark.parametrize(
    "fields",
    [
        dict(weights=AccumulatorAware(bits=4, accumulator_bits=14), activations=Uniform(bits=4)),
        dict(weights=W4, activations=A8, biases=IntegerBias(bits=32)),
        dict(weights=MixedPrecision(bits=4), activations=MixedPrecision(bits=6)),
        dict(
            weights=Minifloat(exponent_bits=4, mantissa_bits=3),
            activations=Minifloat(exponent_bits=4, mantissa_bits=3),
            outputs=Minifloat(exponent_bits=4, mantissa_bits=3),
        ),
    ],
    ids=["a2q+", "integer biases", "learned widths", "minifloat"],
)
def test_quantizers_of_all_kinds(fields, tmp_path):
    model = quantize(PlainCNN(), **fields)
    variables = ready(model, IMAGES)
    if isinstance(fields["weights"], MixedPrecision):
        variables = freeze_widths(variables)
    file = tmp_path / "net.packed"
    export(model.apply, variables, (32, 32, 3), file, format="packed", low=-3.0, high=3.0)
    report = verify(file)
    assert report.ok
    if isinstance(fields["weights"], AccumulatorAware):
        assert [layer.promised for layer in report.layers] == [14] * 4
        assert all(layer.needed <= 14 for layer in report.layers)


@pytest.mark.parametrize(
    ("network", "recipe"),
    [
        pytest.param(MobileNet, ("ranges", "norm_reestimation", "gptq"), marks=pytest.mark.thorough),
        (PlainCNN, ("equalization", "ranges", "bias_correction", "brecq")),
        (PlainCNN, ("ranges", "adaround")),
    ],
)
def test_post_training_quantization(network, recipe):
    """Every method works on models of plain Flax as on those of qflax's layers."""
    model = quantize(network(), weights=W4, activations=dict(kind="uniform", bits=8, scale="static"))
    reference = quantize(network())
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    weights = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    networks = Networks(
        model=model,
        reference=reference,
        immediate=model,
        immediate_reference=reference,
        variables=variables,
        reference_variables=weights,
    )
    networks = apply_recipe(
        networks,
        recipe,
        [IMAGES, IMAGES[::-1]],
        Settings(over="batches", damping=0.01, reconstruction=Reconstruction(iterations=2, batch_size=2)),
    )
    logits, expected = model.apply(networks.variables, IMAGES), reference.apply(weights, IMAGES)
    assert np.abs(logits - expected).mean() < np.abs(expected).mean()


class Tokens(nn.Module):
    """An embedding, whose values come from no float input."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3)(
            nn.relu(nn.Embed(10, 8)(tokens) + nn.relu(self.param("p", nn.initializers.ones, (8,))))
        )


class OfMapping(nn.Module):
    @nn.compact
    def __call__(self, batch, *, factor=1.0):
        return factor * nn.Dense(3)(batch["image"])


class OfKeywords(nn.Module):
    @nn.compact
    def __call__(self, *, images):
        return nn.remat(nn.Dense)(3, name="input")(images)


class Given(nn.Module):
    """A head that is made elsewhere."""

    head: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.head(nn.relu(nn.Dense(8)(x)))


class Shared(nn.Module):
    """A wrapper in its layer's scope."""

    def setup(self):
        self.layer = nn.Dense(8)
        nn.share_scope(self, self.layer)

    def __call__(self, x):
        return self.layer(x)


class Differentiating(nn.Module):
    @nn.compact
    def __call__(self, x):
        tangent = jax.jvp(nn.sigmoid, (x,), (x,))[1]
        return nn.Dense(3)(tangent) + nn.Dense(3)(jax.vjp(jnp.tanh, x)[1](x)[0])


FLOATS = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("plain", "args", "kwargs", "layers"),
    [
        (Tokens(), (np.arange(6).reshape(2, 3),), {}, ["Dense_0"]),
        (OfMapping(), ({"image": FLOATS},), {"factor": 2.0}, ["Dense_0"]),
        (OfKeywords(), (), {"images": FLOATS}, ["input"]),
        (nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), (FLOATS,), {}, ["layers_0", "layers_2"]),
        (Given(nn.Dense(2)), (FLOATS,), {}, ["Dense_0", "head"]),
        (Shared(), (FLOATS,), {}, [""]),
        (nn.DenseGeneral(5, axis=(-1, 1)), (FLOATS,), {}, [""]),
        (Differentiating(), (FLOATS,), {}, ["Dense_0", "Dense_1"]),
    ],
    ids=["tokens", "mapping", "keywords", "sequential", "given", "shared", "layer", "derivatives"],
)
def test_models_of_many_styles(plain, args, kwargs, layers):
    specs = dict(kind="uniform", bits=8, scale="static", statistic="absmax")
    model, key = quantize(plain, weights=specs, activations=specs), jax.random.key(0)
    variables = model.init(key, *args, **kwargs)
    jax.tree.map(
        np.testing.assert_array_equal, variables["params"], plain.init(key, *args, **kwargs)["params"]
    )
    expected = plain.apply({"params": variables["params"]}, *args, **kwargs)
    as_float = quantize(plain).apply({"params": variables["params"]}, *args, **kwargs)
    np.testing.assert_allclose(as_float, expected, rtol=1e-5, atol=1e-6)
    found = [place.path for place in describe(model, *args, **kwargs).places if "weights" in place.specs]
    assert found == layers
    if args:
        y = model.apply(calibrate(model, variables, [args[0]], **kwargs), *args, **kwargs)
        assert 0 < np.abs(y - expected).max() < 0.05 * np.abs(expected).max()


def test_a_layer_whose_inputs_have_both_signs():
    class Twice(nn.Module):
        first: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8, name="layer")
            return layer(nn.relu(layer(x))) if self.first else layer(layer(nn.relu(x)))

    spec = dict(kind="uniform", bits=8, statistic="absmax")
    variables = ready(quantize(Twice(True), activations=spec), FLOATS)
    assert float(variables["quantizer_stats"]["layer"]["input"]["activations"]["x_max"]) > 0
    with pytest.raises(UserError, match="layer: is called with inputs that cannot be negative.*signed=True"):
        quantize(Twice(False), activations=spec).init(jax.random.key(0), FLOATS)
    rule = dict(layers="layer/input", activations=dict(signed=True))
    quantize(Twice(False), activations=spec, rules=[rule]).init(jax.random.key(0), FLOATS)


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(UserError, match="quantized already"):
        quantize(quantize(PlainCNN()))
