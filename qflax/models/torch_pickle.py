"""The pickle of torch's files: descriptions of tensors, made without running anything that it holds."""

import collections
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "bfloat16": jnp.bfloat16,
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_UNTYPED = "UntypedStorage"
_PLAIN = (str, int, float, bytes, type(None))  # Keys of dictionaries; tuples of tuples can take forever.
# Objects of other classes, sets, and memory by its size alone: no state dict has them.
_REFUSED = b"".join(
    (
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
        *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    )
)


def load(data: bytes) -> object:
    """The pickled object, with descriptions in place of tensors; damaged data may raise anything."""
    return _Unpickler(io.BytesIO(data)).load()


class Storage(NamedTuple):
    """Reference to the archive's record `data/<key>`; its elements are `kind`, or bytes if untyped."""

    kind: str
    key: str


class Tensor(NamedTuple):
    """Strided view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _refuse(unpickler: pickle._Unpickler) -> None:
    raise pickle.UnpicklingError("it holds objects that no state dict has")


def _with_plain_keys(load: Callable, keys: slice) -> Callable:
    """The opcode's method, for keys at those places of the stack that are plain."""

    def checked(unpickler: pickle._Unpickler) -> None:
        for key in unpickler.stack[keys]:
            if not isinstance(key, _PLAIN):
                raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
        load(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """Describes tensors and refuses all else, for a pickle is a program that may call anything.

    What it makes are dictionaries, strings, named tuples and bound methods: no pickle can change how the
    latter behave, and no array is made before its bounds are checked. Of the library's two unpicklers it is
    the one in Python, whose memo takes no more than what is in it; and it hashes nothing that takes long.
    """

    dispatch = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(_REFUSED, _refuse),
        pickle.SETITEM[0]: _with_plain_keys(pickle._Unpickler.load_setitem, slice(-2, -1)),
        **{
            code[0]: _with_plain_keys(load, slice(None, None, 2))
            for code, load in (
                (pickle.SETITEMS, pickle._Unpickler.load_setitems),
                (pickle.DICT, pickle._Unpickler.load_dict),
            )
        },
    }

    def find_class(self, module: str, name: str):
        """Returns what stands for a global name.

        Raises:
          pickle.UnpicklingError: any name that a state dict does not need.
        """
        known = {
            "collections.OrderedDict": self._dictionary,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
        }
        if module in ("torch", "torch.storage") and (name in DTYPES or name == _UNTYPED):
            return name
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not run")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> Storage:
        """Returns a reference to the storage ("storage", kind, key, device, size)."""
        _, kind, key, *_ = pid
        if not (isinstance(kind, str) and isinstance(key, str)):
            raise pickle.UnpicklingError("a storage has no name")
        return Storage(kind, key)

    def _dictionary(self) -> collections.OrderedDict:
        return collections.OrderedDict()

    def _tensor(self, storage, offset, shape, strides, *_) -> Tensor:
        return Tensor(storage, storage.kind, offset, shape, strides)

    def _tensor_of_dtype(self, storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> Tensor:
        return Tensor(storage, dtype, offset, shape, strides)

    def _parameter(self, tensor: Tensor, *_) -> Tensor:
        return tensor
