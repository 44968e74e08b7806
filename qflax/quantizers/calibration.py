"""Calibration: ranges of all quantizers of a model from batches of real data."""

import itertools
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qflax.errors import choose, require
from qflax.quantizers.checks import check_several_passes
from qflax.quantizers.collections import CALIBRATION, GIVEN, OBSERVED, PARAMETERS, STATISTICS
from qflax.quantizers.observers import observer_of
from qflax.quantizers.oscillation import in_record

CALIBRATIONS = ("batches", "ema", "set")


def calibrate(
    model: nn.Module,
    variables: Mapping,
    batches: Iterable[jax.Array],
    *,
    roles: Sequence[str] = tuple(CALIBRATION),
    over: str = "batches",
    momentum: float = 0.1,
    **call_arguments,
) -> dict:
    """Sets the ranges of all quantizers.

    Weight ranges come from the weights, activation ranges from the inputs of each quantizer, with quantized
    weights and float activations:

    | over    | range of activations                                        | passes               |
    |---------|-------------------------------------------------------------|----------------------|
    | batches | mean of the batches' ranges; of absolute maxima the maximum | 1                    |
    | ema     | running average of the batches' ranges, from the first on   | 1                    |
    | set     | of all batches as if they were one, in memory for one       | absmax, mean: 1;     |
    |         |                                                             | mse, kl: 2;          |
    |         |                                                             | percentile: 3        |

    A quantizer that the model calls several times sees the inputs of all its calls, each as one of a batch.
    Batch norm's statistics and the weights are left as they are; earlier calibrations are forgotten, and
    with the weights' ranges which of them are frozen. Nothing drops out, see `apply_without_dropout`.

    Args:
      model: a module built of qflax layers, without an axis of devices.
      variables: its variables.
      batches: model inputs, all of one shape, [batch, ...]; at least one. For `set` they must be the same in
        each pass, as those of a list are.
      roles: whose quantizers: `weights`, `activations`.
      over: see above.
      momentum: weight of the new batch in the running average of `ema`.
      **call_arguments: passed to the model, such as `train=True` for batch norm by batch statistics.

    Returns:
      The variables with new quantizer parameters and statistics.

    Raises:
      UserError: `over`, `momentum` or `batches` are impossible; a range is not finite; `set` with layers that
        `nn.scan` or `nn.vmap` repeats.

    Warns:
      UserWarning: of quantizers that no batch has reached, in this calibration or an earlier one.
    """
    choose("over", over, CALIBRATIONS)
    require(0 < momentum <= 1, f"momentum={momentum!r}: must be in (0, 1]")
    variables = dict(variables)
    if not (variables.get(PARAMETERS) or variables.get(STATISTICS)):
        return variables
    own = {name: variables.pop(name, {}) for name in (PARAMETERS, STATISTICS)}
    before = own[STATISTICS]
    own[STATISTICS] = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if _is_forgotten(path, roles) else x, own[STATISTICS]
    )
    mutable = [PARAMETERS, STATISTICS, *(CALIBRATION[role] for role in roles)]
    mutable += [name for name in ("batch_stats",) if name in variables]

    @jax.jit
    def observe(variables, own, batch):
        everything = {**variables, **own}
        _, state = apply_without_dropout(model, everything, batch, mutable=mutable, **call_arguments)
        return {name: state.get(name, {}) for name in own}

    @jax.jit
    def calls_of(variables, batch):
        observing = [*mutable, OBSERVED]
        _, state = apply_without_dropout(model, variables, batch, mutable=observing, **call_arguments)
        return flatten_dict(state.get(OBSERVED, {}))

    given = {}
    if over == "ema":
        given = _momenta(own[STATISTICS], momentum)
    elif over == "set":
        _require_single(own[STATISTICS])
        given = _ranges_of_set(lambda batch: calls_of({**variables, **own}, batch), batches)
        batches = itertools.islice(batches, 1)  # To set what follows from the ranges.
    batch = None
    for batch in batches:
        own = observe({**variables, GIVEN: given}, own, batch)
    require(batch is not None, f"over={over!r}: batches is empty, or used up; give at least one batch")
    _warn_of_unreached(before, own[STATISTICS], roles)
    _require_finite(own)
    return {**variables, **own}


def apply_without_dropout(model: nn.Module, variables: Mapping, *args, **kwargs) -> typing.Any:
    """`model.apply` for statistics that evaluation shall meet: with `train=True`, too, no `nn.Dropout` drops
    anything. What else draws from `dropout` (an attention's weights) draws the same each time.
    """
    rngs = {"dropout": jax.random.key(0), **(kwargs.pop("rngs", None) or {})}
    with nn.intercept_methods(_drop_nothing):
        return model.apply(variables, *args, rngs=rngs, **kwargs)


def _drop_nothing(next_call, args, kwargs, context):
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return args[0] if args else kwargs["inputs"]
    return next_call(*args, **kwargs)


def _counts(path: tuple, roles: Sequence[str]) -> bool:
    """Whether a statistic counts batches for a quantizer of these roles, which layers name after them."""
    if path[-1].key != "count":
        return False
    return len(path) == 1 or ("weights" if path[-2].key == "weights" else "activations") in roles


def _is_forgotten(path: tuple, roles: Sequence[str]) -> bool:
    """Whether a statistic is of an earlier calibration, or of weights that froze on the grid of that."""
    if in_record(path):
        return "weights" in roles and path[-1].key != "threshold"
    return _counts(path, roles)


def _warn_of_unreached(before: Mapping, after: Mapping, roles: Sequence[str]) -> None:
    """Warns of quantizers that never saw anything: their ranges would be placeholders."""
    earlier, now = (dict(jax.tree_util.tree_leaves_with_path(jax.device_get(x))) for x in (before, after))
    missed = [
        "/".join(key.key for key in path[:-1])
        for path, count in now.items()
        if len(path) > 1 and _counts(path, roles) and np.size(count) and not np.any(count)
        if not np.any(earlier.get(path, 0))
    ]
    if missed:
        warnings.warn(
            f"{', '.join(missed[:3])}: not calibrated: the model did not call it, or calls it where nothing "
            "is stored (nn.WeightNorm, nn.RNN without variable_axes); call the model such that it does, or "
            "leave it float by a rule",
            stacklevel=3,
        )


def _require_finite(own: Mapping) -> None:
    """Raises `UserError` with the paths of quantizers whose numbers are not finite."""
    numbers = flatten_dict(jax.device_get(own))
    wrong = ["/".join(path[1:]) for path, x in numbers.items() if not np.isfinite(x).all()]
    require(
        not wrong,
        f"{', '.join(wrong[:3])}: not finite after calibration; there are NaN or infinite elements in the "
        "batches, in the weights, or in what the network makes of them",
    )


def _momenta(quantizer_stats: Mapping, momentum: float) -> dict:
    """`GIVEN` with a momentum for each quantizer that observes a range."""
    # Of the count's shape, as layers that are repeated by `nn.scan` each take their own.
    counts = {path: x for path, x in flatten_dict(quantizer_stats).items() if path[-1] == "count"}
    return unflatten_dict(
        {(*path[:-1], "momentum"): np.full(x.shape, momentum, np.float32) for path, x in counts.items()}
    )


def _require_single(quantizer_stats: Mapping) -> None:
    """Raises `UserError` for layers that are repeated, whose calls are observed as one."""
    counts = {path: x for path, x in flatten_dict(quantizer_stats).items() if path[-1] == "count"}
    repeated = ["/".join(path[:-1]) for path, x in counts.items() if x.ndim]
    require(
        not repeated,
        f"over='set': {', '.join(repeated[:3])}: of layers that nn.scan or nn.vmap repeats, each of which "
        "has a range of its own; use 'batches' or 'ema'",
    )


def _ranges_of_set(calls_of: Callable, batches: Iterable[jax.Array]) -> dict:
    """`GIVEN` with the ranges of activations over all batches, in as many passes as their statistics need.

    Args:
      calls_of: function from a batch to {path: what came into a quantizer in each of its calls}.
      batches: see `calibrate`.
    """
    check_several_passes("over='set'", batches)
    first = next(iter(batches), None)
    require(first is not None, "over='set': batches is empty; give at least one batch")
    observers = {
        path: observer_of(calls[0].statistic) for path, calls in jax.eval_shape(calls_of, first).items()
    }
    while waiting := {path: observer for path, observer in observers.items() if not observer.done}:
        for batch in batches:
            for path, calls in calls_of(batch).items():
                for call in calls if path in waiting else ():
                    waiting[path].update(call.x)
        for observer in waiting.values():
            observer.end_pass()
    ends = {path: observer.ends() for path, observer in observers.items()}
    return unflatten_dict({(*path[:-1], name): ends[path][name] for path in ends for name in ends[path]})
