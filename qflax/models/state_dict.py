"""Files of weights from other frameworks."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors

from qflax.errors import UserError, one_line, require
from qflax.models.torch_file import read_torch
from qflax.untrusted import open_file

# NumPy's reader in the library knows no bfloat16, its parser does.
_SAFETENSORS_DTYPES = {
    "BF16": jnp.bfloat16,
    "BOOL": np.bool_,
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}
_PARALLEL_PREFIX = "module."  # Of torch's DataParallel.


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict without torch and without running code that the file may hold.

    Args:
      path: `.safetensors`, or `.pth` or `.pt` as `torch.save` writes it since version 1.6, also of a
        checkpoint that holds the state dict as `state_dict` or `model`.

    Returns:
      Arrays by name, without the prefix `module.` where all have it; they may be read-only.

    Raises:
      UserError: the file is missing, damaged, or holds anything else.
    """
    path = pathlib.Path(path)
    require(
        path.suffix in _READERS,
        f"{path}: weights of an unknown kind {path.suffix!r}; choices: {', '.join(_READERS)}",
    )
    try:
        state = _READERS[path.suffix](path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the path of downloaded weights") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    require(state, f"{path}: an empty state dict; give the file of a model's weights")
    if all(name.startswith(_PARALLEL_PREFIX) for name in state):
        return {name.removeprefix(_PARALLEL_PREFIX): array for name, array in state.items()}
    return state


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return {
            name: np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(_bytes(path))
        }
    except KeyError as error:
        raise UserError(
            f"{path}: a tensor has the dtype {error}; save it anew as one of {', '.join(_SAFETENSORS_DTYPES)}"
        ) from error
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path}: damaged or not in safetensors' format ({one_line(error)}); download it again, "
            "or save it anew: safetensors.torch.save_file(model.state_dict(), 'new.safetensors')"
        ) from error


def _bytes(path: pathlib.Path) -> bytes:
    with open_file(path) as file:
        return file.read()


_READERS = {".safetensors": _read_safetensors, ".pth": read_torch, ".pt": read_torch}

STATE_DICTS = tuple(_READERS)  # Endings of the files.
