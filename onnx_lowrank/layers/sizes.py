"""Sizes between layers: the numbers in the targets of Reshape and Expand, and those that a Shape gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, infer, shape_of
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import VIEWS, constant
from onnx_lowrank.layers.binding import Pin, Size
from onnx_lowrank.operators.family import known

_LONGEST = 8
"""So many views at most lie between the size of an axis and the target that joins it with others."""


@dataclass(frozen=True, slots=True)
class Followed:
    """The size of an axis, where a target of Reshape or Expand takes it over.

    Attributes:
        tensor: Name of the tensor with the axis, in the walk.
        axis: The axis.
        reader: The node and its operand that read the size.
        size: The place of the size in the target.
        stated: The size of the axis if the model states it, whatever the shapes of its inputs.
    """

    tensor: str
    axis: int
    reader: tuple[Place, int]
    size: Size
    stated: int | None = None


class Sizes:
    """The sizes of a model's tensors, and the places of the constants that set them."""

    def __init__(self, model: Model, walk: Walk, shapes: Shapes) -> None:
        """Take the shapes of all tensors."""
        self._model = model
        self._walk = walk
        self._shapes = shapes
        self._stated: Shapes | None = None

    def of(self, tensor: Any) -> tuple[int, ...] | None:
        """The shape of a tensor; None if a dimension is unknown, or 0, which tells no axes apart."""
        shape = known(shape_of(self._walk, self._shapes, tensor))
        return None if shape is None or 0 in shape else shape

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
        piece = self._piece(concat, index)
        if piece is None:
            return None
        part, value, within = piece
        return None if value is None else (Size(place, 1, part, within), int(value[within]))

    def followed(self, place: Place, index: int) -> Followed | None:
        """The size from which a number in the target of a Reshape or Expand is computed, without arithmetic.

        The target is a Concat, or it is one where -1 is replaced, as PyTorch writes it. Nothing else may read
        the number on its way. None if it is computed otherwise.
        """
        tensor = self._walk.operand(place, 1)
        where = None if tensor is None else self._walk.producer(tensor)
        if where is not None and is_op(self._walk.node(where), ("Where",)):
            equal = self._walk.producer(self._walk.operand(where, 0))
            is_equal = equal is not None and is_op(self._walk.node(equal), ("Equal",))
            tensor, whole = self._walk.operand(where, 2), tensor
            compared = [] if equal is None else [self._walk.operand(equal, index) for index in (0, 1)]
            if not is_equal or tensor not in compared or self._walk.consumers(whole) != [(place, 1)]:
                return None
        concat = None if tensor is None else self._walk.producer(tensor)
        if concat is None or concat.scope or not is_op(self._walk.node(concat), ("Concat",)):
            return None
        others = [self._walk.node(other) for other, operand in self._walk.consumers(tensor)]
        if not all(
            is_op(node, ("Equal", "Shape", "Where")) or node is self._walk.node(place) for node in others
        ):
            return None
        piece = self._piece(concat, index)
        if piece is None or piece[1] is not None:
            return None
        return self._picked_by(concat, piece[0], Size(place, 1, piece[0], piece[2]))

    def _picked_by(self, reader: Place, operand: int, size: Size) -> Followed | None:
        """The size that a Gather or Slice takes out of a Shape for an operand of a node."""
        for _ in range(_LONGEST):
            tensor = self._walk.operand(reader, operand)
            place = None if tensor is None else self._walk.producer(tensor)
            if place is None or self._walk.is_output(tensor):
                return None
            shape = self._walk.producer(self._walk.operand(place, 0))
            if shape is not None and is_op(self._walk.node(shape), ("Shape",)):
                whole = self._walk.operand(shape, 0)
                picked = self._picked(place, 0, self._given(shape, len(self.of(whole) or ())))
                if whole is None or picked is None or len(picked[0]) != 1:
                    return None
                axis = picked[0][0]
                return Followed(whole.name, axis, (reader, operand), size, self._stated_size(whole, axis))
            is_view = is_op(self._walk.node(place), VIEWS)
            if not is_view or self._walk.consumers(tensor) != [(reader, operand)]:
                return None
            reader, operand = place, 0
        return None

    def _stated_size(self, tensor: Any, axis: int) -> int | None:
        """The size of an axis, if the model states it."""
        if self._stated is None:
            self._stated = infer(self._model, {})
        shape = shape_of(self._walk, self._stated, tensor)
        return None if shape is None else shape[axis]

    def _given(self, shape: Place, rank: int) -> list[int]:
        """The axes whose sizes a Shape gives."""
        node = self._walk.node(shape)
        return list(range(rank))[attribute_of(node, "start", 0) : attribute_of(node, "end", rank)]

    def _piece(self, concat: Place, index: int) -> tuple[int, NDArray[Any] | None, int] | None:
        """The operand of a Concat with a number of its result, its value if constant, and the index there."""
        for part in range(len(self._walk.node(concat).input)):
            piece = self._walk.operand(concat, part)
            length = self.of(piece)
            if length is None or len(length) != 1:
                return None
            if index < length[0]:
                return part, constant(self._walk, self._model, piece), index
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
        result, given = self._walk.result(shape), self._given(shape, rank)
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
