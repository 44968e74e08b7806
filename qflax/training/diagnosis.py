"""Which part of a training step is not finite."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from qflax.data.augment import normalize
from qflax.training.parallel import AXIS, Devices
from qflax.training.state import OBSERVED, TrainState
from qflax.training.step import TrainStep
from qflax.training.stream import ResidentData, StreamedData


def first_not_finite(
    step: TrainStep,
    devices: Devices,
    state: TrainState,
    data: ResidentData | StreamedData,
    data_axes,
    *rest,
) -> str:
    """Makes a step once more and names the first part of it that is not finite.

    Args:
      step: to make.
      devices: that make it.
      state: before it.
      data: of this step.
      data_axes: of the data over the devices.
      rest: further arguments of `step.update`.
    """
    names = []

    def parts(state, index, data, *rest):
        found = _parts(step, state, index, data, *rest)
        names[:] = [name for name, _ in found]
        finite = [jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])) for _, arrays in found]
        return jax.lax.pmin(jnp.stack(finite).astype(jnp.int32), AXIS)

    finite = devices.pmap(parts, data_axes=data_axes)(state, data, *rest)
    bad = [name for name, good in zip(names, jax.device_get(finite), strict=True) if not good]
    return bad[0] if bad else "nothing when the step is made alone"


def _parts(step: TrainStep, state: TrainState, index, data, *rest) -> list[tuple[str, Sequence[jax.Array]]]:
    """(name, arrays) of all parts, in the order in which a step computes them."""
    images, _, rngs = step.inputs(state, index, data)
    outputs = []

    def watch(next_call, args, kwargs, context):
        result = next_call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            outputs.append(("/".join(context.module.path), _floats(result)))
        return result

    with nn.intercept_methods(watch):
        logits, _ = step.model.apply(
            state.variables, normalize(images, step.mean, step.std), train=True, mutable=OBSERVED, rngs=rngs
        )
    updated, metrics, gradients = step.update(state, index, data, *rest)
    norm = metrics.pop("gradient_norm")
    called = [name for name, _ in outputs]
    backwards = sorted(_named(gradients), key=lambda part: _last_call(part[0], called), reverse=True)
    return [
        *((f"the output of {name}", arrays) for name, arrays in outputs if arrays),
        ("the logits", [logits]),
        *((f"the {name.replace('_', ' ')}", [value]) for name, value in metrics.items()),
        *((f"the gradient of {name}", arrays) for name, arrays in backwards),
        *(
            (f"the new value of {name}", arrays)
            for name, arrays in _named((updated.trained, updated.observed))
        ),
        ("the norm of the gradient", [norm]),
    ]


def _named(tree) -> list[tuple[str, Sequence[jax.Array]]]:
    """(path, [array]) of every array; the first key of tuples' paths is left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [[key for key in path if isinstance(key, jax.tree_util.DictKey)] for path, _ in leaves]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [(name, [leaf]) for name, (_, leaf) in zip(names, leaves, strict=True)]


def _last_call(name: str, called: list[str]) -> int:
    """When a variable's module was called last, -1 for never."""
    _, _, path = name.partition("/")
    return max((i for i, module in enumerate(called) if path.startswith(module + "/")), default=-1)


def _floats(tree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
