"""The rows of a table that the calibration inputs look up, where the indices are inputs of the model.

The inputs and the table show these rows, and how often each is read, so the model need not run. They are also
all that shows the rows of an operator that computes more than a look-up, such as EmbedLayerNormalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.calibrate.parts import Part
from onnx_lowrank.core.layer import Use
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import VIEWS
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.operators import registry

Counts = dict[bool, NDArray[np.int64]]
"""The number of times that every row was read, shape (c,), by whether the samples are held out."""

_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """A table whose indices are inputs of the model.

    Attributes:
        names: For each use, the input with its indices.
        table: Its rows, shape (c, f).
    """

    names: tuple[str, ...]
    table: NDArray[Any]

    def rows(self, feed: Feed) -> list[NDArray[Any]]:
        """The rows that a feed looks up, for each use, of the shape (*indices, f).

        Raises:
            InputError: An index lies outside the table.
        """
        return [self.table[indices] for indices in self._indices(feed)]

    def counts(self, feed: Feed, shown: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """How often a feed looks up every row, shape (c,).

        Args:
            feed: The inputs of the model.
            shown: Whether each index counts; None for all. Indices of another shape all count.
        """
        given = self._indices(feed)
        if shown is not None:
            given = [indices[shown] if indices.shape == shown.shape else indices for indices in given]
        found = np.concatenate([indices.ravel() for indices in given])
        return np.bincount(found, minlength=len(self.table))

    def _indices(self, feed: Feed) -> list[NDArray[np.int64]]:
        """The indices of each use, counted from the start of the table."""
        found = []
        for name in self.names:
            indices, rows = np.asarray(feed[name], np.int64), len(self.table)
            wrong = indices[(indices < -rows) | (indices >= rows)]
            if wrong.size:
                raise InputError(
                    f"The calibration input {name!r} selects row {wrong[0]} of a table with {rows} rows: "
                    "give inputs that the model takes."
                )
            found.append(np.where(indices < 0, indices + rows, indices))
        return found


def lookup(model: Model, walk: Walk, whole: Binding, part: Part) -> Lookup | None:
    """The table of a part; None for other parts, and if some of its indices are no inputs of the model.

    Args:
        model: The model.
        walk: Its walk.
        whole: A layer.
        part: A part of it.
    """
    names = [_source(model, walk, use) for use in part.binding.layer.uses]
    known = tuple(name for name in names if name is not None)
    if len(known) < len(names):
        return None
    (matrix,) = read(model, walk, whole)
    return Lookup(known, matrix.T if part.id == part.layer else matrix)


def _source(model: Model, walk: Walk, use: Use) -> str | None:
    """The model input with the indices of a use; None if they are computed, or if the use may not run."""
    if not use.reads_indices or use.scope:
        return None
    at = Place(use.scope, use.node)
    tensor = walk.operand(at, registry.family(walk.node(at)).activation(use.operand))
    while tensor is not None and (place := walk.producer(tensor)) is not None:
        if not _keeps_indices(walk, place):
            return None
        tensor = walk.operand(place, 0)
    key = ("", "") if tensor is None else walk.origin(tensor)
    if key in walk.initializers:
        return None
    kinds = {("", value.name): value.type.tensor_type.elem_type for value in model.proto.graph.input}
    return key[1] if kinds.get(key) in _INTEGERS else None


def _keeps_indices(walk: Walk, place: Place) -> bool:
    """Whether a node changes at most the order of indices, so that each occurs as often behind it."""
    node = walk.node(place)
    if not is_op(node, VIEWS):
        return False
    return node.op_type != "Cast" or attribute_of(node, "to", 0) in _INTEGERS
