"""Packed matrices: one matrix computes several of queries, keys and values, and nodes cut its result apart.

Forms, for a matrix with f features and heads of d numbers:

1. A Split of the axis with all f features. Each part has its own size in the Split, so parts get narrower
   each by itself.
2. A Reshape to (…, n, heads, d), and a Split, Slice or Gather that takes one of n. All parts share the number
   d in the Reshape, so they get narrower together, or not at all.

A Slice of the axis with all features states where every other part begins, so it keeps the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from onnx_lowrank.core.layer import Rows
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.layers.axes import INSIDE, Axes, Part
from onnx_lowrank.layers.binding import Piece

WHICH = -2
"""The origin of the part that runs through the parts of a packed tensor."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part that a node takes out of a packed tensor.

    Attributes:
        piece: The node, its output, and the sizes of all its outputs.
        start: The first index that it takes of the axis.
        size: The size of the axis before the cut.
        parts: The parts of the axis after the cut.
    """

    piece: Piece
    start: int
    size: int
    parts: tuple[Part, ...]

    @property
    def has_heads(self) -> bool:
        """Whether it cuts the axis with the numbers of heads (form 1)."""
        return any(part.origin == INSIDE for part in self.parts)

    @property
    def whole(self) -> Part:
        """The axis before the cut."""
        return Part(WHICH, 1, self.size)


def uncut(
    walk: Walk, model: Model, place: Place, tensor: Any, axes: Axes, sizes: Sequence[int]
) -> tuple[Cut, Axes] | None:
    """The cut that a Split, Slice or Gather makes, and the axes before it.

    Args:
        walk: The model's walk.
        model: The model.
        place: The node.
        tensor: The result of the node.
        axes: The axes of the result.
        sizes: The shape of the operand.

    Returns:
        None if the node takes anything else than neighbours along one axis.
    """
    node, rank = walk.node(place), len(sizes)
    output = list(node.output).index(walk.origin(tensor)[1])
    drops, lengths = False, [1]
    if is_op(node, ("Split",)):
        axis = attribute_of(node, "axis", 0)
        lengths = _lengths(walk, model, place, sizes[axis]) if -rank <= axis < rank else []
        if not lengths:
            return None
        start = sum(lengths[:output])
    elif is_op(node, ("Gather",)):
        axis, index = attribute_of(node, "axis", 0), constant(walk, model, walk.operand(place, 1))
        if index is None or index.size != 1 or index.ndim > 1 or not -rank <= axis < rank:
            return None
        drops, start = index.ndim == 0, int(index.ravel()[0])
    else:
        found = [_number(walk, model, place, operand, default) for operand, default in _SLICE]
        if None in found or found[3] != 1 or not -rank <= (found[2] or 0) < rank:
            return None
        start, axis = found[0] or 0, found[2] or 0
    axis %= rank
    start += sizes[axis] if start < 0 else 0
    parts = () if drops else axes[axis]
    cut = Cut(Piece(place, output, tuple(lengths)), start, sizes[axis], parts)
    if is_op(node, ("Slice",)) and cut.has_heads:
        return None
    return cut, (*axes[:axis], (cut.whole,), *axes[axis if drops else axis + 1 :])


_SLICE = ((1, None), (2, None), (3, 0), (4, 1))
"""The operands of a Slice: starts, ends, axes and steps, with their defaults."""


def _number(walk: Walk, model: Model, place: Place, operand: int, default: int | None) -> int | None:
    """The one number in a constant operand; None for other operands."""
    tensor = walk.operand(place, operand)
    if tensor is None:
        return default
    value = constant(walk, model, tensor)
    return None if value is None or value.size != 1 else int(value.ravel()[0])


def _lengths(walk: Walk, model: Model, place: Place, size: int) -> list[int]:
    """The sizes of the outputs of a Split along an axis of a size; empty if they are computed or uneven."""
    node = walk.node(place)
    given = walk.operand(place, 1)
    if given is not None:
        value = constant(walk, model, given)
        return [] if value is None else [int(number) for number in value.ravel()]
    number = len(node.output)
    if stated := attribute_of(node, "split", []):
        return list(stated)
    return [] if size % number else [size // number] * number


def rows_of(features: Sequence[Part], cut: Cut) -> tuple[Rows, tuple[Part, ...]] | None:
    """The features of a packed matrix that a cut takes, and the parts of their axis.

    Args:
        features: The parts of the axis of all its features.
        cut: The cut.

    Returns:
        None if the features that are taken are no neighbours.
    """
    if features[:1] != (cut.whole,):
        return None
    rest = tuple(features[1:])
    inner = prod(part.size for part in rest)
    parts = (*cut.parts, *rest)
    return Rows(cut.start * inner, prod(part.size for part in parts)), parts
