"""Resize and Upsample: along every axis, each new element is a weighted sum of old ones.

Formulas: the operators' specification, https://onnx.ai/onnx/operators/onnx__Resize.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_lowrank.distil.forms.form import Call, form

_Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis to resize.

    Attributes:
        axis: Its number.
        old: Its size.
        new: The new size.
        scale: The ratio of both, before the new size is rounded.
        begin: Where the region of interest begins, as a share of the axis.
        end: Where it ends.
    """

    axis: int
    old: int
    new: int
    scale: float
    begin: float = 0.0
    end: float = 1.0


@form("Resize", "Upsample")
def _resize(call: Call) -> Tensor:
    x = call.tensor(0)
    outside = torch.zeros((), dtype=torch.bool, device=x.device)
    for one in _axes(call, x.shape):
        if one.old == one.new and one.scale == 1 and _mode(call) != "tf_crop_and_resize":
            continue
        places = _places(_mode(call), one)
        indices, weights = _weights(call, one, places)
        x = _summed(x, one, indices, weights)
        if _mode(call) == "tf_crop_and_resize":
            beyond = torch.from_numpy((places < 0) | (places > one.old - 1)).to(x.device)
            outside = outside | beyond.reshape(-1, *[1] * (x.ndim - one.axis - 1))
    if _mode(call) != "tf_crop_and_resize":
        return x
    return torch.where(outside, call.get("extrapolation_value", 0.0), x)


def _mode(call: Call) -> str:
    """How coordinates change; before operator set 11, there was one way."""
    return call.text("coordinate_transformation_mode", "half_pixel" if call.opset >= 11 else "asymmetric")


def _axes(call: Call, shape: Sequence[int]) -> list[_Axis]:
    axes = [axis % len(shape) for axis in call.get("axes", range(len(shape)))]
    olds = [shape[axis] for axis in axes]
    at = 2 if call.opset >= 11 else 1
    sizes, region = call.ints(3) if call.opset >= 11 else None, [0.0] * len(axes) + [1.0] * len(axes)
    if call.opset >= 11 and _mode(call) == "tf_crop_and_resize":
        region = call.tensor(1).tolist()
    if sizes:
        scales = [new / old for new, old in zip(sizes, olds, strict=True)]
        policy = call.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            scales = [(min if policy == "not_larger" else max)(scales)] * len(scales)
            sizes = [int(np.floor(scale * old + 0.5)) for scale, old in zip(scales, olds, strict=True)]
    else:
        scales = call.tensor(at).double().tolist() if call.has(at) else list(call.get("scales"))
        sizes = [int(np.floor(scale * old)) for scale, old in zip(scales, olds, strict=True)]
    half = len(region) // 2
    return [_Axis(*one) for one in zip(axes, olds, sizes, scales, region[:half], region[half:], strict=True)]


def _places(mode: str, one: _Axis) -> _Array:
    """The coordinates of new elements among the old ones."""
    new, length = np.arange(one.new, dtype=np.float64), one.scale * one.old
    if mode == "align_corners":
        return new * (one.old - 1) / (length - 1) if length != 1 else np.zeros(one.new)
    if mode == "asymmetric":
        return new / one.scale
    if mode == "tf_crop_and_resize":
        first, share = one.begin * (one.old - 1), (one.end - one.begin) * (one.old - 1)
        return first + (new * share / (length - 1) if length != 1 else np.full(one.new, share / 2))
    if mode == "pytorch_half_pixel" and length == 1:
        return np.full(one.new, -0.5)
    centre = one.old / 2 * (1 - one.new / length) if mode == "half_pixel_symmetric" else 0.0
    return centre + (new + 0.5) / one.scale - 0.5


def _weights(call: Call, one: _Axis, places: _Array) -> tuple[_Array, _Array]:
    """For every new element, the indices of old elements and their weights, new by neighbour."""
    left = np.ceil(places) - 1
    ratio = (places - left)[:, None]  # above 0, at most 1
    scale = min(one.scale, 1.0) if call.get("antialias", 0) else 1.0
    match call.text("mode", "nearest"):
        case "nearest":
            nearest = call.text("nearest_mode", "round_prefer_floor" if call.opset >= 11 else "floor")
            offsets, weights = np.arange(2), _nearest(ratio, nearest)
        case "cubic":
            reach = -int(np.floor(-2 / scale) + 1)
            offsets = np.arange(-reach, reach + 2)
            weights = _cubic(np.abs(scale * (offsets - ratio)), call.get("cubic_coeff_a", -0.75))
        case _:
            reach = -int(np.floor(-1 / scale) + 1)
            offsets = np.arange(-reach, reach + 2)
            weights = np.clip(1 - np.abs(scale * (offsets - ratio)), 0, 1)
    indices = left[:, None].astype(np.int64) + offsets
    if call.get("exclude_outside", 0):
        weights = weights * ((indices >= 0) & (indices < one.old))
    total = weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, one.old - 1), weights / np.where(total == 0, 1, total)


def _nearest(ratio: _Array, mode: str) -> _Array:
    is_right = {
        "round_prefer_floor": ratio > 0.5,
        "round_prefer_ceil": ratio >= 0.5,
        "floor": ratio == 1,
        "ceil": ratio > 0,
    }[mode]
    return np.concatenate((~is_right, is_right), axis=1).astype(np.float64)


def _cubic(distance: _Array, a: float) -> _Array:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _summed(x: Tensor, one: _Axis, indices: _Array, weights: _Array) -> Tensor:
    """The weighted sums along an axis."""
    if bool(((weights == 0) | (weights == 1)).all()):
        chosen = np.take_along_axis(indices, weights.argmax(axis=1, keepdims=True), axis=1)[:, 0]
        return x.index_select(one.axis, torch.from_numpy(chosen).to(x.device))
    matrix = np.zeros((one.new, one.old))
    np.add.at(matrix, (np.arange(one.new)[:, None], indices), weights)
    moved = x.movedim(one.axis, -1) @ torch.from_numpy(matrix).to(x).t()
    return moved.movedim(-1, one.axis)
