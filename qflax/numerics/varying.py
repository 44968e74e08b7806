"""Which arrays differ between the devices of a `jax.shard_map`: JAX has it in their types."""

import jax


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """The same arrays, by their types varying over every axis that one of them varies over; None stays None.

    The gradient of an array is a sum over the axes that the array does not vary over. Behind this cast JAX
    takes that sum; the backward pass of a `custom_vjp` must, where its operands do not vary alike. Outside of
    `jax.shard_map` nothing is cast.
    """
    axes = frozenset().union(*(_axes(x) for x in arrays if x is not None))
    return tuple(x if x is None else jax.lax.pcast(x, tuple(axes - _axes(x)), to="varying") for x in arrays)


def _axes(x: jax.Array) -> frozenset:
    aval = jax.typeof(x)
    # JAX 0.10 has put `vma` into a type of its own.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
