"""Whether a network's operations keep the examples of a batch apart.

Values that depend on the input have an example in each place of their first axis. Where that axis is summed
over, moved, or meets another one, an example's output depends on what is executed with it.
"""

from collections.abc import Sequence

Shape = Sequence[int]


def keeps_apart(
    operation: str, shapes: Sequence[Shape], fixed: Sequence[bool], result: Shape, attributes: dict
) -> bool:
    """Whether each place of a result's first axis comes of that place of the operands, of however many.

    Args:
      operation: of `executor.OPERATIONS`.
      shapes: of its operands.
      fixed: which of them do not depend on the input.
      result: its shape.
      attributes: of the operation.
    """
    a = attributes
    match operation:
        case "conv":
            return fixed[1]
        case "dense" if fixed[1] and len(shapes[1]) == 2:
            return len(shapes[0]) >= 2
        case "dense":
            return len(result) >= 3 and _broadcasts_alike(shapes, fixed, result)
        case "max_pool" | "sum_pool":
            return True
        case "sum" | "max":
            return 0 not in a["axes"]
        case "pad":
            return not any(a["padding"][0])
        case "slice":
            return (a["start"][0] or 0, a["stop"][0], a["step"][0] or 1) == (0, None, 1)
        case "reshape":
            return a["shape"][0] == -1 and result[0] == shapes[0][0]
        case "transpose":
            return a["permutation"][0] == 0
        case "concatenate":  # A constant has a number of examples.
            return a["axis"] != 0 and not any(fixed)
    return _broadcasts_alike(shapes, fixed, result)


def _broadcasts_alike(shapes: Sequence[Shape], fixed: Sequence[bool], result: Shape) -> bool:
    """Whether the examples of all operands come to lie where those of the result are."""
    return all(
        len(shape) < len(result) or shape[:1] in ((), (1,)) if constant else len(shape) == len(result)
        for shape, constant in zip(shapes, fixed, strict=True)
    )
