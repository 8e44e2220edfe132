"""The errors of tables that keep the rows that are read most (`linalg.sparse`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.progress import Progress
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.sparse import SparseItem, sparse_errors
from onnx_lowrank.work.weights import reference


def errors(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    statistics: Statistics,
    block: int,
    executor: Executor,
    progress: Progress,
) -> dict[str, NDArray[np.float64]]:
    """The relative errors of all tables that can keep rows, at the ranks 0, 1, …, by id.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        statistics: Their moments, with the counts of rows.
        block: The step between ranks.
        executor: Runs the computations.
        progress: Where to show progress.

    Raises:
        InputError: A data file has changed.
    """
    chosen = [binding for binding in bindings if _can_keep_rows(model, walk, binding, statistics)]

    def items() -> Iterator[SparseItem]:
        for binding in chosen:
            layer, moments = binding.layer, statistics.reference(binding.layer.id)
            if moments is not None:
                weight, every = reference(model, walk, binding), layer.sparse_step(block)
                yield SparseItem(weight, moments, layer.kept_per_rank, every)

    if not chosen:
        return {}
    found = {}
    with progress.stage("tables", len(chosen)) as step:
        for binding, curve in zip(chosen, executor.map(sparse_errors, items()), strict=True):
            found[binding.layer.id] = curve
            step()
    return found


def _can_keep_rows(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> bool:
    """Whether it is known how often the rows of a layer are read.

    The power of the rows, not of their deviations from the mean, decides which ones stay. So a table with a
    bias that takes up the mean is left out.
    """
    moments = statistics.reference(binding.layer.id)
    return moments is not None and moments.has_counts and bias(model, walk, binding) is None
