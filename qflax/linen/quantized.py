"""A Linen model whose layers are quantized by rules on their paths, without a change to its code."""

import collections
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import Scope
from flax.errors import ScopeCollectionNotFound
from flax.traverse_util import flatten_dict

from qflax.errors import UserError, require
from qflax.layers import Activation, Quantize
from qflax.linen import description
from qflax.linen.carrying import NONNEGATIVE_FUNCTIONS, Carried, Trace, carrying, leaving
from qflax.linen.lifting import Unlike, arguments_outside
from qflax.linen.replacement import NORMS, computes_as, norm_of, product_of
from qflax.numerics import product
from qflax.quantizers import (
    FLOAT,
    PARAMETERS,
    ROLES,
    STATISTICS,
    MixedPrecision,
    Quantization,
    QuantizedArray,
    Rule,
    Spec,
    Uniform,
    payload_of,
    quantization_from_config,
    value_of,
)
from qflax.quantizers.spec import kind_of


def quantize(
    model: nn.Module,
    *,
    weights: Spec | Mapping | None = None,
    activations: Spec | Mapping | None = None,
    outputs: Spec | Mapping | None = None,
    biases: Spec | Mapping | None = None,
    rules: Sequence[Rule | Mapping] = (),
    axis_name: str | None = None,
    freeze_oscillating: bool = False,
) -> "Quantized":
    """The model with quantizers, whose code stays as it is.

    Every `nn.Conv`, `nn.ConvTranspose`, `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` in it gets quantizers
    of its kernel and of its input, unless the input lies on a grid already. Rules on paths change them, and
    quantize other places: `LAYER/input`; the model's own `input`; the outputs of norms (`NORM/output`), of
    activation functions (`MODULE/relu_0`, in the order of their calls) and of additions of two arrays
    (`MODULE/add_0`), as their `activations`. `describe` lists them all.

    Args:
      model: a module of plain Flax; it gets its input first.
      weights, activations, outputs, biases: default specs of `quantizers`, or mappings of a spec's fields
        with its `kind`; None is float.
      rules: exceptions, in order; rules of `quantizers`, or mappings with `layers` and what they override.
      axis_name: mapped axis that shares a batch, for running averages.
      freeze_oscillating: whether weights of at most four bits freeze in training that oscillate between
        points of their grids more often than `quantizers.set_oscillation_threshold` has said.

    Returns:
      A module that is used like `model`, with the same parameters at the same paths.

    Raises:
      UserError: impossible specs or rules.
    """
    specs = {"weights": weights, "activations": activations, "outputs": outputs, "biases": biases}
    fields = {role: _fields(specs[role]) for role in ROLES}
    fields["rules"] = [
        {"layers": rule.layers, **rule.overrides} if isinstance(rule, Rule) else rule for rule in rules
    ]
    policy = quantization_from_config(fields, axis_name)
    return of_policy(model, dataclasses.replace(policy, freeze_oscillating=freeze_oscillating))


def of_policy(model: nn.Module, quantization: Quantization, **attributes) -> "Quantized":
    """See `quantize`; `attributes` are more of `Quantized`."""
    require(not isinstance(model, Quantized), "the model is quantized already; give the plain one")
    # The name is only of the scope of its operations: exports leave those with a dot out of paths.
    return Quantized(Held(model), quantization, name="qflax.Quantized", **attributes)


def _fields(spec: Spec | Mapping | None) -> Mapping | None:
    return {"kind": kind_of(spec), **dataclasses.asdict(spec)} if isinstance(spec, Spec) else spec


def describe(model: "Quantized", *args, **kwargs) -> description.Description:
    """Lists what is quantized how, what is left alone and why.

    Args:
      model: a quantized model.
      *args, **kwargs: what it is called with, such as an example of its input; nothing is computed.

    Raises:
      UserError: the model is not quantized, or a layer cannot be quantized as it shall be.
    """
    require(
        hasattr(model, "quantization"),
        f"describe: {type(model).__name__} is not quantized; give what qflax.quantize has returned",
    )
    with description.collecting() as found:
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    places = []
    for place in found:  # A module that is called again, or traced again, is one.
        if place not in places:
            places.append(place)
    known = {place.path for place in places}
    for path, names in _parameters(variables.get("params", {})).items():
        if path not in known and f"{path}/output" not in known:
            note = f"{', '.join(names)}: not of a layer that is quantized"
            places.append(description.Place(path=path, what="parameters", note=note))
    return description.Description(tuple(places), tuple(description.problems(model.quantization, places)))


def _parameters(params: Mapping) -> dict[str, list[str]]:
    """Path of a module -> names of its own parameters."""
    found = {}
    for *path, name in flatten_dict(params):
        found.setdefault("/".join(path), []).append(name)
    return found


@dataclasses.dataclass(frozen=True)
class Held:
    """A model that Flax shall not take for a child of the module that holds it: they share a scope."""

    model: nn.Module


class Quantized(nn.Module):
    """A model whose layers are quantized as the policy says; see `quantize`.

    Attributes:
      held: a model of plain Flax.
      quantization: the policy.
      axis_name: mapped axis that shares a batch, for the statistics of batch norms that name none.
      batch_norm_momentum: of all batch norms, instead of their own.
    """

    held: Held
    quantization: Quantization = FLOAT
    axis_name: str | None = None
    batch_norm_momentum: float | None = None

    @nn.compact
    def __call__(self, *args, **kwargs) -> typing.Any:
        """Calls the model; what it gets first is its input, where that is an array of floats."""
        # In this module's own scope, so that all variables are where the model alone would have them.
        model = self.held.model.clone(parent=self.scope, name="qflax.model", _deep_clone=True)
        of_norms = {"axis_name": self.axis_name, "momentum": self.batch_norm_momentum}
        of_norms = {name: value for name, value in of_norms.items() if value is not None}
        self.scope.flags = {**self.scope.flags, "qflax": Unlike()}
        places = functools.partial(_Places, self.quantization, of_norms)
        with carrying(places) as (trace, places), nn.intercept_methods(places.intercept):
            try:
                args = (*(places.input(model, x) for x in args[:1]), *args[1:])
                result = model(*trace.carried(args), **trace.carried(kwargs))
            except ScopeCollectionNotFound as error:
                raise _told_of(error, {} if self.is_initializing() else self.variables) from None
        if not description.tell(places.found) and self.is_initializing():
            description.check(self.quantization, places.found)
        _make_variables_plain(self.scope)
        return _plain(result)


def _make_variables_plain(scope: Scope) -> None:
    """Modules may have stored what they computed."""
    for collection, variables in scope.variables().items():
        if scope.is_mutable_collection(collection):
            for name, value in variables.items():
                scope.put_variable(collection, name, _plain(value))


def _plain(tree: typing.Any) -> typing.Any:
    """Without tracers that carry grids."""
    return jax.tree.map(value_of, tree, is_leaf=lambda x: isinstance(x, Carried))


def _told_of(error: ScopeCollectionNotFound, variables: Mapping) -> Exception:
    """An error that says what to do where it is a quantizer that misses its variables; there are none yet
    while they are made.
    """
    name = next((name for name in (PARAMETERS, STATISTICS) if f'"{name}"' in str(error)), None)
    if name is None:
        return error
    if variables and not variables.get(name):
        return UserError(
            f"no {name} given; apply the model with all variables that its init or calibrate made"
        )
    return UserError(
        f"the model has a layer in a lifted transformation (nn.scan, nn.vmap) that passes no {name} on; give "
        "it variable_axes={True: 0}, which is every collection, not only {'params': 0}"
    )


def _on_grid(x: typing.Any = None, *others) -> bool:
    """Whether the first argument lies on a grid."""
    del others
    return isinstance(payload_of(x), QuantizedArray)


def _drop_out(module: nn.Dropout, call: Callable, inputs: jax.Array, *args, **kwargs):
    """What Flax's dropout gives, on the grid of its input behind a larger scale: evaluation, which drops
    nothing, finds a grid there, too.
    """
    x = payload_of(inputs)
    ones = jnp.ones_like(x.value)
    dropped = call(ones, *args, **kwargs)
    if dropped is ones:
        return x
    unscaled, scale = jnp.where(dropped > 0, x.unscaled, 0.0), x.scale / (1 - module.rate)
    return x.replace(value=product(unscaled, jax.lax.stop_gradient(scale)), unscaled=unscaled, scale=scale)


def _of_sign(x: typing.Any, inputs: typing.Any, *others) -> typing.Any:
    """With what is known of the sign of `inputs`: evaluation, which drops nothing, knows it, too."""
    del others
    return inputs.of(payload_of(x)) if isinstance(x, Carried) and isinstance(inputs, Carried) else x


def _with_sign(spec: Spec | None, signed: bool) -> Spec | None:
    """What a place makes of a spec that leaves the sign open; a zero point covers it."""
    takes_sign = isinstance(spec, Uniform | MixedPrecision) and getattr(spec, "symmetric", True)
    return dataclasses.replace(spec, signed=signed) if takes_sign and spec.signed is None else spec


class _Places:
    """What is done at each place of a model during one call of it.

    Attributes:
      found: the places, in the order in which they came.
    """

    def __init__(self, quantization: Quantization, of_norms: Mapping, trace: Trace):
        self.found = []
        self._quantization, self._of_norms, self._trace = quantization, of_norms, trace
        self._modules, self._made, self._inside = [], {}, False
        self._roots = {}  # Identity -> scope that has no parent, of modules that the present trace calls.
        self._signed = {}  # Path of a layer -> whether its first input is; it has one quantizer for all.

    def intercept(self, next_call, args, kwargs, context):
        """Stands in for the methods of modules, see `flax.linen.intercept_methods`."""
        module, drops_out = context.module, False
        if self._inside or module.scope is None:
            return next_call(*args, **kwargs)
        if self._trace.is_left():
            return self._in_transformation(next_call, args, kwargs, context)
        self._roots[id(module.scope.root)] = module.scope.root
        if context.method_name == "__call__":
            # Modules may share a scope.
            key = f"layer {type(module).__name__}"
            layer = self._once(module.scope, key, lambda: product_of(module, self._quantization))
            if layer is not None:
                return self._apart(self._product, layer, *args, **kwargs)
            if isinstance(module, NORMS):
                return self._apart(self._norm, module, *args, **kwargs)
            drops_out = computes_as(module, nn.Dropout)
            if drops_out and module.rate < 1 and _on_grid(*args):
                return self._apart(_drop_out, module, next_call, *args, **kwargs)
        self._modules.append((module.scope, collections.Counter()))
        try:
            result = next_call(*args, **kwargs)
        finally:
            self._modules.pop()
        return _of_sign(result, *args, *kwargs.values()) if drops_out else result

    def _in_transformation(self, next_call, args, kwargs, context):
        """A method that a transformation calls, which the model's code has begun."""
        trace, roots = self._trace, self._roots
        given = arguments_outside() if trace.has_begun_current() else None
        with trace.nested() as self._trace:
            self._roots = {}
            try:
                args, kwargs = self._trace.carried_as((args, kwargs), given)
                result = self.intercept(next_call, args, kwargs, context)
                for scope in self._roots.values():
                    _make_variables_plain(scope)
            finally:
                self._trace, self._roots = trace, roots
        return _plain(result) if given is None else leaving(result)

    def _once(self, scope: Scope, name: str, make: Callable) -> typing.Any:
        """What was made in a scope when it came first: a module that is called again is the same one.

        Lifted transformations may call it in several scopes of one path, each in a trace of its own.
        """
        _, made = self._made.setdefault(id(scope), (scope, {}))  # The scope stays, and so does its id.
        if name not in made:
            made[name] = make()
        return made[name]

    def _apart(self, function: Callable, *args, **kwargs) -> typing.Any:
        """What qflax's own modules make, inside of which there are no places."""
        self._inside = True
        try:
            with self._trace.outside():
                result = function(*args, **kwargs)
        finally:
            self._inside = False
        return self._trace.carried(result)

    def _find(
        self, path: Sequence[str], what: str, roles: Sequence[str], *, signed=True, by_default=True, note=""
    ) -> None:
        path, default = "/".join(path), by_default and not note
        specs = {role: self._quantization.spec(role, path, by_default=default) for role in roles}
        if "activations" in specs:
            specs["activations"] = _with_sign(specs["activations"], signed)
        if all(spec is None for spec in specs.values()):
            note = note or ("float, by default or by a rule" if by_default else "no rule is for it")
        self.found.append(description.Place(path=path, what=what, specs=specs, note=note))

    def _product(self, layer: nn.Module, inputs, einsum_str=None) -> jax.Array | QuantizedArray:
        if einsum_str is not None:  # What Flax's Einsum may be given at the call.
            layer = layer.clone(einsum_str=einsum_str, parent=layer.scope)
        path, on_grid = layer.scope.path, _on_grid(inputs)
        signed = not getattr(inputs, "nonnegative", False)
        first = self._signed.setdefault(path, signed)
        note = "lies on a grid already" if on_grid else ""
        self._find((*path, "input"), "input", ["activations"], signed=first, note=note)
        roles = ["weights", "outputs", *(["biases"] if layer.use_bias else [])]
        self._find(path, type(layer).__name__, roles)
        spec = self._quantization.spec("activations", f"{'/'.join(path)}/input")
        require(
            first >= signed or on_grid or spec is None or spec.signed is not None,
            f"{'/'.join(path)}: is called with inputs that cannot be negative, and with others that can; say "
            f"that they are signed by a rule: dict(layers='{'/'.join(path)}/input', "
            "activations=dict(signed=True))",
        )
        if first != layer.signed_input:
            scope = layer.scope
            layer = self._once(scope, "of sign", lambda: layer.clone(signed_input=first, parent=scope))
        return layer(payload_of(inputs))

    def _norm(self, module: nn.Module, *args, **kwargs) -> jax.Array | QuantizedArray:
        norm = self._once(module.scope, "norm", lambda: norm_of(module, self._of_norms))
        args, kwargs = _plain((args, kwargs))
        y, scope = norm(*args, **kwargs), module.scope.push("output", reuse=True)
        self._find(scope.path, type(module).__name__, ["activations"], by_default=False)
        return Quantize(quantization=self._quantization, parent=scope)(y)

    def input(self, model: nn.Module, x: typing.Any) -> typing.Any:
        """What the model gets first, quantized where a rule says so, unless the model is a layer itself."""
        if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if product_of(model, self._quantization) is not None:
            return x
        path = (*model.scope.path, "input")
        self._find(path, "model input", ["activations"], by_default=False)
        if self.found[-1].specs["activations"] is None:
            return x
        place = model.scope.push("input", reuse=True)
        return self._apart(Quantize(quantization=self._quantization, parent=place), x)

    def function(
        self, name: str, call: Callable, x: jax.Array | QuantizedArray
    ) -> jax.Array | QuantizedArray | None:
        """See `carrying.Places`."""
        if self._inside or not self._modules:
            return None
        signed, function = name not in NONNEGATIVE_FUNCTIONS, call
        if name == "relu":  # By this name methods of post-training quantization know it.
            call(value_of(x))  # JAX expects that its function is called; nothing uses the result.
            function = nn.relu

        def make(scope):
            return Activation(function, self._quantization, signed=signed, by_default=False, parent=scope)

        return self._at(name, signed, make, value_of(x))

    def addition(self, call: Callable, operands: Sequence[Carried]) -> jax.Array | QuantizedArray | None:
        """See `carrying.Places`."""
        signed = not all(x.nonnegative for x in operands)
        total = call(*map(value_of, operands))
        make = lambda scope: Quantize(signed, quantization=self._quantization, parent=scope)  # noqa: E731
        return self._at("add", signed, make, total)

    def _at(self, name: str, signed: bool, make: Callable, x: jax.Array) -> jax.Array | QuantizedArray | None:
        """What a place of the module that is being called makes of an array."""
        if self._inside or not self._modules:
            return None
        scope, counts = self._modules[-1]
        place = scope.push(f"{name}_{counts[name]}", reuse=True)
        counts[name] += 1
        self._find(place.path, name, ["activations"], signed=signed, by_default=False)
        self._inside = True
        try:
            return make(place)(x)
        finally:
            self._inside = False
