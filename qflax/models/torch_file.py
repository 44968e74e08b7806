"""State dicts in torch's zip format, read without torch."""

import collections
import pathlib
import pickle
import sys
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qflax.errors import UserError, require

_DTYPES = {
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
_WRAPPERS = ("state_dict", "model")
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_REMEDY = "download it again, or in torch save the weights alone: torch.save(model.state_dict(), 'new.pth')"


class _Storage(NamedTuple):
    """Reference to the archive's record `data/<key>`; its elements are `kind`, or bytes if untyped."""

    kind: str
    key: str


class _Tensor(NamedTuple):
    """Strided view of a storage; offset and strides in elements of `dtype`."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Describes tensors and refuses all else, for a pickle is a program that may call anything.

    What it makes are dictionaries, strings, named tuples and bound methods: no pickle can change how the
    latter behave, and no array is made before its bounds are checked.
    """

    def find_class(self, module: str, name: str):
        """Returns what stands for a global name.

        Raises:
          pickle.UnpicklingError: any name that a state dict does not need.
        """
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
        }
        if module in ("torch", "torch.storage") and (name in _DTYPES or name == _UNTYPED):
            return name
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not run")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> _Storage:
        """Returns a reference to the storage ("storage", kind, key, device, size)."""
        _, kind, key, *_ = pid
        return _Storage(kind, key)

    def _tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        return _Tensor(storage, storage.kind, offset, shape, strides)

    def _tensor_of_dtype(self, storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> _Tensor:
        return _Tensor(storage, dtype, offset, shape, strides)

    def _parameter(self, tensor: _Tensor, *_) -> _Tensor:
        return tensor


class _Archive:
    """Records of a zip file that torch wrote."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        _check(len(pickles) == 1, "a zip file without torch's data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"  # Older files have none and are little-endian.
        self._swapped = order in names and archive.read(order).decode() != sys.byteorder
        self._storages = {}

    def tree(self) -> object:
        """The pickled object, with descriptions in place of tensors."""
        with self._archive.open(self._root + "data.pkl") as file:
            return _Unpickler(file).load()

    def array(self, tensor: _Tensor) -> np.ndarray:
        """The read-only array that is described; those of one storage share its memory."""
        dtype = np.dtype(_DTYPES[tensor.dtype])
        data = self._storage(tensor.storage.key, dtype)
        offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
        # In Python's integers: NumPy's own check of bounds can overflow.
        reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        inside = min(offset, *shape, *strides, reach + 1) >= 0 and reach < len(data) // dtype.itemsize
        _check(0 in shape or inside, f"a tensor reaches beyond its storage {tensor.storage.key}")
        return np.ndarray(
            shape, dtype, data, offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides]
        )

    def _storage(self, key: str, dtype: np.dtype) -> bytes:
        if (key, dtype) not in self._storages:
            data = self._archive.read(f"{self._root}data/{key}")
            if self._swapped:
                data = np.frombuffer(data, f"u{dtype.itemsize}").byteswap().tobytes()
            self._storages[key, dtype] = data
        return self._storages[key, dtype]


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dict, also one that a checkpoint holds as `state_dict` or `model`.

    Returns:
      Read-only arrays by name; bfloat16 ones have that dtype of JAX.

    Raises:
      OSError: the file cannot be opened.
      UserError: it holds anything else, is damaged, or in torch's format of before version 1.6.
    """
    with path.open("rb") as file:
        legacy = file.read(len(_LEGACY_START)) == _LEGACY_START
    require(not legacy, _refusal(path, "it is in torch's format of before version 1.6"))
    try:
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file)
            return {name: archive.array(tensor) for name, tensor in _state_dict(archive.tree()).items()}
    except OSError:
        raise
    except Exception as error:  # Unpickling damaged data may raise anything.
        raise UserError(_refusal(path, str(error) or type(error).__name__)) from error


def _state_dict(tree: object) -> dict[str, _Tensor]:
    _check(isinstance(tree, dict), f"it holds a {type(tree).__name__}")
    tree = next((tree[name] for name in _WRAPPERS if isinstance(tree.get(name), dict)), tree)
    others = [k for k, v in tree.items() if not (isinstance(k, str) and isinstance(v, _Tensor))]
    _check(
        not others,
        f"its entries {', '.join(map(repr, others[:3]))} are no tensors, nor is one of "
        f"{', '.join(_WRAPPERS)} a state dict",
    )
    return tree


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _refusal(path: pathlib.Path, reason: str) -> str:
    return f"{path}: not a state dict that can be read ({' '.join(reason.split())}); {_REMEDY}"
