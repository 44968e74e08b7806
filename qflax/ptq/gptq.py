"""GPTQ: rounds a kernel input by input, and makes up for each error by the weights still to be rounded.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qflax.errors import UserError, require
from qflax.layers import Conv, Dense
from qflax.numerics import IntegerFormat, LearnedInteger, MinifloatFormat
from qflax.ptq.taps import record_calls, run
from qflax.ptq.variables import changed, leaf
from qflax.ptq.walk import Walk
from qflax.quantizers import (
    FLOAT,
    PARAMETERS,
    STATISTICS,
    Minifloat,
    MixedPrecision,
    QuantizedArray,
    Quantizer,
    Uniform,
    value_of,
)

Layer = Conv | Dense


def gptq(
    model: nn.Module,
    variables: Mapping,
    batches: Iterable[jax.Array],
    *,
    damping: float = 0.01,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """Rounds the kernels of convolutions and dense layers so that the layers' outputs change least.

    Layer after layer, each with the inputs that it gets behind the changed ones. Scales and ranges stay.
    The new kernels lie on the grids of their quantizers, which so return them as they are; while a learned
    range is not frozen, weights at its ends may be one unit in the last place off. Left alone are float
    layers, accumulator-aware ones, whose codes are not those of the kernel but of a normalised one,
    convolutions with a mask, and all layers but `Conv` and `Dense`.

    Args:
      model: a network built of qflax layers, called with `train=False`.
      variables: its variables, calibrated.
      batches: model inputs [batch, ...]; at least one; passed over several times. Of all of them what one
        block of the network gets is held in memory, up to 4 GiB; beyond, more is computed again.
      damping: added to the diagonal of each layer's Hessian, as a fraction of its mean; not negative.
      progress: told of the quantized layers that are left alone.

    Returns:
      The variables with new kernels.

    Raises:
      UserError: no layer has such a quantizer; one's grid changes with the kernel that lies on it; a
        Hessian is not positive definite.
    """
    example = next(iter(batches), None)
    require(example is not None, "gptq: no batches; it needs at least one of the model's inputs")
    require(damping >= 0, f"damping={damping!r}: must not be negative")
    targets, others = _targets(model, variables, example[:1])
    if others:
        progress(f"gptq leaves alone {', '.join(others)}")
    walk = Walk(model, variables, batches, list(targets))
    for path, (layer, quantizer) in targets.items():
        quantize = _quantize_function(quantizer, variables, f"{path}/weights")
        kernel = leaf(variables["params"], path)["kernel"]
        grid = quantize(kernel)
        settled = _settled(quantizer, kernel, grid)
        hessian = _hessian(model, variables, walk.to(path, variables), path, layer)
        rounded = _rounded(kernel, settled, grid, hessian, damping, path)
        rounded = _restored(quantizer, quantize, rounded, path)
        variables = changed(variables, "params", path, kernel=lambda _, rounded=rounded: rounded)
    return dict(variables)


def _targets(
    model: nn.Module, variables: Mapping, example: jax.Array
) -> tuple[dict[str, tuple[Layer, Quantizer]], list[str]]:
    """Path -> layer and quantizer of its weights, in the order of the network; paths of other layers."""
    calls = record_calls(model, variables, example)
    modules = {call.path: call.module for call in calls}
    lifted = {call.path for call in calls if call.lifted}
    targets, others = {}, []
    for path, layer in modules.items():
        quantizer = modules.get(f"{path}/weights")
        if quantizer is None:
            continue
        own_grid = path not in lifted and isinstance(quantizer.spec, Uniform | Minifloat | MixedPrecision)
        if own_grid and isinstance(layer, Layer) and getattr(layer, "mask", None) is None:
            targets[path] = layer, quantizer.clone(parent=None, name=None)
        else:
            others.append(path)
    require(
        bool(targets),
        "gptq: no convolution or dense layer of the network has weights of kind 'uniform', 'minifloat' or "
        "'mixed_precision'; quantize the weights of some by one of these",
    )
    return targets, others


def _quantize_function(quantizer: Quantizer, variables: Mapping, path: str) -> Callable:
    """What the quantizer at `path` makes of a kernel."""
    own = {}
    for name in (PARAMETERS, STATISTICS):
        tree = variables.get(name, {})
        own[name] = functools.reduce(lambda tree, key: tree.get(key, {}), path.split("/"), tree)
    return functools.partial(_quantized, quantizer, own)


@functools.partial(jax.jit, static_argnums=0)
def _quantized(quantizer, variables, kernel):
    return quantizer.apply(variables, kernel)


def _settled(quantizer: Quantizer, kernel: jax.Array, grid: QuantizedArray) -> jax.Array:
    """Where the scale follows the largest weights these as they are rounded in `grid`; elsewhere NaN."""
    if getattr(quantizer.spec, "scale", None) != "statistic":
        return jnp.full_like(kernel, jnp.nan)
    axes = tuple(range(kernel.ndim - 1)) if grid.scale.ndim else None
    size = jnp.abs(kernel)
    return jnp.where(size == jnp.max(size, axes), grid.value, jnp.nan)


def _hessian(
    model: nn.Module,
    variables: Mapping,
    places: Iterable[tuple[jax.Array, Mapping]],
    path: str,
    layer: Layer,
) -> np.ndarray:
    """Sum of x x^T over all inputs x that the kernel is multiplied by.

    Args:
      model: the network.
      variables: its variables.
      places: pairs of what `run` gets.
      path: of the layer.
      layer: itself.

    Returns:
      float64 [groups, inputs, inputs], inputs ordered as those of `_as_matrices`.
    """

    @jax.jit
    def of_batch(variables, batch, given):
        products = []

        def hook(call, inputs):
            result = call(inputs)
            x = value_of(result if layer.quantize_input else inputs)
            x = _patches(layer, x.astype(jnp.float32))
            products.append(jnp.einsum("ngi,ngj->gij", x, x, precision="highest"))
            return result

        where = f"{path}/input" if layer.quantize_input else path
        run(model, variables, batch, given=given, hooks={where: hook})
        return sum(products)

    return np.asarray(sum(of_batch(variables, *place) for place in places), np.float64)


def _patches(layer: Layer, x: jax.Array) -> jax.Array:
    """The inputs of each product: [products, groups, inputs]."""
    if isinstance(layer, Dense):
        return x.reshape(-1, 1, x.shape[-1])
    window = np.atleast_1d(layer.kernel_size)
    channels, groups, size = x.shape[-1], layer.feature_group_count, math.prod(window)
    # The layer itself, whatever its strides, padding and dilation, with kernels that pick one place each.
    fields = {"features": channels * size, "feature_group_count": channels, "use_bias": False}
    fields |= {"quantization": FLOAT, "quantize_input": False}
    fields |= {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    picking = layer.clone(parent=None, name=None, **fields)
    kernel = jnp.tile(jnp.eye(size).reshape(*window, 1, size), channels)
    # Channels come first among the inputs, before places, and groups are groups of channels.
    return picking.apply({"params": {"kernel": kernel}}, x).reshape(-1, groups, channels // groups * size)


def _as_matrices(kernel: jax.Array, groups: int) -> jax.Array:
    """[inputs, groups, features / groups] of a kernel, inputs ordered by channel, then by place."""
    channels_first = jnp.moveaxis(kernel, -2, 0)
    return channels_first.reshape(-1, groups, kernel.shape[-1] // groups)


def _as_kernel(matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The kernel of `shape` of which `_as_matrices` made these."""
    channels_first = (shape[-2], *shape[:-2], shape[-1])
    return jnp.moveaxis(matrices.reshape(channels_first), 0, -2)


def _rounded(
    kernel: jax.Array,
    settled: jax.Array,
    grid: QuantizedArray,
    hessian: np.ndarray,
    damping: float,
    path: str,
) -> jax.Array:
    """The kernel on the grid but for what is settled; inputs are taken by their size, the largest first."""
    sizes = np.einsum("gii->gi", hessian)
    order = np.argsort(-sizes, axis=-1, kind="stable")
    hessian = np.take_along_axis(hessian, order[:, :, None], 1)
    hessian = np.take_along_axis(hessian, order[:, None, :], 2)
    try:
        factor = _inverse_factor(hessian, damping)
    except np.linalg.LinAlgError:
        raise UserError(
            f"{path}: the Hessian of its inputs is not positive definite with damping={damping!r}, or not "
            "finite; use a larger damping, such as 0.01, and finite inputs"
        ) from None

    def arrange(x, order):
        return jnp.take_along_axis(x, order.T[:, :, None], 0)

    groups = len(hessian)
    weights = jnp.where((sizes == 0).T[:, :, None], 0.0, _as_matrices(kernel, groups))
    settled = arrange(_as_matrices(settled, groups), order)
    matrices = _round_in_turn(arrange(weights, order), settled, jnp.float32(factor), grid.scale, grid.format)
    return _as_kernel(arrange(matrices, np.argsort(order, axis=-1)), kernel.shape)


def _inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U, of each group, for which U^T U is the inverse of the damped Hessian.

    Row i of it, divided by its diagonal element, is how the error of input i spreads to those that follow
    when the ones before are settled (Frantar et al. 2022, section 3.3, step 3).

    Args:
      hessian: float64 [groups, inputs, inputs]; inputs without any size have a diagonal of 0.
      damping: fraction of the mean diagonal.
    """
    diagonal = np.einsum("gii->gi", hessian)
    added = np.where(diagonal == 0, 1.0, damping * diagonal.mean(-1, keepdims=True))
    damped = hessian + added[:, :, None] * np.eye(hessian.shape[-1])
    # From the last input to the first, so that the inverse of the factor is a factor of the inverse.
    upper = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    return np.linalg.inv(upper)


@jax.jit
def _round_in_turn(
    weights: jax.Array,
    settled: jax.Array,
    factor: jax.Array,
    scale: jax.Array,
    fmt: IntegerFormat | LearnedInteger | MinifloatFormat,
) -> jax.Array:
    """Rounds one input after the other, each error spread to those that follow.

    Args:
      weights: float32 [inputs, groups, features / groups].
      settled: of the same shape, results that are settled beforehand; elsewhere NaN.
      factor: float32 [groups, inputs, inputs], of `_inverse_factor`.
      scale, fmt: the grid, of all features.
    """

    def step(i, weights):
        row = weights[i]
        nearest = _nearest(row.reshape(-1), scale, fmt).reshape(row.shape)
        point = jnp.where(jnp.isnan(settled[i]), nearest, settled[i])
        error = (row - point) / factor[:, i, i, None]
        return (weights - factor[:, i].T[:, :, None] * error).at[i].set(point)

    return jax.lax.fori_loop(0, len(weights), step, weights)


def _nearest(
    x: jax.Array, scale: jax.Array, fmt: IntegerFormat | LearnedInteger | MinifloatFormat
) -> jax.Array:
    """The nearest points of a grid; `x` is [..., channels]."""
    if isinstance(fmt, LearnedInteger):
        return fmt.decode(fmt.encode(x, scale), scale)
    return fmt.fake_quant(x, scale)


def _restored(quantizer: Quantizer, quantize: Callable, rounded: jax.Array, path: str) -> jax.Array:
    """The kernel of which the quantizer makes exactly the rounded one: itself, or the end of a range."""
    kernel = quantize(rounded).value
    # DoReFa rounds other values than the kernel's own, though some of its grids are restored.
    other = getattr(quantizer.spec, "scale", None) == "dorefa"
    if not other and jnp.array_equal(quantize(kernel).value, rounded):
        return kernel
    remedy = "use scale='static', 'lsq', 'range' or 'log2', or 'statistic' with absmax"
    if isinstance(quantizer.spec, MixedPrecision):
        remedy = "freeze its width first, so that its range is a whole number of steps"
    raise UserError(f"{path}: its quantizer would change weights that lie on its own grid; {remedy}")
