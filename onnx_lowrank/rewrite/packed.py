"""Smaller parts of packed matrices: their weights, biases and sizes, after all narrowings.

Up to two narrowings take features from a packed matrix: that of its queries and keys, and that of its values.
So its numbers wait here until all parts are narrow, or until the end, and are stored once. The matrix comes
before the layer that reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.layer import Layer, Rows
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of
from onnx_lowrank.graph.weights import Source, constant, resolve
from onnx_lowrank.layers.binding import Binding, Size
from onnx_lowrank.operators.attention import widths_of
from onnx_lowrank.rewrite.edits import Edits, set_attribute
from onnx_lowrank.rewrite.heads import before, change_number
from onnx_lowrank.rewrite.narrow import Less, changing

_SPLIT_INPUT = 13
"""The first opset in which a Split reads its sizes."""


@dataclass(slots=True)
class _Waiting:
    """A constant of a packed matrix.

    Attributes:
        values: Its numbers, as far as features are taken.
        axis: The axis of the features.
        source: Where to store it.
        name: Its name so far.
        taken: The first feature of every part that has got smaller, and how many went.
        left: The number of features that are in no such part.
    """

    values: NDArray[Any]
    axis: int
    source: Source
    name: str
    left: int
    taken: dict[int, int] = field(default_factory=dict)


class Packs:
    """The packed matrices of a model."""

    def __init__(self, model: Model, walk: Walk, edits: Edits) -> None:
        """Start without narrowings.

        Args:
            model: The model.
            walk: Its walk.
            edits: Receives the edits.
        """
        self._model = model
        self._walk = walk
        self._edits = edits
        self._waiting: dict[tuple[Place, int], _Waiting] = {}
        self._copies: dict[Place, NodeProto] = {}
        self._lost: dict[Size, int] = {}
        self._splits: dict[Place, list[int]] = {}
        self._fused: dict[Place, list[int]] = {}
        self._scales: dict[Place, float] = {}
        # Where to store the sizes that a node reads.
        self._sources: dict[Place, Source] = {}

    def copied(self, place: Place, node: NodeProto) -> None:
        """Note that a copy takes the place of a node; its operands and attributes are set in the copy."""
        self._copies[place] = node

    def put(
        self,
        place: Place,
        operand: int,
        axis: int,
        values: NDArray[Any],
        source: Source,
        layer: Layer,
        width: int,
    ) -> None:
        """Take over a constant whose own queries and keys are narrow.

        Args:
            place: The node that reads it.
            operand: Its input that is the constant.
            axis: The axis of the features.
            values: The constant.
            source: Where to store it.
            layer: The layer with the packed matrix.
            width: Its width.
        """
        rows = () if layer.narrowing is None else layer.narrowing.rows
        taken = {each.start: each.size - each.size * width // layer.width for each in rows}
        left = layer.f - sum(each.size for each in rows)
        name = self._name(place, operand)
        self._waiting[place, operand] = _Waiting(values, axis, source, name, left, taken)

    def take_all(
        self, binding: Binding, less: Less, fresh: Mapping[tuple[Place, int], NDArray[Any]]
    ) -> set[tuple[Place, int]]:
        """Make the features fewer that a layer takes from a packed partner.

        Args:
            binding: The layer.
            less: Makes them fewer.
            fresh: New values of constants, by node and operand.

        Returns:
            Places and operands of the constants that are taken over.
        """
        layer, hidden = binding.layer, binding.hidden
        if hidden is None or layer.narrowing is None or layer.packs_own or not layer.narrowing.rows:
            return set()
        (partner,), (rows,) = layer.partners, layer.narrowing.rows
        taken = set()
        for place, operand, axis in changing(self._walk, hidden):
            value = fresh.get((place, operand))
            if value is None:
                value = constant(self._walk, self._model, self._walk.operand(place, operand))
            if value is not None and value.shape[axis] == partner.f:
                self._take(place, operand, axis, value, rows, less, hidden.producers[0].stored.source)
                taken.add((place, operand))
        return taken

    def _take(
        self,
        place: Place,
        operand: int,
        axis: int,
        value: NDArray[Any],
        rows: Rows,
        less: Less,
        beside: Source,
    ) -> None:
        """Make some features of a constant fewer.

        Args:
            place: The node that reads it.
            operand: Its input that is the constant.
            axis: The axis of the features.
            value: The constant.
            rows: The features.
            less: Makes them fewer.
            beside: Where to store the constant, if it is not stored anywhere.
        """
        waiting = self._waiting.get((place, operand))
        if waiting is None:
            found = resolve(self._walk, self._walk.operand(place, operand))
            source = beside if isinstance(found, str) else found.source
            name, left = self._name(place, operand), value.shape[axis]
            waiting = self._waiting[place, operand] = _Waiting(value, axis, source, name, left)
        start = rows.start - sum(number for first, number in waiting.taken.items() if first < rows.start)
        before, part, after = np.split(waiting.values, [start, start + rows.size], waiting.axis)
        fewer = less(part, waiting.axis)
        waiting.values = np.concatenate([before, fewer, after], waiting.axis)
        waiting.left -= rows.size
        waiting.taken[rows.start] = rows.size - fewer.shape[waiting.axis]
        if not waiting.left:
            self._store(place, operand)

    def resize(self, binding: Binding, width: int) -> None:
        """Note the sizes of the parts that a narrowing takes features from.

        Args:
            binding: The layer.
            width: Its new width.
        """
        layer, hidden = binding.layer, binding.hidden
        if hidden is None or layer.narrowing is None:
            return
        rows = layer.narrowing.rows
        lost = [each.size - each.size * width // layer.width for each in rows]
        places = [*(size.place for size in hidden.totals), *(cut.place for cut in hidden.splits)]
        self._sources |= dict.fromkeys(places, binding.stored.source)
        for size in hidden.totals:
            self._lost[size] = self._lost.get(size, 0) + sum(lost)
        for cut, number in zip(hidden.splits, lost, strict=False):
            sizes = self._splits.setdefault(cut.place, list(cut.lengths))
            sizes[cut.output] -= number
        if hidden.fused is not None:
            (packed,) = layer.partners or (layer,)
            widths = widths_of(self._walk.node(hidden.fused), packed.f) or ()
            sizes = self._fused.setdefault(hidden.fused, list(widths))
            if layer.packs_own:
                # Without a scale, the operator takes it from the size of the queries' heads.
                stated = attribute_of(self._walk.node(hidden.fused), "scale", 0.0)
                self._scales[hidden.fused] = stated or 1 / sqrt(widths[0] // layer.width_step)
            # The parts of an Attention are the queries, the keys and the values.
            for part, number in zip((0, 1) if layer.packs_own else (2,), lost, strict=True):
                sizes[part] -= number

    def flush(self) -> None:
        """Plan the edits of all that waits."""
        for place, operand in [*self._waiting]:
            self._store(place, operand)
        for size, lost in self._lost.items():
            change_number(self._model, self._walk, self._edits, self._sources[size.place], size, (1, 1), lost)
        for place, sizes in self._splits.items():
            self._resplit(place, sizes)
        for place, sizes in self._fused.items():
            self._refit(place, sizes)

    def _name(self, place: Place, operand: int) -> str:
        return self._walk.origin(self._walk.operand(place, operand))[1]

    def _store(self, place: Place, operand: int) -> None:
        """Store a constant and let its node read it."""
        waiting = self._waiting.pop((place, operand))
        values = np.ascontiguousarray(waiting.values)
        self._repoint(place, operand, self._edits.keep(waiting.source, f"{waiting.name}_narrow", values))

    def _repoint(self, place: Place, operand: int, name: str) -> None:
        if place in self._copies:
            self._copies[place].input[operand] = name
        else:
            self._edits.scopes[place.scope].repointed[place.node, operand] = name
        self._edits.unread(place, operand)

    def _resplit(self, place: Place, sizes: list[int]) -> None:
        """Plan the new sizes of the parts of a Split."""
        attributes = self._edits.scopes[place.scope].attributes
        if self._walk.opsets[place.scope] < _SPLIT_INPUT:
            attributes[place.node, "split"] = sizes
            return
        name = f"{self._walk.node(place).output[0]}_sizes"
        values = np.array(sizes, np.int64)
        self._repoint(place, 1, self._edits.keep(before(self._sources[place], place), name, values))
        # A Split states either the sizes of its parts or their number.
        attributes[place.node, "num_outputs"] = None

    def _refit(self, place: Place, sizes: list[int]) -> None:
        """Plan the new sizes of the parts of an Attention, whose scale stays as it is."""
        changes: dict[str, Any] = {"qkv_hidden_sizes": sizes}
        if place in self._scales:
            changes["scale"] = self._scales[place]
        for name, value in changes.items():
            if place in self._copies:
                set_attribute(self._copies[place], name, value)
            else:
                self._edits.scopes[place.scope].attributes[place.node, name] = value
