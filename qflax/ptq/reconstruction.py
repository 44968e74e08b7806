"""Reconstruction: learned rounding and activation ranges, one part of the network after the other.

Nagel et al. 2020 (AdaRound) for single layers, Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training
Quantization by Block Reconstruction", for blocks, and Wei et al. 2022, "QDrop: Randomly Dropping Quantization
for Extremely Low-bit Post-Training Quantization".
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.errors import require
from qflax.ptq.parts import Part
from qflax.ptq.soft_rounding import hard_value, indecision, initial_choice, neighbours, soft_value
from qflax.ptq.taps import apply_with_hooks, capturing, collect, record_calls, run
from qflax.ptq.variables import changed, leaf
from qflax.quantizers import PARAMETERS

_WARM_UP = 0.2  # Share of the iterations without the regularizer.
_SHARPNESS = (20.0, 2.0)  # Its exponent, first and last.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Numbers of the optimization.

    Attributes:
      iterations: per part.
      batch_size: examples per iteration, drawn from those that were captured.
      learning_rate: of Adam, for the choices between neighbours.
      range_learning_rate: the same for learned activation ranges, relative to their size; cosine decay.
      strength: of the regularizer that makes choices final.
      drop: probability with which an element of the part's input, and of every activation inside of it, is
        taken unquantized (QDrop); 0 is BRECQ. Only for parts with quantized activations.
      seed: of batches and drops.
    """

    iterations: int = 500
    batch_size: int = 32
    learning_rate: float = 0.01
    range_learning_rate: float = 0.001
    strength: float = 0.01
    drop: float = 0.5
    seed: int = 0


def reconstruct(
    model: nn.Module,
    variables: Mapping,
    reference: nn.Module,
    reference_variables: Mapping,
    batches: Iterable[jax.Array],
    parts: Sequence[Part],
    settings: Reconstruction,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """Learns the rounding of kernels so that each part's output is that of the float network.

    Each part gets what the quantized network, changed so far, really passes to it, and its goal is what the
    float network has there. Kernels end on their grids: rounding to nearest gives the learned codes.
    Activation ranges that are learned in training are learned here too.

    Args:
      model: the quantized network, called with `train=False`.
      variables: its variables, calibrated.
      reference: the float network, of the same layers.
      reference_variables: its variables.
      batches: model inputs [batch, ...], all of one shape; passed over several times. What is captured of
        all of them, the inputs of a part and its outputs, is held in memory.
      parts: in the order of the network.
      settings: of the optimization.
      progress: told of each part that is done.

    Returns:
      The variables with new kernels and quantizer parameters.

    Raises:
      UserError: a part's output depends on more than its input; a quantizer would round the result again.
    """
    variables = dict(variables)
    source, example = _Source(reference, reference_variables, batches, parts), next(iter(batches))
    clean = noisy = following = None
    for i, part in enumerate(parts):
        joined = i > 0 and source.joined(i, following)
        clean = following if joined else source.from_images(reference, reference_variables, part)
        if not joined:
            noisy = source.from_images(model, variables, part)
        goal, following = source.through(reference, reference_variables, i, clean)
        source.require_alone(part, goal)
        variables = _reconstruct_part(model, variables, part, (noisy, clean, goal), example, settings, i)
        if i + 1 < len(parts):
            noisy = source.through(model, variables, i, noisy)[1]
        progress(f"{part.start} ({i + 1} of {len(parts)})")
    return variables


class _Source:
    """Arrays between parts: each part's from those before it, where these are all that it depends on."""

    def __init__(self, reference, variables, batches, parts):
        self._batches, self._parts, self._first = batches, parts, next(iter(batches))
        self._size = len(self._first)
        starts, ends = ([getattr(part, name) for part in parts] for name in ("start", "end"))
        self._truth = jax.device_get(
            capturing(reference, inputs=starts, outputs=ends)(variables, self._first)
        )

    def from_images(self, model, variables, part):
        """The part's inputs, through all of the network before it."""
        return collect(capturing(model, inputs=[part.start]), variables, self._batches)[0][part.start]

    def through(self, model, variables, i, x):
        """Outputs of a part that gets `x`, and what the next one gets then."""
        part = self._parts[i]
        following = [following.start for following in self._parts[i + 1 : i + 2]]

        @jax.jit
        def function(variables, x):
            given, image = {part.start: x}, jnp.zeros((len(x), *self._first.shape[1:]), jnp.float32)
            inputs, outputs = run(model, variables, image, given=given, inputs=following, outputs=[part.end])
            return outputs[part.end], inputs.get(following[0]) if following else None

        parts = [x[first : first + self._size] for first in range(0, len(x), self._size)]
        return collect(function, variables, parts)

    def joined(self, i, inputs):
        """Whether a part's input depends on nothing but that of the part before it."""
        return _close(inputs[: self._size], self._truth[0][self._parts[i].start])

    def require_alone(self, part, goal):
        """Raises `UserError` if the output depends on more than the input."""
        require(
            _close(goal[: self._size], self._truth[1][part.end]),
            f"{part.start}: what {part.end} returns depends on more than the input of {part.start}, so that "
            "it cannot be reconstructed as one block; use 'adaround', which takes layers one by one",
        )


def _close(x: np.ndarray, goal: np.ndarray) -> bool:
    """Whether the arrays are equal up to the order of float sums."""
    return bool(np.max(np.abs(x - goal)) <= 1e-3 * max(float(np.max(np.abs(goal))), 1e-6))


def _reconstruct_part(model, variables, part, data, batch, settings, index) -> dict:
    grids = jax.jit(functools.partial(_neighbours_of, model, part.kernels))(variables, batch[:1])
    kernels = {path: leaf(variables["params"], path)["kernel"] for path in part.kernels}
    ranges = {
        path: jnp.copy(value)  # The steps reuse the memory.
        for path, value in flatten_dict(variables.get(PARAMETERS, {}), sep="/").items()
        if path.rpartition("/")[0] in part.activations
    }
    learned = {
        "choices": {path: initial_choice(kernels[path], *grids[path]) for path in part.kernels},
        "ranges": ranges,
    }
    optimizer = _optimizer(settings)
    state = learned, optimizer.init(learned)
    data, grids = jax.device_put((data, grids))
    step = jax.jit(
        functools.partial(_step, model, optimizer, part, settings, batch.shape[1:]), donate_argnums=0
    )
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    for i in range(settings.iterations):
        state = step(state, np.int32(i), key, variables, grids, data)
    learned = state[0]
    for path, choice in learned["choices"].items():
        rounded = hard_value(choice, *grids[path])
        variables = changed(variables, "params", path, kernel=lambda _, rounded=rounded: rounded)
    if ranges:
        variables[PARAMETERS] = _with_ranges(variables[PARAMETERS], learned["ranges"])
    _require_kept(model, variables, part.kernels, batch[:1])
    return variables


def _optimizer(settings: Reconstruction) -> optax.GradientTransformation:
    cosine = optax.cosine_decay_schedule(settings.range_learning_rate, settings.iterations)
    relative = optax.chain(
        optax.scale_by_adam(), optax.scale_by_param_block_rms(), optax.scale_by_learning_rate(cosine)
    )
    transforms = {"choices": optax.adam(settings.learning_rate), "ranges": relative}
    return optax.multi_transform(transforms, {"choices": "choices", "ranges": "ranges"})


def _step(model, optimizer, part, settings, image_shape, state, i, key, variables, grids, data):
    """One iteration on a random batch."""
    learned, opt_state = state
    key = jax.random.fold_in(key, i)
    pick, mix, inner = jax.random.split(key, 3)
    chosen = jax.random.randint(pick, (settings.batch_size,), 0, len(data[0]))
    noisy, clean, goal = (array[chosen] for array in data)
    drop = settings.drop if part.activations else 0.0
    x = jnp.where(jax.random.bernoulli(mix, drop, noisy.shape), clean, noisy) if drop else noisy
    share = i / settings.iterations
    cooled = jnp.clip((share - _WARM_UP) / (1 - _WARM_UP), 0.0, 1.0)
    sharpness = _SHARPNESS[0] + (_SHARPNESS[1] - _SHARPNESS[0]) * cooled
    strength = jnp.where(share < _WARM_UP, 0.0, settings.strength)

    def loss(learned):
        own = variables
        if learned["ranges"]:
            own = {**variables, PARAMETERS: _with_ranges(variables[PARAMETERS], learned["ranges"])}
        hooks = _hooks(part, learned["choices"], grids, drop, inner)
        image = jnp.zeros((settings.batch_size, *image_shape), jnp.float32)
        y = run(model, own, image, given={part.start: x}, hooks=hooks, outputs=[part.end])[1][part.end]
        # Summed over channels, mean over examples and places: as in BRECQ, so that its strengths apply.
        error = jnp.mean(jnp.sum((y - goal) ** 2, axis=-1))
        undecided = sum(indecision(choice, sharpness) for choice in learned["choices"].values())
        return error + strength * undecided

    updates, opt_state = optimizer.update(jax.grad(loss)(learned), opt_state, learned)
    return optax.apply_updates(learned, updates), opt_state


def _hooks(part, choices, grids, drop, key) -> dict:
    """Kernels by their choices; activations of the part randomly unquantized, or those of a layer always."""

    def weights(path):
        def hook(call, kernel, *rest):
            return call(kernel, *rest).moved(soft_value(choices[path], *grids[path]))

        return hook

    def activations(i):
        def hook(call, x, *rest):
            quantized = call(x, *rest)
            dropped = jax.random.bernoulli(jax.random.fold_in(key, i), drop, x.shape)
            return quantized.moved(jnp.where(dropped, x, quantized.value))

        return hook

    hooks = {f"{path}/weights": weights(path) for path in part.kernels}
    if drop:
        hooks |= {path: activations(i) for i, path in enumerate(part.activations)}
    for path in part.unquantized:
        for name in ("activations", "outputs"):
            hooks[f"{path}/{name}"] = lambda call, x, *rest: call(x, *rest).moved(x)
    return hooks


def _neighbours_of(model, kernels, variables, example) -> dict:
    quantizers = {call.path: call.module for call in record_calls(model, variables, example)}
    scales = {path: getattr(quantizers[f"{path}/weights"].spec, "scale", None) for path in kernels}
    dorefa = [path for path, scale in scales.items() if scale == "dorefa"]
    require(
        not dorefa,
        f"{', '.join(dorefa[:3])}: scale='dorefa' passes weights through tanh, so that learned rounding "
        "would be rounded again; give them a scale of 'static', 'lsq', 'range' or 'log2'",
    )
    following, found = [path for path, scale in scales.items() if scale == "statistic"], {}

    def hook_of(path):
        def hook(call, kernel, *rest):
            grid = call(kernel, *rest)
            low, high = neighbours(kernel, grid)
            # Where the scale follows the largest weight, that one has no choice.
            largest = jnp.max(jnp.abs(kernel), tuple(range(kernel.ndim - grid.scale.ndim)))
            fixed = (jnp.abs(kernel) == largest) & (path in following)
            found[path] = jnp.where(fixed, grid.value, low), jnp.where(fixed, grid.value, high)
            return grid

        return hook

    hooks = {f"{path}/weights": hook_of(path) for path in kernels}
    apply_with_hooks(model, variables, example, hooks, train=False)
    return found


def _require_kept(model, variables, kernels, example) -> None:
    """Raises `UserError` where a quantizer does not map its new kernel to itself."""

    @jax.jit
    def kept(variables):
        found = {}

        def hook_of(path):
            def hook(call, kernel, *rest):
                quantized = call(kernel, *rest)
                found[path] = jnp.all(quantized.value == kernel)
                return quantized

            return hook

        hooks = {f"{path}/weights": hook_of(path) for path in kernels}
        apply_with_hooks(model, variables, example, hooks, train=False)
        return found

    moved = [path for path, same in kept(variables).items() if not same]
    require(
        not moved,
        f"{', '.join(moved[:3])}: the scale of the weights follows the weights, so that learned rounding "
        "would be rounded again; give them a scale of 'static', 'lsq', 'range' or 'log2', or 'statistic' "
        "with statistic='absmax'",
    )


def _with_ranges(parameters: Mapping, ranges: Mapping[str, jax.Array]) -> dict:
    return unflatten_dict({**flatten_dict(parameters, sep="/"), **ranges}, sep="/")
