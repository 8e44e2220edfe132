"""Operators that read or write elements at indices, and those along an axis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, form

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _indices(call: Call, operand: int, size: int) -> Tensor:
    """Indices along an axis; those below 0 count from its end."""
    indices = call.tensor(operand).long()
    return torch.where(indices < 0, indices + size, indices)


@form("Gather")
def _gather(call: Call) -> Tensor:
    x = call.tensor(0)
    axis = call.get("axis", 0) % x.ndim
    indices = _indices(call, 1, x.shape[axis])
    if axis == 0:
        return functional.embedding(indices, x) if x.ndim == 2 else x[indices]
    chosen = x.index_select(axis, indices.reshape(-1))
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@form("GatherElements")
def _gather_elements(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", 0)
    return torch.gather(x, axis, _indices(call, 1, x.shape[axis]))


@form("GatherND")
def _gather_nd(call: Call) -> Tensor:
    x, indices, batches = call.tensor(0), call.tensor(1).long(), call.get("batch_dims", 0)
    return x[_places(x, indices, batches)]


def _places(x: Tensor, indices: Tensor, batches: int = 0) -> tuple[Tensor, ...]:
    """Indices for `x[...]` of those along the last axis of a tensor, whose first axes are batches."""
    rank = indices.ndim - 1
    along = tuple(
        torch.arange(x.shape[axis], device=x.device).reshape(-1, *[1] * (rank - axis - 1))
        for axis in range(batches)
    )
    return (*along, *indices.unbind(dim=-1))  # PyTorch counts indices below 0 from the end, too.


@form("ScatterND")
def _scatter_nd(call: Call) -> Tensor:
    x, indices, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    places, reduction = _places(x, indices), call.text("reduction", "none")
    if reduction in ("none", "add"):
        return x.index_put(places, updates, accumulate=reduction == "add")
    flat = torch.arange(x.numel(), device=x.device).reshape(x.shape)[places]
    return _scattered(x.reshape(-1), 0, flat.reshape(-1), updates.reshape(-1), reduction).reshape(x.shape)


@form("Scatter", "ScatterElements")
def _scatter_elements(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", 0)
    return _scattered(
        x, axis, _indices(call, 1, x.shape[axis]), call.tensor(2), call.text("reduction", "none")
    )


def _scattered(x: Tensor, axis: int, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@form("TensorScatter")
def _tensor_scatter(call: Call) -> Tensor:
    past, update, axis = call.tensor(0), call.tensor(1), call.get("axis", -2)
    axis, length = axis % past.ndim, update.shape[axis]
    starts = call.tensor(2).long() if call.has(2) else torch.zeros(past.shape[0], dtype=torch.long)
    places = starts.to(past.device)[:, None] + torch.arange(length, device=past.device)
    if call.text("mode", "linear") == "circular":
        places = places % past.shape[axis]
    around = [past.shape[0], *[1] * (past.ndim - 1)]
    around[axis] = length
    return past.scatter(axis, places.reshape(around).expand(update.shape), update)


@form("TopK")
def _top(call: Call) -> tuple[Tensor, ...]:
    x, axis = call.tensor(0), call.get("axis", -1)
    (count,) = call.ints(1, "k") or [1]
    values, places = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@form("Compress")
def _compress(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, call.tensor(1).nonzero().reshape(-1))


@form("CumSum")
def _cumulated(call: Call) -> Tensor:
    x = call.tensor(0)
    (axis,) = call.ints(1) or [0]
    x = x.flip(axis) if call.get("reverse", 0) else x
    total = x.cumsum(dim=axis)
    if call.get("exclusive", 0):
        total = torch.cat(
            (torch.zeros_like(x.narrow(axis, 0, 1)), total.narrow(axis, 0, x.shape[axis] - 1)), axis
        )
    return total.flip(axis) if call.get("reverse", 0) else total


@form("Trilu")
def _triangle(call: Call) -> Tensor:
    x = call.tensor(0)
    (offset,) = call.ints(1) or [0]
    return torch.triu(x, offset) if call.get("upper", 1) else torch.tril(x, offset)


@form("ReverseSequence")
def _reverse_sequence(call: Call) -> Tensor:
    x, lengths = call.tensor(0), call.tensor(1).long()
    axes = call.get("time_axis", 0), call.get("batch_axis", 1)
    moved = x.movedim(axes, (0, 1))
    places = reversed_places(lengths, moved.shape[0]), torch.arange(moved.shape[1], device=x.device)
    return moved[places].movedim((0, 1), axes)


def reversed_places(lengths: Tensor, times: int) -> Tensor:
    """The indices that reverse sequences of several lengths, time by sequence; what lies behind one stays."""
    time = torch.arange(times, device=lengths.device)[:, None]
    return torch.where(time < lengths, lengths - 1 - time, time)


@form("OneHot")
def _one_hot(call: Call) -> Tensor:
    (depth,) = call.ints(1) or [1]
    indices, values = _indices(call, 0, depth), call.tensor(2)
    hot = indices.unsqueeze(-1) == torch.arange(depth, device=indices.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, call.get("axis", -1))


@form("CenterCropPad")
def _center_crop_pad(call: Call) -> Tensor:
    x, sizes = call.tensor(0), call.ints(1) or []
    axes = call.get("axes", list(range(x.ndim)))
    pairs = np.zeros((x.ndim, 2), np.int64)
    for axis, size in zip(axes, sizes, strict=True):
        rest = abs(size - x.shape[axis])
        pairs[axis] = (
            (rest // 2, rest - rest // 2) if size > x.shape[axis] else (-(rest // 2), rest // 2 - rest)
        )
    return functional.pad(x, pairs[::-1].reshape(-1).tolist())
