"""Reads and replaces what the modules of a model pass to each other, without touching the model's code."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np

from qflax.linen import is_stood_in_for
from qflax.quantizers import QuantizedArray, payload_of, value_of

# Stands in for a module's call: gets the call itself and its positional arguments, returns the result.
Hook = Callable[..., typing.Any]

_NONE = types.MappingProxyType({})


def apply_with_hooks(
    model: nn.Module, variables: Mapping, x: jax.Array, hooks: Mapping[str, Hook], **call
) -> typing.Any:
    """`model.apply(variables, x, **call)`, in which the modules at the paths of `hooks` are called by them.

    What a traced program does not use is not computed: to replace an input leaves out all that led to it.
    """

    def intercept(next_call, args, kwargs, context):
        hook = hooks.get("/".join(context.module.path)) if context.method_name == "__call__" else None
        if hook is None or is_stood_in_for(context.module, args):
            return next_call(*args, **kwargs)
        return hook(lambda *args: next_call(*args, **kwargs), *args)

    with nn.intercept_methods(intercept):
        return model.apply(variables, x, **call)


def first_of(result: typing.Any) -> typing.Any:
    """The array among what a module returns: blocks may return more behind it."""
    return result[0] if isinstance(result, tuple) else result


def run(
    model: nn.Module,
    variables: Mapping,
    x: jax.Array,
    *,
    given: Mapping[str, jax.Array] = _NONE,
    hooks: Mapping[str, Hook] = _NONE,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What modules get and return in a forward pass; of one that is called several times, in its last call.

    Args:
      model: called with `train=False`.
      variables: its variables.
      x: its input; where `given` says what matters, any one of that batch size.
      given: path -> plain array that the module there gets in place of its first argument, with its grid.
      hooks: see `apply_with_hooks`.
      inputs: paths of modules whose first arguments are returned.
      outputs: paths of modules whose results are returned.

    Returns:
      Plain arrays by path: of `inputs`, of `outputs`.
    """
    seen = {}, {}

    def hook_of(path):
        def hook(call, *args):
            if path in given:
                args = (_moved(args[0], given[path]), *args[1:])
            if path in inputs:
                seen[0][path] = value_of(args[0])
            result = hooks[path](call, *args) if path in hooks else call(*args)
            if path in outputs:
                seen[1][path] = value_of(first_of(result))
            return result

        return hook

    paths = {*given, *hooks, *inputs, *outputs}
    apply_with_hooks(model, variables, x, {path: hook_of(path) for path in paths}, train=False)
    return seen


def _moved(x: jax.Array | QuantizedArray, value: jax.Array) -> jax.Array | QuantizedArray:
    """Another array in the place of one, behind its grid, and in the same tracer of a quantized model."""
    payload = payload_of(x)
    moved = payload.moved(value) if isinstance(payload, QuantizedArray) else value
    return moved if payload is x else x.of(moved)


def capturing(model: nn.Module, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Callable:
    """Compiled function (variables, x) -> (inputs, outputs), see `run`."""
    return jax.jit(lambda variables, x: run(model, variables, x, inputs=inputs, outputs=outputs))


def collect(function: Callable, variables: Mapping, batches: Iterable[jax.Array]) -> typing.Any:
    """What a function of (variables, batch) returns for all batches, one behind the other, on the host."""
    parts = [jax.device_get(function(variables, batch)) for batch in batches]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
      path: the module's path, `/` between names.
      module: the module; its attributes may be read.
      inputs: identities of its arguments that are arrays, or quantized ones.
      array_first: whether the first argument is one of them, which `run` can return and replace.
      output: identity of the (first) array that it returned.
      ndim: number of that array's axes.
      lifted: whether it is made within a lifted transformation (`nn.scan`, `nn.remat`, ...): its arrays are
        those of another trace, which `run` cannot return, and its variables may be one of several.
    """

    path: str
    module: nn.Module
    inputs: tuple[int, ...]
    array_first: bool
    output: int
    ndim: int
    lifted: bool


def record_calls(model: nn.Module, variables: Mapping, example: jax.Array) -> list[ModuleCall]:
    """All calls of modules below the model, in the order in which they begin.

    Where an output and an input have the same identity, nothing happened to the array in between.

    Args:
      model: called with `train=False`.
      variables: its variables, real or abstract.
      example: input [batch, ...].
    """
    calls, alive, roots = [], [], []

    def intercept(next_call, args, kwargs, context):
        path, root = context.module.path, context.module.scope.root
        roots.append(root)
        if context.method_name != "__call__" or not path or is_stood_in_for(context.module, args):
            return next_call(*args, **kwargs)
        place = len(calls)
        calls.append(None)
        result = next_call(*args, **kwargs)
        arrays = [arg for arg in args if isinstance(arg, jax.Array | QuantizedArray)]
        inputs = [value_of(arg) for arg in arrays]
        output = value_of(first_of(result))
        alive.extend([*inputs, output])  # What is freed may lend its identity to another array.
        calls[place] = ModuleCall(
            path="/".join(path),
            module=context.module,
            inputs=tuple(map(id, inputs)),
            array_first=bool(arrays) and arrays[0] is args[0],
            output=id(output),
            ndim=np.ndim(output),
            lifted=root is not roots[0],
        )
        return result

    def forward(variables, example):
        with nn.intercept_methods(intercept):
            return model.apply(variables, example, train=False)

    jax.eval_shape(forward, variables, example)
    return calls
