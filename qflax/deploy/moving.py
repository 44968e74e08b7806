"""What becomes of primitives that move numbers, and compute nothing, in a graph."""

import dataclasses

import numpy as np

from qflax.deploy.call import Call, Comparison, Known, Shape, Value, repeated


def _pad(call: Call) -> Value:
    x, value = call.inputs
    config = [tuple(side) for side in call.parameters["padding_config"]]
    zeros = isinstance(value, Known) and not np.any(value.array)
    plain = all(low >= 0 and high >= 0 and interior == 0 for low, high, interior in config)
    call.require(zeros and plain and config[0] == (0, 0, 0), "with other values than zeros around")
    return call.node("pad", call.whole(x), padding=tuple(side[:2] for side in config))


def _slice(call: Call) -> Value:
    p, x = call.parameters, call.whole(call.inputs[0])
    starts, limits = p["start_indices"], p["limit_indices"]
    strides = p["strides"] or (1,) * len(starts)
    return sliced(call, x, starts, limits, strides, call.shape)


def sliced(call, x, starts, limits, strides, shape) -> Value:
    call.require(starts[0] == 0 and limits[0] == x.shape[0] and strides[0] == 1, "of the batch")
    stops = tuple(None if limit == n else int(limit) for limit, n in zip(limits, x.shape, strict=True))
    start, step = tuple(map(int, starts)), tuple(map(int, strides))
    return call.node("slice", x, result=shape, start=start, stop=stops, step=step)


def split(call: Call) -> list[Value]:
    """The only primitive with several outputs."""
    x, axis, sizes = call.whole(call.inputs[0]), call.parameters["axis"], call.parameters["sizes"]
    firsts = np.cumsum((0, *sizes[:-1])).tolist()
    return [_part(call, x, axis, first, size) for first, size in zip(firsts, sizes, strict=True)]


def _part(call: Call, x: Value, axis: int, first: int, size: int) -> Value:
    """What lies at `first` and behind it along an axis."""
    starts, limits = [0] * len(x.shape), list(x.shape)
    starts[axis], limits[axis] = first, first + size
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    return sliced(call, x, starts, limits, [1] * len(starts), shape)


def _reshape(call: Call) -> Value:
    return reshaped(call, call.whole(call.inputs[0]), call.shape)


def reshaped(call: Call, x: Value, shape: Shape) -> Value:
    batch = x.shape[0]
    call.require(shape[0] == batch, "mixes the batch with other axes")
    return call.node("reshape", x, result=shape, shape=(-1, *shape[1:]))


def _broadcast(call: Call) -> Value | Comparison:
    if isinstance(call.inputs[0], Comparison):
        x = call.inputs[0]
        return dataclasses.replace(x, value=_broadcast(dataclasses.replace(call, inputs=[x.value])))
    x, axes = call.inputs[0], call.parameters["broadcast_dimensions"]
    call.require(len(axes) and axes[0] == 0, "moves the batch")
    held = [1] * len(call.shape)
    for axis, n in zip(axes, x.held, strict=True):
        held[axis] = n
    if len(held) > len(x.held):
        x = reshaped(call, x, tuple(held))
    return dataclasses.replace(x, shape=call.shape)


def _transpose(call: Call) -> Value:
    permutation = tuple(call.parameters["permutation"])
    call.require(permutation[0] == 0, "moves the batch")
    return call.node("transpose", call.whole(call.inputs[0]), permutation=permutation)


def _concatenate(call: Call) -> Value:
    axis = call.parameters["dimension"]
    call.require(axis != 0, "along the batch")
    return call.node("concatenate", *map(call.whole, call.inputs), axis=axis)


def _stack(call: Call) -> Value:
    axis = call.parameters["axis"]
    shape = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    parts = [reshaped(call, call.whole(x), shape) for x in call.inputs]
    return call.node("concatenate", *parts, axis=axis)


def _tile(call: Call) -> Value:
    x, times = call.whole(call.inputs[0]), call.parameters["reps"]
    call.require(len(times) == len(x.shape) and times[0] == 1, "along the batch")
    for axis, n in enumerate(times):
        x = repeated(x, axis, n, call.emit, call.layer)
    return x


def _gather(call: Call) -> Value:
    """Of known places along one axis, as `x[:, [2, 0, 1]]` and `jax.image.resize` to the nearest have it."""
    x, places = call.whole(call.inputs[0]), call.inputs[1]
    call.require(isinstance(places, Known), "of places that depend on the input")
    numbers, places = call.parameters["dimension_numbers"], places.whole()
    (axis, *more), size = numbers.start_index_map, x.shape[numbers.start_index_map[0]]
    others = tuple(i for i in range(len(x.shape)) if i != axis)
    one = not more and (numbers.collapsed_slice_dims, numbers.offset_dims) == ((axis,), others)
    taken = call.shape == (*x.shape[:axis], places.size, *x.shape[axis + 1 :])
    call.require(one and axis and taken, "along the batch, or of other than places along one axis")
    call.require(np.all((places >= 0) & (places < size)), "of places that are not there")
    places, times = places.ravel(), places.size // size
    if np.array_equal(places, np.repeat(np.arange(size), times)):
        apart = reshaped(call, x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
        return reshaped(call, repeated(apart, axis + 1, times, call.emit, call.layer), call.shape)
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    parts = [_part(call, x, axis, int(run[0]), len(run)) for run in runs]
    return call.node("concatenate", *parts, axis=axis)


MOVING = {
    "pad": _pad,
    "slice": _slice,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "gather": _gather,
}
