"""A Linen model whose layers are quantized by rules on their paths, without a change to its code."""

import collections
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from qflax.layers import Activation, Quantize
from qflax.linen import description
from qflax.linen.carrying import NONNEGATIVE_FUNCTIONS, Carried, Trace, carrying
from qflax.linen.replacement import NORMS, norm_of, product_of
from qflax.quantizers import (
    FLOAT,
    ROLES,
    Quantization,
    QuantizedArray,
    Rule,
    Spec,
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
) -> "Quantized":
    """The model with quantizers, whose code stays as it is.

    Every `nn.Conv`, `nn.ConvTranspose`, `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum` in it gets quantizers
    of its kernel and of its input, unless the input lies on a grid already. Rules on paths change them, and
    quantize other places: `LAYER/input`; the outputs of norms (`NORM/output`), of activation functions
    (`MODULE/relu_0`, in the order of their calls) and of additions of two arrays (`MODULE/add_0`), as their
    `activations`. `describe` lists them all.

    Args:
      model: a module of plain Flax; it gets its input first.
      weights, activations, outputs, biases: default specs of `quantizers`, or mappings of a spec's fields
        with its `kind`; None is float.
      rules: exceptions, in order; rules of `quantizers`, or mappings with `layers` and what they override.
      axis_name: mapped axis that shares a batch, for running averages.

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
    # The name is only of the scope of its operations: exports leave those with a dot out of paths.
    return Quantized(model, quantization_from_config(fields, axis_name), name="qflax.Quantized")


def _fields(spec: Spec | Mapping | None) -> Mapping | None:
    return {"kind": kind_of(spec), **dataclasses.asdict(spec)} if isinstance(spec, Spec) else spec


def describe(model: "Quantized", *args, **kwargs) -> description.Description:
    """Lists what is quantized how, what is left alone and why.

    Args:
      model: a quantized model.
      *args, **kwargs: what it is called with, such as an example of its input; nothing is computed.

    Raises:
      UserError: a layer cannot be quantized as it shall be.
    """
    with description.collecting() as places:
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
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


class Quantized(nn.Module):
    """A model whose layers are quantized as the policy says; see `quantize`.

    Attributes:
      model: of plain Flax.
      quantization: the policy.
    """

    model: nn.Module
    quantization: Quantization = FLOAT

    def setup(self):
        """Shares the model's scope, so that its variables keep their paths."""
        nn.share_scope(self, self.model)

    def __call__(self, *args, **kwargs) -> typing.Any:
        """Calls the model."""
        places = functools.partial(_Places, self.quantization)
        with carrying(places) as (trace, places), nn.intercept_methods(places.intercept):
            result = self.model(*trace.carried(args), **trace.carried(kwargs))
        if not description.tell(places.found) and self.is_initializing():
            description.check(self.quantization, places.found)
        for collection, variables in self.variables.items():
            if self.is_mutable_collection(collection):  # The model may have stored what it computed.
                for name, value in variables.items():
                    self.put_variable(collection, name, _plain(value))
        return _plain(result)


def _plain(tree: typing.Any) -> typing.Any:
    """Without tracers that carry grids."""
    return jax.tree.map(value_of, tree, is_leaf=lambda x: isinstance(x, Carried))


class _Places:
    """What is done at each place of a model during one call of it.

    Attributes:
      found: the places, in the order in which they came.
    """

    def __init__(self, quantization: Quantization, trace: Trace):
        self.found = []
        self._quantization, self._trace = quantization, trace
        self._modules, self._made, self._inside = [], {}, False

    def intercept(self, next_call, args, kwargs, context):
        """Stands in for the methods of modules, see `flax.linen.intercept_methods`."""
        module = context.module
        if self._inside or module.scope is None:
            return next_call(*args, **kwargs)
        if context.method_name == "__call__":
            path = module.scope.path
            product = self._once((path,), lambda: product_of(module, self._quantization))
            if product is not None:
                return self._apart(self._product, product, *args, **kwargs)
            if isinstance(module, NORMS):
                return self._apart(self._norm, module, *args, **kwargs)
        self._modules.append((module.scope, collections.Counter()))
        try:
            return next_call(*args, **kwargs)
        finally:
            self._modules.pop()

    def _once(self, key: tuple, make: Callable) -> typing.Any:
        """What was made for a key when it came first: a module that is called again is the same one."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

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
        self, path: Sequence[str], what: str, roles: Sequence[str], *, by_default=True, note=""
    ) -> None:
        path, default = "/".join(path), by_default and not note
        specs = {role: self._quantization.spec(role, path, by_default=default) for role in roles}
        if all(spec is None for spec in specs.values()):
            note = note or ("float, by default or by a rule" if by_default else "no rule is for it")
        self.found.append(description.Place(path=path, what=what, specs=specs, note=note))

    def _product(self, product: nn.Module, inputs, einsum_str=None) -> jax.Array | QuantizedArray:
        if einsum_str is not None:  # What Flax's Einsum may be given at the call.
            product = product.clone(einsum_str=einsum_str, parent=product.scope)
        path, on_grid = product.scope.path, isinstance(payload_of(inputs), QuantizedArray)
        self._find(
            (*path, "input"), "input", ["activations"], note="lies on a grid already" if on_grid else ""
        )
        roles = ["weights", "outputs", *(["biases"] if product.use_bias else [])]
        self._find(path, type(product).__name__, roles)
        signed = not getattr(inputs, "nonnegative", False)
        if signed != product.signed_input:
            scope = product.scope
            product = self._once(
                (scope.path, signed), lambda: product.clone(signed_input=signed, parent=scope)
            )
        return product(payload_of(inputs))

    def _norm(self, module: nn.Module, *args, **kwargs) -> jax.Array | QuantizedArray:
        norm = self._once((module.scope.path, "norm"), lambda: norm_of(module))
        args, kwargs = _plain((args, kwargs))
        y, scope = norm(*args, **kwargs), module.scope.push("output", reuse=True)
        self._find(scope.path, type(module).__name__, ["activations"], by_default=False)
        return Quantize(quantization=self._quantization, parent=scope)(y)

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

        return self._at(name, make, value_of(x))

    def addition(self, call: Callable, operands: Sequence[Carried]) -> jax.Array | QuantizedArray | None:
        """See `carrying.Places`."""
        signed = not all(x.nonnegative for x in operands)
        total = call(*map(value_of, operands))
        return self._at(
            "add", lambda scope: Quantize(signed, quantization=self._quantization, parent=scope), total
        )

    def _at(self, name: str, make: Callable, x: jax.Array) -> jax.Array | QuantizedArray | None:
        """What a place of the module that is being called makes of an array."""
        if self._inside or not self._modules:
            return None
        scope, counts = self._modules[-1]
        place = scope.push(f"{name}_{counts[name]}", reuse=True)
        counts[name] += 1
        self._find(place.path, name, ["activations"], by_default=False)
        self._inside = True
        try:
            return make(place)(x)
        finally:
            self._inside = False
