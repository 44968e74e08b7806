"""Networks of the user's own, in plain Flax, by the names of their modules."""

import functools
import importlib
import inspect
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from qflax.errors import UserError, closest, require
from qflax.files import make_importable
from qflax.linen import Quantized, of_policy
from qflax.quantizers import FLOAT, Quantization


def is_own(name: str) -> bool:
    """Whether `name` is of a network of the user's own, MODULE:NAME."""
    return ":" in name


@functools.lru_cache(maxsize=16)  # The same object for the same network, so that JAX traces it once.
def build_own_model(
    name: str,
    *,
    num_classes: int,
    batch_norm_momentum: float | None = None,
    dtype: jnp.dtype = jnp.float32,
    quantization: Quantization = FLOAT,
    axis_name: str | None = None,
) -> Quantized:
    """Makes a network of the user's own, quantized by rules on its paths.

    Args:
      name: `MODULE:NAME`; `MODULE` is found as Python does, and in the current folder. What it calls `NAME`
        is called with `num_classes`, and with `dtype` if that is not float32, and gives a Linen module. This
        is called with float32 images [batch, height, width, channels] and `train=True` or `False`.
      num_classes: number of outputs.
      batch_norm_momentum: of every batch norm, instead of its own; None leaves it.
      dtype: dtype to compute in.
      quantization: the policy; the default one is the float network.
      axis_name: mapped axis that shares a batch: its norm statistics are those of the whole batch.

    Raises:
      UserError: there is no such module or name, or it makes no such network.
    """
    field = f"model={name!r}"
    network = _call(field, _find(field, *name.split(":", 1)), num_classes, dtype)
    require(
        isinstance(network, nn.Module),
        f"{field}: makes a {type(network).__name__}; must make a flax.linen.Module",
    )
    require(
        callable(network),
        f"{field}: {type(network).__name__} has no method __call__",
    )
    require(
        not isinstance(network, Quantized),
        f"{field}: makes a quantized model; the configuration quantizes it: make the plain one",
    )
    what, call = f"{field}: __call__ of {type(network).__name__}", type(network).__call__
    _require_argument(what, call, "train", "train=False")
    _require_bound(what, call, network, "images", train=False)
    try:
        hash(network)
    except TypeError:
        raise UserError(
            f"{field}: an attribute of {type(network).__name__} cannot be hashed (a list?); make it a tuple"
        ) from None
    return of_policy(network, quantization, axis_name=axis_name, batch_norm_momentum=batch_norm_momentum)


def _find(field: str, module: str, attribute: str) -> Callable:
    parts = module.split(".")
    require(
        all(part.isidentifier() for part in (*parts, attribute)),
        f"{field}: must be MODULE:NAME, such as my_package.networks:Net",
    )
    make_importable(pathlib.Path())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in [".".join(parts[: i + 1]) for i in range(len(parts))]:
            raise  # Something that the module itself imports.
        raise UserError(
            f"{field}: Python finds no module {error.name!r}; run in the folder that holds it, or add that "
            "folder to PYTHONPATH"
        ) from None
    if not callable(getattr(found, attribute, None)):
        names = [name for name in vars(found) if callable(getattr(found, name)) and name[0] != "_"]
        raise UserError(
            f"{field}: {found.__file__} has no class or function {attribute!r}{closest(attribute, names)}"
        )
    return getattr(found, attribute)


def _call(field: str, make: Callable, num_classes: int, dtype: jnp.dtype) -> object:
    _require_argument(field, make, "num_classes", "num_classes, the number of outputs")
    if dtype == jnp.float32:
        _require_bound(field, make, num_classes=num_classes)
        return make(num_classes=num_classes)
    _require_argument(field, make, "dtype", "dtype, or train it with config.dtype='float32'")
    _require_bound(field, make, num_classes=num_classes, dtype=dtype)
    return make(num_classes=num_classes, dtype=dtype)


def _require_argument(what: str, function: Callable, name: str, remedy: str) -> None:
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    require(name in parameters or takes_all, f"{what}: has no argument {name!r}; give it {remedy}")


def _require_bound(what: str, function: Callable, *args, **kwargs) -> None:
    """Raises `UserError` where a function needs other arguments than these."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{what}: {error}; give it a default") from None
