"""Carries grids of arrays, and what is known of their signs, through a model's plain code.

Within `carrying`, arrays that depend on the model's input are tracers of JAX's that stand for them.
Operations that only move values keep them on their grid, so that a layer behind a reshape or a max pool
multiplies codes; others compute with the values, as if nothing had happened. JAX has no public interface for
tracers of one's own: this module alone knows how they are made.
"""

import contextlib
import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core
from jax.extend.core import jaxpr_as_fun

from qflax.layers.pool import has_codes, mean_of_codes
from qflax.numerics import product, vary_alike
from qflax.quantizers import QuantizedArray, payload_of, value_of

# Functions of one array that are seen as a whole, with their names in JAX.
FUNCTIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "softplus", "sigmoid", "tanh"),
    *("hard_tanh", "hard_sigmoid", "hard_silu", "log_sigmoid", "squareplus", "mish", "soft_sign"),
)
NONNEGATIVE_FUNCTIONS = ("relu", "relu6", "softplus", "sigmoid", "hard_sigmoid", "squareplus")
# Of what is not negative they make what is not negative.
_KEEPING_SIGN = (
    *("add", "mul", "div", "min", "sqrt", "rsqrt", "cumsum", "reduce_sum", "reduce_max", "reduce_min"),
    *("reduce_window", "reduce_window_max", "reduce_window_sum", "dot_general", "conv_general_dilated"),
)
_NONNEGATIVE = ("exp", "abs", "logistic", "square")
_MOVING = (
    *("reshape", "transpose", "squeeze", "expand_dims", "rev", "slice", "split", "broadcast_in_dim", "tile"),
    *("copy", "pvary"),
)
_JOINING = ("concatenate", "stack")
_LARGEST = ("reduce_max", "reduce_window_max")
_JAX = os.path.dirname(jax.__file__) + os.sep
_TAKES_AVAL = "aval" in inspect.signature(core.Tracer.__init__).parameters


class Carried(core.Tracer):
    """Stands for an array that depends on the model's input.

    Attributes:
      payload: the array, or the quantized one.
      nonnegative: whether no element can be negative.
    """

    def __init__(self, trace: "Trace", payload: jax.Array | QuantizedArray, nonnegative: bool = False):
        """Belongs to a trace."""
        self.payload, self.nonnegative = payload, nonnegative
        super().__init__(trace, *([core.typeof(value_of(payload))] if _TAKES_AVAL else []))

    if not _TAKES_AVAL:

        @property
        def aval(self):
            """Shape and dtype."""
            return core.typeof(value_of(self.payload))

    def full_lower(self) -> "Carried":
        """See `jax.core.Tracer`."""
        return self

    def of(self, payload: jax.Array | QuantizedArray, trace: "Trace | None" = None) -> "Carried":
        """Another array in its place, or the same in another trace."""
        return Carried(trace or self._trace, payload, self.nonnegative)


@dataclasses.dataclass(frozen=True)
class Leaving:
    """A result of a function that is transformed: what stands there for an array, with all that is known.

    JAX takes it apart, and puts it together outside; there it is `Carried` at once.
    """

    payload: jax.Array | QuantizedArray
    nonnegative: bool


def _arrived(nonnegative: bool, children: Sequence) -> typing.Any:
    payload = jax.tree.map(value_of, children[0])
    with core.take_current_trace() as current:
        trace = current
    if not isinstance(value_of(payload), jax.Array):  # JAX tries trees of other things, too.
        return Leaving(payload, nonnegative)
    return Carried(trace, payload, nonnegative) if isinstance(trace, Trace) else value_of(payload)


jax.tree_util.register_pytree_node(Leaving, lambda x: ((x.payload,), x.nonnegative), _arrived)


def leaving(tree: typing.Any) -> typing.Any:
    """Results of a function that is transformed, with all that is known of them."""
    return jax.tree.map(lambda x: Leaving(x.payload, x.nonnegative) if isinstance(x, Carried) else x, tree)


class Places(typing.Protocol):
    """What may be done at places in a model that are no modules."""

    def function(self, name: str, call: Callable, x: jax.Array | QuantizedArray) -> typing.Any:
        """The result of an activation function, `call(value)`."""

    def addition(self, call: Callable, operands: Sequence[Carried]) -> typing.Any:
        """The result of an addition of two arrays of one shape, `call(value, value)`."""


@contextlib.contextmanager
def carrying(make_places: Callable[["Trace"], Places]) -> Iterator[tuple["Trace", Places]]:
    """Within this, operations on arrays that `Trace.carried` has wrapped carry their grids."""
    with core.take_current_trace() as parent:
        trace = Trace(parent)
        trace.places = make_places(trace)
        with core.set_current_trace(trace):
            yield trace, trace.places


class Trace(core.Trace):
    """Computes with payloads, in the trace that was there before.

    Attributes:
      places: what is done at places that are no modules.
    """

    __slots__ = ("_casts", "_inside", "_parent", "places")

    def __init__(self, parent: core.Trace):
        """Makes one with no places yet."""
        super().__init__()
        self._parent, self.places, self._inside = parent, None, 0
        self._casts = {}  # Id of a cast constant: what it became, what it was.

    def carried(self, x: typing.Any) -> typing.Any:
        """Has the arrays and quantized arrays in a tree carried."""
        return jax.tree.map(self._carried, x, is_leaf=lambda x: isinstance(x, QuantizedArray))

    def _carried(self, x: typing.Any, nonnegative: bool = False) -> typing.Any:
        if isinstance(x, Carried):
            return x if x._trace is self else Carried(self, x.payload, x.nonnegative)
        if isinstance(x, QuantizedArray):
            return Carried(self, x, nonnegative)
        is_floats = isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)
        return Carried(self, self._array(x), nonnegative) if is_floats else x

    def _array(self, x: jax.Array | np.ndarray) -> jax.Array:
        with core.set_current_trace(self._parent):
            return jnp.asarray(x)

    def carried_as(self, x: typing.Any, outside: typing.Any) -> typing.Any:
        """Has the arrays in a tree carried as those outside of a transformation that they come from."""

        def carried(x, other):
            if not isinstance(other, Carried):
                return self._carried(x)
            grid = other.payload
            return other.of(grid.replace(value=x) if isinstance(grid, QuantizedArray) else x, self)

        leaves, tree = jax.tree.flatten(x)
        others = jax.tree.leaves(outside)  # Modules among them are leaves only in one of the two.
        return tree.unflatten(map(carried, leaves, others)) if len(others) == len(leaves) else self.carried(x)

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Within this, operations are made as if there were no such trace."""
        with core.set_current_trace(self._parent):
            yield

    def is_left(self) -> bool:
        """Whether operations are made in the trace of a transformation that the model's code has begun."""
        with core.take_current_trace() as current:
            return current is not self

    def has_begun_current(self) -> bool:
        """Whether no other transformation lies between the current trace and this one."""
        with core.take_current_trace() as current:
            return getattr(current, "parent_trace", None) is self

    @contextlib.contextmanager
    def nested(self) -> Iterator["Trace"]:
        """Within this, operations in the trace of a transformation carry grids, too, for the same places."""
        with core.take_current_trace() as current:
            trace = Trace(current)
            trace.places = self.places
            self._inside += 1  # Of `vmap` it sees the same operations, of whole batches.
            try:
                with core.set_current_trace(trace):
                    yield trace
            finally:
                self._inside -= 1

    def stage_value(self, val):
        """See `jax.core.Trace`."""
        return val

    def process_primitive(self, primitive, tracers, params, /):
        """See `jax.core.Trace`."""
        inner = params["jaxpr"] if primitive.name in ("jit", "pjit") else None
        name = primitive.name if inner is None else _name_in_jax(inner.jaxpr.debug_info)
        if name in FUNCTIONS and len(inner.out_avals) != 1:
            name = ""  # Of a function and its derivative.

        def call(*values):
            return primitive.bind(*values, **params)

        def first(*values):
            result = call(*values)
            return result[0] if primitive.multiple_results else result

        if not self._inside:
            tracers = [self._unless_known(x) for x in tracers]
        if not any(isinstance(x, Carried) for x in tracers):
            return self._not_carried(name, call, tracers)
        operands = [self._casts.get(id(x), (x,))[-1] for x in tracers]  # As far as they are known.
        with core.set_current_trace(self._parent):
            result = self._at_place(name, first, tracers)
        if result is not None:
            result = Carried(self, result, _nonnegative(name, operands, params))
            return [result] if primitive.multiple_results else result
        if inner is not None and any(_known(x) for x in tracers):
            self._inside += 1  # Of a function of JAX's; its additions are its own.
            try:
                with core.set_current_trace(self):
                    return jaxpr_as_fun(inner)(*tracers)
            finally:
                self._inside -= 1
        with core.set_current_trace(self._parent):
            kept = _kept(name, primitive, operands, params)
            result = call(*(value_of(x) for x in tracers)) if kept is None else kept
        nonnegative = _nonnegative(name, operands, params)
        if not primitive.multiple_results:
            return self._carried(result, nonnegative)
        return [self._carried(x, nonnegative) for x in result]

    def _not_carried(self, name: str, call: Callable, operands: Sequence):
        """What `call` makes of operands that do not depend on the model's input."""
        constant = not any(isinstance(x, jax.Array) for x in operands)
        cast = constant and name == "pvary"  # By JAX, where it meets an array in a `jax.shard_map`.
        if self._inside and constant and not cast:
            with core.set_current_trace(core.eval_trace):  # Constants of JAX's functions stay known.
                return jax.tree.map(_as_constant, call(*operands))
        with core.set_current_trace(self._parent):
            result = call(*operands)
        if cast:
            self._casts[id(result)] = result, *operands
        return result

    def _unless_known(self, x: typing.Any) -> typing.Any:
        """An operand in the model's code, as an array of JAX's unless it is a constant.

        Any array may be a parameter, which has a value in an eager call and none in a traced one: what is
        quantized must not depend on it. Numbers are constants, also NumPy's integers, products of shapes.
        """
        is_array = isinstance(x, np.ndarray | np.generic) and not isinstance(x, float)
        if not is_array or (x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)):
            return x
        return self._array(x)

    def _at_place(self, name: str, call: Callable, tracers: Sequence):
        """The result where this is an activation function or an addition of two arrays; else None."""
        carried = [x for x in tracers if isinstance(x, Carried)]
        alike = len(carried) == len(tracers) == 2 and carried[0].shape == carried[1].shape
        function, addition = name in FUNCTIONS and len(tracers) == 1, name == "add" and alike
        if self._inside or not (function or addition) or _in_function_of_jax():
            return None
        if function:
            return self.places.function(name, call, carried[0].payload)
        return self.places.addition(call, carried)

    def process_custom_jvp_call(self, primitive, fun, jvp, tracers, /, *, symbolic_zeros):
        """See `jax.core.Trace`."""
        name = _name_in_jax(fun.debug_info)

        def call(*values):
            return self._parent.process_custom_jvp_call(
                primitive, fun, jvp, values, symbolic_zeros=symbolic_zeros
            )

        if not any(isinstance(x, Carried) for x in tracers):
            with core.set_current_trace(self._parent):
                return call(*tracers)
        with core.set_current_trace(self._parent):
            result = self._at_place(name, lambda *values: call(*values)[0], tracers)
            results = call(*(value_of(x) for x in tracers)) if result is None else [result]
        return [self._carried(x, name in NONNEGATIVE_FUNCTIONS) for x in results]

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, /, **options):
        """See `jax.core.Trace`."""
        with core.set_current_trace(self._parent):
            values = [value_of(x) for x in tracers]
            results = self._parent.process_custom_vjp_call(primitive, fun, fwd, bwd, values, **options)
        return self.carried(results) if any(isinstance(x, Carried) for x in tracers) else results


def _known(x: typing.Any) -> bool:
    """Whether more is known of it than its values."""
    return isinstance(x, Carried) and (x.nonnegative or isinstance(x.payload, QuantizedArray))


def _name_in_jax(function: core.DebugInfo | None) -> str:
    """Name of a function of JAX's; "" of any other, which may have the same name and do something else."""
    file = getattr(function, "func_filename", None) or ""
    return function.func_name.rpartition(".")[2] if file.startswith(_JAX) else ""


def _in_function_of_jax() -> bool:
    """Whether the operation belongs to an activation function that JAX does not make a unit of."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_filename.endswith("qflax/linen/quantized.py"):
        if frame.f_code.co_filename.endswith("jax/_src/nn/functions.py"):
            return True
        frame = frame.f_back
    return False


def _nonnegative(name: str, operands: Sequence, params: dict) -> bool:
    """Whether no element of an operation's result can be negative."""
    if name in _NONNEGATIVE or name in NONNEGATIVE_FUNCTIONS:
        return True
    if name == "integer_pow" and params["y"] % 2 == 0:
        return True
    signs = [_is_nonnegative(x) for x in operands]
    if name == "max":
        return any(signs)
    if name == "select_n":
        return all(signs[1:])
    if name == "gather":  # The other operand is indices.
        return signs[0]
    return all(signs) and name in (*_KEEPING_SIGN, *_MOVING, *_JOINING, "pad", "convert_element_type")


def _is_nonnegative(x: typing.Any) -> bool:
    constant = _constant(x)
    return x.nonnegative if isinstance(x, Carried) else constant is not None and constant >= 0


def _constant(x: typing.Any) -> float | None:
    """The value of a real constant of one element; see `Trace._unless_known`."""
    is_constant = isinstance(x, int | float | np.ndarray | np.generic) and np.size(x) == 1
    return np.asarray(x).item() if is_constant and np.isrealobj(x) else None


def _as_constant(x: jax.Array) -> jax.Array | np.ndarray:
    """What an operation on constants gave, as one."""
    return np.asarray(x) if x.size == 1 and not jnp.issubdtype(x.dtype, jax.dtypes.extended) else x


def _kept(name: str, primitive: core.Primitive, operands: Sequence, params: dict) -> typing.Any:
    """The result, or the results, on the operands' grid, where it lies there; else None."""
    arrays = [payload_of(x) for x in operands]
    x = arrays[0]
    if not isinstance(x, QuantizedArray) or x.scale.ndim:
        return None

    def bind(*values):
        return primitive.bind(*vary_alike(*values), **params)

    if name in _MOVING and len(arrays) == 1 or name == "gather":
        moved = bind(x.value, *arrays[1:]), bind(x.unscaled, *arrays[1:])
        pairs = zip(*moved, strict=True) if primitive.multiple_results else [moved]
        results = [x.replace(value=value, unscaled=unscaled) for value, unscaled in pairs]
        return results if primitive.multiple_results else results[0]
    if name in _LARGEST and len(arrays) == 1:
        largest = bind(x.unscaled)
        return x.replace(value=product(largest, jax.lax.stop_gradient(x.scale)), unscaled=largest)
    if name == "reduce_sum" and has_codes(x):
        total = bind(x.unscaled)
        return mean_of_codes(x, total, x.unscaled.size // total.size, 1)
    if name == "div" and has_codes(x) and (_constant(operands[1]) or 0) > 0:
        return mean_of_codes(x, x.unscaled, 1, _constant(operands[1]))
    if name == "pad" and _constant(operands[1]) == 0:
        return x.replace(value=bind(x.value, arrays[1]), unscaled=bind(x.unscaled, arrays[1]))
    same = all(isinstance(y, QuantizedArray) and y.scale is x.scale and y.format is x.format for y in arrays)
    if name in _JOINING and same:
        return x.replace(value=bind(*(y.value for y in arrays)), unscaled=bind(*(y.unscaled for y in arrays)))
    return None
