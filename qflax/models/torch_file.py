"""State dicts in torch's zip format, read without torch."""

import math
import pathlib
import pickle
import sys

import numpy as np

from qflax.errors import UserError, one_line, require
from qflax.models.torch_pickle import DTYPES, Tensor, load
from qflax.untrusted import ELEMENTS, Archive, open_file

_WRAPPERS = ("state_dict", "model")
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_PICKLE_BYTES = 2**24  # Its objects take a multiple of them; that of a ResNet-152 has 2^17.
_REMEDY = "download it again, or in torch save the weights alone: torch.save(model.state_dict(), 'new.pth')"


class _Archive:
    """Records of a zip file that torch wrote."""

    def __init__(self, archive: Archive):
        self._archive = archive
        names = archive.names
        pickles = [name for name in names if name.endswith("/data.pkl")]
        _check(len(pickles) == 1, "a zip file without torch's data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"  # Older files have none and are little-endian.
        self._swapped = order in names and archive.read(order).decode() != sys.byteorder
        self._storages = {}

    def tree(self) -> object:
        """The pickled object, with descriptions in place of tensors."""
        return load(self._archive.read(self._root + "data.pkl", _PICKLE_BYTES))

    def array(self, tensor: Tensor) -> np.ndarray:
        """The read-only array that is described; those of one storage share its memory."""
        dtype = np.dtype(DTYPES[tensor.dtype])
        data = self._storage(tensor.storage.key, dtype)
        offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
        # In Python's integers: NumPy's own check of bounds can overflow.
        reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        inside = min(offset, *shape, *strides, reach + 1) >= 0 and reach < len(data) // dtype.itemsize
        _check(0 in shape or inside, f"a tensor reaches beyond its storage {tensor.storage.key}")
        # Of stride 0, few bytes can have any number of elements.
        _check(math.prod(shape) <= max(ELEMENTS, len(data)), f"a tensor of more than {ELEMENTS:,} elements")
        return np.ndarray(
            shape, dtype, data, offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides]
        )

    def _storage(self, key: str, dtype: np.dtype) -> bytes:
        size = dtype.itemsize if self._swapped else 1
        if (key, size) not in self._storages:
            data = self._archive.read(f"{self._root}data/{key}")
            if size > 1:
                data = np.frombuffer(data, f"u{size}").byteswap().tobytes()
            self._storages[key, size] = data
        return self._storages[key, size]


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dict, also one that a checkpoint holds as `state_dict` or `model`.

    Returns:
      Read-only arrays by name; bfloat16 ones have that dtype of JAX.

    Raises:
      OSError: the file cannot be opened.
      UserError: it holds anything else, is damaged, or in torch's format of before version 1.6.
    """
    with open_file(path) as file:
        legacy = file.read(len(_LEGACY_START)) == _LEGACY_START
    require(not legacy, _refusal(path, "it is in torch's format of before version 1.6"))
    try:
        with Archive(path) as file:
            archive = _Archive(file)
            return {name: archive.array(tensor) for name, tensor in _state_dict(archive.tree()).items()}
    except OSError:
        raise
    except Exception as error:  # Unpickling damaged data may raise anything.
        raise UserError(_refusal(path, str(error) or type(error).__name__)) from error


def _state_dict(tree: object) -> dict[str, Tensor]:
    _check(isinstance(tree, dict), f"it holds a {type(tree).__name__}")
    tree = next((tree[name] for name in _WRAPPERS if isinstance(tree.get(name), dict)), tree)
    others = [k for k, v in tree.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
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
    return f"{path}: not a state dict that can be read ({one_line(reason)}); {_REMEDY}"
