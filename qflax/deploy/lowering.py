"""Lowering: the graph of a function of JAX, such as a network with its variables.

The function is traced, not its modules looked at: whatever it was made of, what remains are primitives and
the quantizers' operations (`numerics.Operation`). What depends on no input, integer weights among it, is
computed here, equation by equation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from qflax.deploy.call import Call, Comparison, Known, Value, whole
from qflax.deploy.graph import Constant, Graph, Node
from qflax.deploy.moving import split
from qflax.deploy.primitives import ELEMENTWISE, RULES, TAKING_COMPARISONS, learned_format
from qflax.deploy.simplify import simplified
from qflax.errors import require
from qflax.numerics import PRIMITIVE, IntegerFormat

_INLINED = (
    *("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call"),
)

_MOVING = ("reshape", "squeeze", "expand_dims", "transpose", "rev", "copy")  # What stays what it was.

# Nothing is computed in this size, of which no other axis is a multiple.
_BATCH = 10_007


def lower(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> Graph:
    """The graph of `function`.

    Args:
      function: maps float32 [batch, *shape] to one array [batch, ...], whatever the batch is. A network in
        evaluation: `lambda images: model.apply(variables, images, train=False)`.
      shape: of one example.

    Raises:
      UserError: it contains what a graph has no operation for, or a width that is still being learned.
    """
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((_BATCH, *shape), jnp.float32))
    require(len(traced.out_avals) == 1, f"a function of {len(traced.out_avals)} results: a graph has one")
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True], instantiate=True)
    walk = _Walk()
    (result,) = walk.run(used, _known(traced.consts), [Value("input", *[(_BATCH, *shape)] * 2)], "")
    require(not isinstance(result, Comparison), "the function's result is of truths: make numbers of it")
    require(isinstance(result, Value), "the function's result does not depend on its input")
    result = whole(result, walk.emit, "")
    graph = Graph(
        input="input",
        shape=tuple(shape),
        output=result.name,
        nodes=tuple(walk.nodes),
        constants=walk.constants,
    )
    return simplified(graph)


def evaluate(function: Callable[[jax.Array], jax.Array], x: np.ndarray) -> np.ndarray:
    """What `function` gives for `x` as a graph would compute it: operation by operation, none fused."""
    traced = jax.make_jaxpr(function)(x)
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True], instantiate=True)
    (result,) = _Walk().run(used, _known(traced.consts), _known([x]), "")
    return result.whole()


class _Walk:
    """Goes through equations; collects nodes and constants."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.constants: dict[str, Constant] = {}

    def run(self, jaxpr, consts, arguments, layer: str) -> list[Value | Known]:
        """The values of a program's results."""
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(var):
            return _known([var.val])[0] if hasattr(var, "val") else environment[var]

        for equation in jaxpr.eqns:
            path = _join(layer, str(equation.source_info.name_stack))
            outputs = self._outputs(equation, [read(var) for var in equation.invars], path)
            environment.update(zip(equation.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _outputs(self, equation, inputs, layer) -> list[Value | Known]:
        name, parameters = equation.primitive.name, equation.params
        if name in _INLINED:
            inner = parameters["jaxpr"] if "jaxpr" in parameters else parameters["call_jaxpr"]
            consts = _known(getattr(inner, "consts", ()))
            return self.run(getattr(inner, "jaxpr", inner), consts, inputs, layer)
        if equation.primitive is PRIMITIVE:
            name, parameters = repr(parameters["operation"]), dict(parameters["options"])
        shape = equation.outvars[0].aval.shape
        if all(isinstance(value, Known) for value in inputs):
            return _evaluated(equation, name, parameters, inputs, layer)
        call = Call(name=name, parameters=parameters, inputs=inputs, shape=shape, layer=layer, emit=self.emit)
        compared = any(isinstance(value, Comparison) for value in inputs)
        call.require(not compared or name in TAKING_COMPARISONS, "of a comparison")
        if name == "split":
            return split(call)
        if name not in RULES:
            raise call.refuse("has no counterpart in a graph")
        return [RULES[name](call)]

    def emit(self, operation, inputs, shape, attributes, layer) -> Value:
        """Adds a node, whose value has the shape given."""
        output = f"value{len(self.nodes)}"
        names = tuple(x.name if isinstance(x, Value) else self._constant(x) for x in inputs)
        attributes = {name: _python(value) for name, value in attributes.items()}
        self.nodes.append(
            Node(operation=operation, inputs=names, output=output, attributes=attributes, layer=layer)
        )
        return Value(output, shape, shape)

    def _constant(self, known: Known) -> str:
        of_batch = known.array.ndim and len(known.array) == _BATCH
        require(not of_batch, "cannot be exported: an array of the batch's size that depends on no input")
        name = f"constant{len(self.constants)}"
        self.constants[name] = Constant(
            array=np.asarray(known.array, np.float32),
            format=known.format,
            accumulator_bits=known.accumulator_bits,
        )
        return name


def _python(value):
    """An attribute without NumPy's numbers."""
    if isinstance(value, tuple):
        return tuple(_python(item) for item in value)
    return int(value) if isinstance(value, np.integer) else value


def _known(arrays) -> list[Known]:
    arrays = [np.asarray(array) for array in arrays]
    return [Known(array, array.shape) for array in arrays]


def _evaluated(equation, name, parameters, inputs, layer) -> list[Known]:
    """What an equation of known inputs gives."""
    shapes = [var.aval.shape for var in equation.outvars]
    if name == "stop_gradient":
        return inputs
    if name == "broadcast_in_dim":
        return [_stretched(inputs[0], parameters["broadcast_dimensions"], shapes[0])]
    if name == "within_accumulator":
        codes, bits = inputs
        return [Known(codes.array, codes.shape, parameters["format"], int(bits.array))]
    if name == "quantize_integer" and len(shapes[0]) == 1:
        _require_fitting(parameters["format"], inputs, layer)
    if name in (*ELEMENTWISE, "convert_element_type"):
        arrays = [x.array for x in inputs]
        if equation.primitive is not PRIMITIVE:
            arrays = np.broadcast_arrays(*arrays)
    else:
        arrays = [x.whole() for x in inputs]
    results = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    results = results if equation.primitive.multiple_results else [results]
    fmt = parameters.get("format") if equation.primitive is PRIMITIVE else None
    if name == "quantize_range":
        fmt = learned_format(inputs[3].array, parameters["signed"], layer)
    bits = None
    if name in _MOVING:
        fmt, bits = inputs[0].format, inputs[0].accumulator_bits
    return [
        Known(np.asarray(result), shape, fmt, bits) for result, shape in zip(results, shapes, strict=True)
    ]


def _require_fitting(fmt: IntegerFormat, inputs: list[Known], layer: str) -> None:
    """Raises where biases (kernels have more axes) are clipped: a network without them is another one."""
    bias, scale, _ = (x.whole().astype(np.float64) for x in inputs)
    beyond = int(np.sum(np.abs(bias / scale) > fmt.highest + 1))
    require(
        beyond == 0,
        f"{layer}: cannot be exported: {beyond} integer biases are beyond {fmt.bits} bits in units of their "
        "sums, as of channels whose weights are all but zero; leave this layer's bias float (biases=None)",
    )


def _stretched(x: Known, axes, shape) -> Known:
    sizes = [1] * len(shape)
    for axis, n in zip(axes, x.array.shape, strict=True):
        sizes[axis] = n
    return Known(x.array.reshape(sizes), shape)


def _join(layer: str, names: str) -> str:
    """The path of modules; names of their methods, which have a dot, are left out."""
    parts = [*layer.split("/"), *names.split("/")]
    return "/".join(part for part in parts if part and "." not in part)
