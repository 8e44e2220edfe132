"""Operators that move, cut, join and repeat elements."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import FLOATS, Call, as_tensor, form

_ALL = 2**31 - 1
_WHOLE = frozenset(map(np.dtype, ("bool", "int8", "int16", "int32", "int64", "uint8")))


@form("Shape")
def _shape(call: Call) -> NDArray[Any]:
    sizes = np.array(call.tensor(0).shape, np.int64)
    return sizes[call.get("start", 0) : call.get("end", len(sizes))]


@form("Size")
def _size(call: Call) -> NDArray[Any]:
    return np.array(call.tensor(0).numel(), np.int64)


@form("Reshape")
def _reshape(call: Call) -> Tensor:
    x, sizes = call.tensor(0), call.ints(1, "shape") or []
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@form("Flatten")
def _flatten(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", 1)
    rows = int(np.prod(x.shape[: axis % x.ndim if axis < 0 else axis], dtype=np.int64))
    return x.reshape(rows, -1)


@form("Transpose")
def _transpose(call: Call) -> Tensor:
    x = call.tensor(0)
    return x.permute(call.get("perm", list(reversed(range(x.ndim)))))


@form("Squeeze")
def _squeeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes")
    return call.tensor(0).squeeze() if axes is None else call.tensor(0).squeeze(tuple(axes))


@form("Unsqueeze")
def _unsqueeze(call: Call) -> Tensor:
    x, axes = call.tensor(0), call.ints(1, "axes") or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@form("Concat")
def _concat(call: Call) -> Tensor:
    return torch.cat(call.tensors(), dim=call.get("axis"))


@form("Split")
def _split(call: Call) -> tuple[Tensor, ...]:
    x, axis = call.tensor(0), call.get("axis", 0)
    sizes = call.ints(1, "split")
    if sizes is None:
        each = -(-x.shape[axis] // call.outputs)
        ends = [min(end, x.shape[axis]) for end in accumulate([each] * call.outputs)]
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return tuple(torch.split(x, sizes, dim=axis))


@form("Slice")
def _slice(call: Call) -> Tensor:
    x = call.tensor(0)
    starts, ends = call.ints(1, "starts") or [], call.ints(2, "ends") or []
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            cut = [slice(None)] * x.ndim
            cut[axis % x.ndim] = slice(start, min(end, _ALL), step)
            x = x[tuple(cut)]
        else:
            places = np.arange(x.shape[axis])[slice(max(start, -_ALL), end if end > -_ALL else None, step)]
            x = x.index_select(axis % x.ndim, torch.from_numpy(places.copy()).to(x.device))
    return x


@form("Expand")
def _expand(call: Call) -> Tensor:
    x, sizes = call.tensor(0), call.ints(1) or []
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(sizes)))


@form("Tile")
def _tile(call: Call) -> Tensor:
    return call.tensor(0).repeat(call.ints(1) or [])


@form("Pad")
def _pad(call: Call) -> Tensor:
    x, pads = call.tensor(0), call.ints(1, "pads") or []
    given = call.ints(3)
    axes = list(range(x.ndim)) if given is None else given
    before, behind = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(axes):
        before[axis], behind[axis] = pads[place], pads[len(axes) + place]
    mode = call.text("mode", "constant")
    if mode == "constant":
        value = float(call.tensor(2)) if call.has(2) else call.get("value", 0.0)
        pairs = [size for axis in reversed(range(x.ndim)) for size in (before[axis], behind[axis])]
        return functional.pad(x, pairs, value=value)
    for axis, pair in enumerate(zip(before, behind, strict=True)):
        if pair != (0, 0):
            x = x.index_select(axis, torch.from_numpy(_around(x.shape[axis], *pair, mode)).to(x.device))
    return x


def _around(size: int, before: int, behind: int, mode: str) -> NDArray[Any]:
    """The indices along an axis with padding; negative padding takes elements away."""
    left, right = max(0, -before), max(0, -behind)
    kept = np.arange(size)[left : size - right]
    return np.pad(kept, (max(0, before), max(0, behind)), mode=mode)  # type: ignore[call-overload,no-any-return]


@form("DepthToSpace")
def _depth_to_space(call: Call) -> Tensor:
    x, size = call.tensor(0), call.get("blocksize")
    if call.get("mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(x, size)
    batch, channels, rows, columns = x.shape
    parts = x.reshape(batch, size, size, channels // size**2, rows, columns)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, rows * size, columns * size)


@form("SpaceToDepth")
def _space_to_depth(call: Call) -> Tensor:
    x, size = call.tensor(0), call.get("blocksize")
    batch, channels, rows, columns = x.shape
    parts = x.reshape(batch, channels, rows // size, size, columns // size, size)
    order = (0, 1, 3, 5, 2, 4) if call.text("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    return parts.permute(order).reshape(batch, -1, rows // size, columns // size)


@form("Cast")
def _cast(call: Call) -> Tensor:
    return _as(call.tensor(0), np.dtype(helper.tensor_dtype_to_np_dtype(call.get("to"))))


@form("CastLike")
def _cast_like(call: Call) -> Tensor:
    like = call.operands[1]
    return (
        call.tensor(0).to(like.dtype)
        if isinstance(like, Tensor)
        else _as(call.tensor(0), np.asarray(like).dtype)
    )


def _as(x: Tensor, dtype: np.dtype[Any]) -> Tensor:
    if dtype not in FLOATS and dtype not in _WHOLE:
        raise NotImplementedError(f"Cast to {dtype}")
    return x.to(as_tensor(np.zeros(1, dtype)).dtype)
