"""Weights of torchvision's ResNets."""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.errors import require

_COLLECTIONS = ("params", "batch_stats")
_MODULES = {"conv_init": "conv1", "norm_init": "bn1", "classifier": "fc"}
_BLOCK_MODULES = {"conv_shortcut": "downsample.0", "norm_shortcut": "downsample.1"}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_IGNORED = "num_batches_tracked"  # Only for averages without momentum.
_STEM, _CLASSIFIER = "conv1.weight", "fc.weight"


def from_torchvision(state: Mapping[str, np.ndarray], variables: Mapping, source: str) -> dict:
    """Variables with the weights and norm statistics of a torchvision ResNet.

    Args:
      state: torchvision's state dict, kernels [out, in, height, width] and [out, in].
      variables: of a ResNet of this package, of which names and shapes count; collections but `params` and
        `batch_stats` stay as they are.
      source: names the state dict in errors.

    Returns:
      The variables; the new arrays are NumPy's in float32, kernels [height, width, in, out] and [in, out].

    Raises:
      UserError: names or shapes differ.
    """
    leaves = flatten_dict({name: variables.get(name, {}) for name in _COLLECTIONS})
    names = {path: _torch_name(*path[1:]) for path in leaves}
    there = {name: np.shape(array) for name, array in state.items() if not name.endswith(_IGNORED)}
    here = {names[path]: _torch_shape(np.shape(leaf)) for path, leaf in leaves.items()}
    _require_equal(there, here, source)
    arrays = {path: _from_torch_layout(np.asarray(state[names[path]], np.float32)) for path in leaves}
    return {**variables, **unflatten_dict(arrays)}


def _torch_name(*path: str) -> str:
    """Torch's name for a path of ours, which also names what torchvision does not have."""
    *modules, leaf = path
    block = re.fullmatch(r"stage(\d+)_block(\d+)", modules[0])
    if block is None:
        names = [_MODULES.get(module, module) for module in modules]
    else:
        names = [f"layer{block[1]}", str(int(block[2]) - 1)]
        names += [_BLOCK_MODULES.get(module, module.replace("norm", "bn")) for module in modules[1:]]
    return ".".join([*names, _LEAVES.get(leaf, leaf)])


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2])


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Moves the axes [out, in, ...] to [..., in, out]; vectors stay."""
    if array.ndim < 2:
        return np.array(array)
    return np.ascontiguousarray(np.moveaxis(array, (1, 0), (-2, -1)))


def _require_equal(there: Mapping[str, tuple], here: Mapping[str, tuple], source: str) -> None:
    wrong = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    listed = [
        f"{name}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here" for name in wrong
    ]
    require(
        not wrong,
        f"{source}: another network's weights ({'; '.join(listed[:3])}{'; ...' if len(wrong) > 3 else ''}); "
        f"{_remedy(there, here, wrong)}",
    )


def _remedy(there: Mapping[str, tuple], here: Mapping[str, tuple], wrong: list[str]) -> str:
    depths = [_depth(there), _depth(here)]
    if depths[0] == 0:
        return "give the state dict of a ResNet as torchvision names its weights"
    if depths[0] != depths[1]:
        return f"it looks like resnet{depths[0]} and the model is resnet{depths[1]}; choose the same for both"
    hints = []
    if _CLASSIFIER in there and there[_CLASSIFIER][0] != here.get(_CLASSIFIER, there[_CLASSIFIER])[0]:
        classes = [shapes[_CLASSIFIER][0] for shapes in (there, here)]
        hints.append(f"it has {classes[0]} classes and the model {classes[1]}; choose the same for both")
    if _STEM in wrong and _STEM in there:
        sizes = ["x".join(map(str, shapes[_STEM][2:])) for shapes in (there, here)]
        hints.append(f"its stem is {sizes[0]} and the model's {sizes[1]}; build the model with its stem")
    same = {_STEM, _CLASSIFIER, "fc.bias"}.issuperset(wrong)
    return "; ".join(hints) if hints and same else f"choose weights of the plain resnet{depths[0]}"


def _depth(shapes: Mapping[str, tuple]) -> int:
    """Number of layers after which a ResNet is called: of its blocks, the stem and the classifier."""
    convs = sum(bool(re.fullmatch(r"layer\d+\.\d+\.conv\d+\.weight", name)) for name in shapes)
    return convs + 2 if convs else 0
