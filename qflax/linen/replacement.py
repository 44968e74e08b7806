"""Layers of qflax in the place of Flax's."""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn

from qflax.layers import BatchNorm, Conv, ConvTranspose, Dense, DenseGeneral, Einsum
from qflax.linen.carrying import Carried
from qflax.quantizers import Quantization

PRODUCTS = {layer.layer: layer for layer in (Conv, ConvTranspose, Dense, DenseGeneral, Einsum)}
NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)


def product_of(module: nn.Module, quantization: Quantization) -> nn.Module | None:
    """The layer of qflax that computes what `module` does, with its parameters; None where there is none.

    Subclasses of Flax's layers that compute in their own way have none, nor has what has a kernel for each
    of several batch axes.
    """
    if getattr(module, "batch_dims", ()):
        return None
    for theirs, ours in PRODUCTS.items():
        if computes_as(module, theirs) and not hasattr(module, "is_plain"):
            return _bound(ours, theirs, module, quantization=quantization, quantize_input=True)
    return None


def is_stood_in_for(module: nn.Module, inputs: Sequence) -> bool:
    """Whether, in a quantized model, another call at the same path is made in the place of this one."""
    carried = any(isinstance(x, Carried) for x in inputs)
    return carried and isinstance(module, (*PRODUCTS, *NORMS)) and type(module) not in PRODUCTS.values()


def norm_of(module: nn.Module, changes: Mapping) -> nn.Module:
    """The norm that computes what `module` does, with its parameters; of batch norm the one of qflax.

    Args:
      module: a norm.
      changes: attributes that a batch norm shall have; an axis that it names itself stays.
    """
    if not computes_as(module, nn.BatchNorm):
        return module
    if module.axis_name is not None:
        changes = {**changes, "axis_name": module.axis_name}
    return _bound(BatchNorm, nn.BatchNorm, module, **changes)


def computes_as(module: nn.Module, theirs: type[nn.Module]) -> bool:
    """Whether the module is of that class, and its subclass computes nothing of its own."""
    return isinstance(module, theirs) and type(module).__call__ is theirs.__call__


def _bound(ours: type[nn.Module], theirs: type[nn.Module], module: nn.Module, **more) -> nn.Module:
    """Ours, with the attributes and the variables of the module.

    The name, which has a dot, is only of the scope of its operations: exports leave it out of paths.
    """
    fields = [f.name for f in dataclasses.fields(theirs) if f.init and f.name not in ("parent", "name")]
    return ours(
        **{name: getattr(module, name) for name in fields} | more,
        parent=module.scope,
        name=f"qflax.{ours.__name__}",
    )
