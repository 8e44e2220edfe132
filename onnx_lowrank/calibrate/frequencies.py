"""How often the calibration inputs read each row of a table, where the indices are inputs of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, is_op
from onnx_lowrank.graph.weights import VIEWS
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry

Counts = dict[bool, NDArray[np.int64]]
"""The number of times that every row was read, shape (c,), by whether the samples are held out."""


def sources(model: Model, walk: Walk, binding: Binding) -> tuple[str, ...]:
    """The model inputs whose values are the indices of a table's uses; empty if some are computed.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
    """
    given, found = {("", value.name) for value in model.proto.graph.input}, []
    for use in binding.layer.uses:
        place: Place | None = Place(use.scope, use.node)
        operand = registry.family(walk.node(Place(use.scope, use.node))).activation(use.operand)
        tensor = None
        while place is not None:
            tensor = walk.operand(place, operand)
            place, operand = None if tensor is None else walk.producer(tensor), 0
            # Views change the order of indices, not how often each occurs.
            if place is not None and not is_op(walk.node(place), VIEWS):
                return ()
        if tensor is None or walk.origin(tensor) not in given - walk.initializers.keys():
            return ()
        found.append(walk.origin(tensor)[1])
    return tuple(found)


def counted(tables: Mapping[str, tuple[tuple[str, ...], int]], batches: Iterable[Batch]) -> dict[str, Counts]:
    """Count the rows that the inputs read.

    Args:
        tables: For every table its inputs (`sources`) and its number of rows, by id.
        batches: The calibration inputs.

    Returns:
        For every table whose indices are integers, the counts.
    """
    found: dict[str, Counts] = {layer: {} for layer in tables}
    for batch in batches:
        for layer, (names, rows) in tables.items():
            for name in names:
                indices = np.asarray(batch.feed[name])
                if layer in found and indices.dtype.kind not in "iu":
                    del found[layer]
                if layer in found:
                    # A negative index counts from the end.
                    read = np.bincount(np.mod(indices.ravel().astype(np.int64), rows), minlength=rows)
                    found[layer][batch.held] = found[layer].get(batch.held, 0) + read
    return {layer: counts for layer, counts in found.items() if False in counts}
