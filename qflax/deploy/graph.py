"""The deployed network: a small graph of numbers and the operations between them.

All exports are made of it. It knows nothing of training, modules or JAX: a node is an operation of the table,
a constant is an array, with a number format where a quantizer made it. What the float32 arithmetic of a node
is, is part of the table, so that whoever executes a graph gets the same bits.

Arrays have the layouts of the traced program: images [batch, height, width, channels], kernels of
convolutions [height, width, in / groups, out], of dense layers [in, out]. Operands are broadcast as in NumPy.
Where a number format is named, values are integers less their zero point, or minifloats, as float32; scales
are explicit multiplications.

| operation            | inputs               | attributes                         | value                  |
|----------------------|----------------------|------------------------------------|------------------------|
| quantize             | x, scale, zero_point | format, rounding                   | see below              |
| conv                 | x, kernel            | strides, padding, dilation, groups | sums of products       |
| dense                | x, kernel or values  |                                    | x @ kernel             |
| multiply, divide, add, subtract, maximum, minimum | a, b |                       | elementwise, float32   |
| negative, absolute, exp, log, tanh, logistic, erf, sqrt, rsqrt, floor, ceil, round, sign, sin, cos | x | | |
| select               | which, a, b          |                                    | a where which > 0      |
| power                | x                    | exponent                           | whole exponent         |
| max_pool, sum_pool   | x                    | window, strides, padding           | over height and width  |
| sum, max             | x                    | axes                               | over axes, dropped     |
| pad                  | x                    | padding                            | zeros (before, after)  |
| slice                | x                    | start, stop, step                  | stop None: to the end  |
| reshape              | x                    | shape                              | -1 is the batch        |
| transpose            | x                    | permutation                        |                        |
| concatenate          | any number           | axis                               |                        |

`quantize` of an integer format is `clip(round(x / scale + zero_point), lowest, highest) - zero_point`, every
step rounded to float32; of a bipolar one the nearest of -1 and +1, with +1 for 0. Of a minifloat format it is
the nearest number of the format to `x / scale`, without the third input.
"""

import dataclasses
import typing

import numpy as np

from qflax.numerics import IntegerFormat, MinifloatFormat

Format = IntegerFormat | MinifloatFormat

UNARY = (
    *("negative", "absolute", "exp", "log", "tanh", "logistic", "erf", "sqrt", "rsqrt"),
    *("floor", "ceil", "round", "sign", "sin", "cos"),
)
BINARY = ("multiply", "divide", "add", "subtract", "maximum", "minimum")
OPERATIONS = (
    *("quantize", "conv", "dense", *BINARY, *UNARY, "select", "power", "max_pool", "sum_pool", "sum"),
    *("max", "pad", "slice", "reshape", "transpose", "concatenate"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constant:
    """An array of the network.

    Attributes:
      array: float32; where there is a format, in units of the scale: integers, or minifloats.
      format: of weights that a quantizer made, else None.
      accumulator_bits: width of the accumulator that the weights were made for, or None.
    """

    array: np.ndarray
    format: Format | None = None
    accumulator_bits: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """An operation.

    Attributes:
      operation: one of `OPERATIONS`.
      inputs: names of values: the graph's input, constants, outputs of nodes before.
      output: name of the value.
      attributes: see the table; tuples of numbers, text, and for `format` a number format.
      layer: path of the module that it came out of, `/` between names; "" outside of all.
    """

    operation: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    layer: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A network with one input and one output.

    Attributes:
      input: name of the input.
      shape: of one example at the input, without the batch.
      output: name of the output.
      nodes: in an order in which they can be executed.
      constants: by name.
      metadata: what else readers should know; of JSON's types. `probe`: see `deploy.probe`.
    """

    input: str
    shape: tuple[int, ...]
    output: str
    nodes: tuple[Node, ...]
    constants: dict[str, Constant]
    metadata: dict[str, typing.Any] = dataclasses.field(default_factory=dict)


def format_to_json(fmt: Format) -> dict[str, typing.Any]:
    """A number format as JSON's types."""
    kind = "integer" if isinstance(fmt, IntegerFormat) else "minifloat"
    return {"kind": kind, **dataclasses.asdict(fmt)}


def format_from_json(fields: dict[str, typing.Any]) -> Format:
    """The number format of `format_to_json`."""
    kinds = {"integer": IntegerFormat, "minifloat": MinifloatFormat}
    return kinds[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})
