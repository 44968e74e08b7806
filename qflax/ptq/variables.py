"""Access to a tree of variables by module paths."""

import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def leaf(tree: Mapping, path: str) -> Mapping[str, typing.Any]:
    """The variables of the module at `path`, `/` between names."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def norm_of(variables: Mapping, path: str) -> tuple[jax.Array, jax.Array]:
    """Scale and bias [channels] of a batch norm, which may have none: 1 and 0."""
    mean, parameters = leaf(variables["batch_stats"], path)["mean"], variables["params"]
    for name in path.split("/"):
        parameters = parameters.get(name, {})
    return parameters.get("scale", jnp.ones_like(mean)), parameters.get("bias", jnp.zeros_like(mean))


def changed(variables: Mapping, collection: str, path: str, **functions: Callable) -> dict:
    """Variables in which those of a module, by name, are what the functions make of them."""

    def walk(tree, names):
        if not names:
            return {**tree, **{name: function(tree[name]) for name, function in functions.items()}}
        return {**tree, names[0]: walk(tree[names[0]], names[1:])}

    return {**variables, collection: walk(variables[collection], path.split("/"))}
