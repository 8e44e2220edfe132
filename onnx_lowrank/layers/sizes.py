"""Sizes between layers: the numbers in the targets of Reshape and Expand, and those that a Shape gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, shape_of
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.layers.binding import Pin, Size
from onnx_lowrank.operators.operator import known


class Sizes:
    """The sizes of a model's tensors, and the places of the constants that set them."""

    def __init__(self, model: Model, walk: Walk, shapes: Shapes) -> None:
        """Take the shapes of all tensors."""
        self._model = model
        self._walk = walk
        self._shapes = shapes

    def of(self, tensor: Any) -> tuple[int, ...] | None:
        """The shape of a tensor; None if a dimension is unknown."""
        return known(shape_of(self._walk, self._shapes, tensor))

    def entry(self, place: Place, index: int) -> tuple[Size, int] | None:
        """The place and the value of a number in the target of a Reshape or Expand.

        The target is one constant, or a Concat. None if the number is computed.
        """
        tensor = self._walk.operand(place, 1)
        if tensor is None or index < 0 or len(self.of(tensor) or ()) != 1:
            return None
        value = constant(self._walk, self._model, tensor)
        if value is not None:
            return (Size(place, 1, None, index), int(value[index])) if index < len(value) else None
        concat = self._walk.producer(tensor)
        if concat is None or concat.scope or not is_op(self._walk.node(concat), ("Concat",)):
            return None
        for part in range(len(self._walk.node(concat).input)):
            piece = self._walk.operand(concat, part)
            length = self.of(piece)
            if length is None or len(length) != 1:
                return None
            if index < length[0]:
                value = constant(self._walk, self._model, piece)
                return None if value is None else (Size(place, 1, part, index), int(value[index]))
            index -= length[0]
        return None

    def pins(self, shape: Place, axis: int, rank: int, value: int) -> list[Pin] | None:
        """The readers of the size of one axis, among those of a Shape.

        Args:
            shape: The Shape.
            axis: The axis of its operand.
            rank: The number of axes of its operand.
            value: The size of the axis.

        Returns:
            The readers; None if one reads the size together with others.
        """
        node, result = self._walk.node(shape), self._walk.result(shape)
        given = list(range(rank))[attribute_of(node, "start", 0) : attribute_of(node, "end", rank)]
        if axis not in given:
            return []
        if result is None or self._walk.is_output(result):
            return None
        pins: list[Pin] = []
        for place, operand in self._walk.consumers(result):
            picked = self._picked(place, operand, given)
            if picked is None:
                return None
            axes, dims = picked
            if axis not in axes:
                continue
            chosen = self._walk.result(place)
            if set(axes) != {axis} or chosen is None or self._walk.is_output(chosen):
                return None
            pins += [Pin(*reader, value, dims) for reader in self._walk.consumers(chosen)]
        return pins

    def _picked(
        self, place: Place, operand: int, given: Sequence[int]
    ) -> tuple[list[int], tuple[int, ...]] | None:
        """The axes whose sizes a Gather or Slice takes out of a shape, and the shape of its result."""
        node = self._walk.node(place)
        if operand == 0 and is_op(node, ("Gather",)):
            indices = constant(self._walk, self._model, self._walk.operand(place, 1))
            if indices is None or any(not -len(given) <= index < len(given) for index in indices.ravel()):
                return None
            return [given[int(index)] for index in indices.ravel()], indices.shape
        if operand == 0 and is_op(node, ("Slice",)):
            start, end, step = (self._single(place, index) for index in (1, 2, 4))
            if start is None or end is None or (step is None and self._walk.operand(place, 4) is not None):
                return None
            taken = list(given)[start : end : step or 1]
            return taken, (len(taken),)
        return None

    def _single(self, place: Place, index: int) -> int | None:
        """The number in a constant operand of one element; None for other operands."""
        tensor = self._walk.operand(place, index)
        value = None if tensor is None else constant(self._walk, self._model, tensor)
        return None if value is None or value.size != 1 else int(value.ravel()[0])
