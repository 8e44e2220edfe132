"""Operators that move values within a channel: each channel of the result depends on that channel alone.

The channels lie along the second axis, the positions along all axes behind it. Such operators may have
operands with one entry for each channel, along their first axis: the kernel of a depthwise convolution, the
scale of a BatchNormalization.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.folded import folded
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import constant

_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})
_REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_EXACT_AT_SCALE_1 = frozenset({"align_corners", "asymmetric", "half_pixel"})


def is_depthwise(walk: Walk, model: Model, place: Place) -> bool:
    """Whether a node is a convolution with one filter for each channel, all in one constant."""
    node = walk.node(place)
    if not is_op(node, _CONVOLUTIONS):
        return False
    kernels = walk.operand(place, 1)
    weight = None if kernels is None else constant(walk, model, kernels)
    return weight is not None and weight.ndim > 2 and weight.shape[:2] == (attribute_of(node, "group", 1), 1)


def channel_operands(walk: Walk, model: Model, place: Place, axes: int) -> tuple[int, ...] | None:
    """The operands of a node with one entry for each channel; None if the node may mix channels.

    Args:
        walk: The model's walk.
        model: The model.
        place: The node.
        axes: Number of axes of its first operand; 0 if it is unknown.
    """
    node = walk.node(place)
    if sum(bool(name) for name in node.output) != 1:
        return None
    if is_op(node, _POOLS):
        return ()
    if is_op(node, ("InstanceNormalization",)):
        return 1, 2
    if is_op(node, ("BatchNormalization",)):
        return 1, 2, 3, 4
    if is_depthwise(walk, model, place):
        return 1, 2
    if is_op(node, _REDUCTIONS):
        found = _axes(walk, model, place)
        stays = bool(attribute_of(node, "keepdims", 1)) and axes > 0
        return () if stays and found and _are_positions(found, axes) else None
    if is_op(node, ("Pad",)):
        return () if _pads_positions(walk, model, place, axes) else None
    if is_op(node, ("Resize", "Upsample")):
        return () if _scales_positions(walk, model, place) else None
    return None


def drops_positions(walk: Walk, model: Model, place: Place) -> int | None:
    """The number of axes of a node's first operand if its result is a matrix with these channels as columns.

    The result has as many columns as there are channels, so the axes of the positions have size 1 or are
    reduced. None for other nodes, and 0 if the number of axes is unknown.
    """
    node = walk.node(place)
    if is_op(node, ("Flatten",)):
        return 0 if attribute_of(node, "axis", 1) == 1 else None
    if is_op(node, ("Reshape",)):
        return None if columns(walk, model, place) is None else 0
    if is_op(node, ("Squeeze",)) or (is_op(node, _REDUCTIONS) and not attribute_of(node, "keepdims", 1)):
        found = _axes(walk, model, place)
        axes = 2 + len(found)
        return axes if found and {n % axes for n in found} == set(range(2, axes)) else None
    return None


def columns(walk: Walk, model: Model, place: Place) -> int | None:
    """The number of columns as a Reshape to a matrix states it; None if it is unknown, or for other nodes.

    It may be -1: the columns take what the rows leave, all channels of one position.
    """
    shape = walk.operand(place, 1)
    if shape is None or not is_op(walk.node(place), ("Reshape",)):
        return None
    value = folded(walk, model, shape)
    if value is not None:
        return int(value[1]) if value.shape == (2,) else None
    behind = walk.producer(shape)
    if behind is None or not is_op(walk.node(behind), ("Concat",)) or len(walk.node(behind).input) != 2:
        return None
    last = _value(walk, model, behind, 1)
    return -1 if last is not None and last.tolist() == [-1] else None


def _value(walk: Walk, model: Model, place: Place, index: int) -> NDArray[Any] | None:
    """The value of a small operand; None if it is unknown or left out."""
    tensor = walk.operand(place, index)
    return None if tensor is None else folded(walk, model, tensor)


def _axes(walk: Walk, model: Model, place: Place) -> tuple[int, ...]:
    """The axes of a reduction or of a Squeeze: an attribute or, in new opsets, an operand; () if unknown."""
    value = _value(walk, model, place, 1)
    named = attribute_of(walk.node(place), "axes", []) if value is None else np.ravel(value)
    return tuple(int(n) for n in named)


def _are_positions(found: tuple[int, ...], axes: int) -> bool:
    return all(n % axes > 1 for n in found)


def _pads_positions(walk: Walk, model: Model, place: Place, axes: int) -> bool:
    """Whether a Pad changes no axis but those of the positions."""
    node = walk.node(place)
    value = _value(walk, model, place, 1)
    pads = [int(n) for n in (attribute_of(node, "pads", []) if value is None else np.ravel(value))]
    if walk.operand(place, 3) is not None:
        named = _value(walk, model, place, 3)
        found = () if named is None else tuple(int(n) for n in np.ravel(named))
        return axes > 0 and bool(found) and len(pads) == 2 * len(found) and _are_positions(found, axes)
    half = len(pads) // 2
    return half > 2 and not any((*pads[:2], *pads[half : half + 2]))


def _scales_positions(walk: Walk, model: Model, place: Place) -> bool:
    """Whether a Resize or an Upsample scales no axis but those of the positions, by constant factors."""
    node = walk.node(place)
    if not _is_exact(node):
        return False
    scales: Any = attribute_of(node, "scales", [])  # Upsample before opset 9
    if not scales:
        # Before opset 11, a Resize has no roi.
        index = 2 if node.op_type == "Resize" and walk.opsets[place.scope] >= 11 else 1
        value = _value(walk, model, place, index)
        scales = [] if value is None else np.ravel(value)
    return len(scales) > 2 and list(scales[:2]) == [1, 1]


def _is_exact(node: NodeProto) -> bool:
    """Whether a factor of 1 leaves an axis as it is, and the factors stand for all axes."""
    mode = attribute_of(node, "coordinate_transformation_mode", "half_pixel")
    return mode in _EXACT_AT_SCALE_1 and not attribute_of(node, "axes", [])
