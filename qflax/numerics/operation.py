"""Operations: functions that stay one equation, with its options, in a traced program.

A program that was traced (`jax.make_jaxpr`) shows what is computed, but not what for: a rounding here, a clip
there. What quantizers do is an operation instead, so that an export reads the number format from the program
itself, whatever modules it came out of.
"""

import functools
import typing
from collections.abc import Callable

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

PRIMITIVE = Primitive("qflax")


class Operation:
    """A function of arrays with keyword options, called like it.

    Under `jax.grad` and `jax.vmap` it is the function; in other programs it is one equation of the primitive
    `PRIMITIVE`, whose parameters are `operation`, this object, and `options`, pairs of name and value.
    """

    def __init__(self, function: Callable[..., jax.Array]):
        """Wraps a function of arrays, to one array; its options must be hashable."""
        functools.update_wrapper(self, function)
        self.function = function

    def __repr__(self) -> str:
        """The name of the function."""
        return self.function.__name__

    def __call__(self, *arrays: jax.typing.ArrayLike, **options: typing.Any) -> jax.Array:
        """The function's value."""
        arrays = [jax.numpy.asarray(array) for array in arrays]
        return PRIMITIVE.bind(*arrays, operation=self, options=tuple(sorted(options.items())))


@functools.cache
def _inlined(operation: Operation, options: tuple) -> Callable[..., jax.Array]:
    return functools.partial(operation.function, **dict(options))


@functools.cache
def _compiled(operation: Operation, options: tuple) -> Callable[..., jax.Array]:
    return jax.jit(_inlined(operation, options))


@PRIMITIVE.def_impl
def _evaluate(*arrays, operation, options):
    return _compiled(operation, options)(*arrays)


@PRIMITIVE.def_abstract_eval
def _abstract(*avals, operation, options):
    # With all that JAX knows of it, such as what it varies over in a `jax.shard_map`.
    return _compiled(operation, options).trace(*avals).jaxpr.out_avals[0]


def _differentiate(primals, tangents, *, operation, options):
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def function(*values):
        arrays = list(primals)
        for i, value in zip(moving, values, strict=True):
            arrays[i] = value
        return _inlined(operation, options)(*arrays)

    return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(arrays, axes, *, operation, options):
    return jax.vmap(_inlined(operation, options), in_axes=axes)(*arrays), 0


def _lower(context, *arrays, operation, options):
    return mlir.lower_fun(_inlined(operation, options), multiple_results=False)(context, *arrays)


ad.primitive_jvps[PRIMITIVE] = _differentiate
batching.primitive_batchers[PRIMITIVE] = _batch
mlir.register_lowering(PRIMITIVE, _lower)
