"""What Flax's lifted transformations do not pass on to the methods of modules that they call."""

import inspect
import itertools
from collections.abc import Mapping, Sequence

from flax.core import lift
from flax.linen import transforms

# They call their function once, with the very arrays that they are given.
_DIRECT = (lift.checkpoint, lift.jit)
_count = itertools.count()


class Unlike:
    """A flag of a scope for which `nn.jit` finds no earlier program of a module: Flax looks by the hash.

    Such a program would have no quantizers, or those of other paths.
    """

    def __hash__(self) -> int:
        """Of no object before."""
        return next(_count)


def arguments_outside() -> tuple[Sequence, Mapping] | None:
    """What the `nn.remat` or `nn.jit` was given, not yet traced, that calls a module's method; None if it is
    another transformation that does, or another module's method that has begun one.

    Interceptors of methods see what a transformation calls, but not the transformation. It is in the stack.
    """
    frame = inspect.currentframe().f_back
    own_file, seen_others = frame.f_code.co_filename, False
    while frame is not None:
        file, names = frame.f_code.co_filename, frame.f_locals
        if file == own_file and seen_others:  # The interceptor, at the call of the module around.
            return None
        if file == transforms.__file__ and "transform" in names:
            return (names["args"], names["kwargs"]) if names["transform"] in _DIRECT else None
        frame, seen_others = frame.f_back, seen_others or file != own_file
    return None
