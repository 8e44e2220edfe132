"""The errors of layers that share an encoder, for every set of them that may share one (`allocate.joins`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Costs
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.joins import FEW, families, joins
from onnx_lowrank.allocate.options import shared_ranks
from onnx_lowrank.calibrate.measurement import Statistics
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.fit import shared_item
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.moments import MomentsRef
from onnx_lowrank.work.sharing import SharedItem, likeness, shared_errors

_log = logging.getLogger(__name__)

Names = tuple[str, ...]


def errors(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    grid: Grid[Costs],
    statistics: Statistics,
    executor: Executor,
    progress: Progress,
) -> Mapping[Names, Sequence[NDArray[np.float64]]]:
    """For the layers of every set, by their ids, the relative errors at the ranks 0, 1, … of their encoder.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers, in graph order.
        grid: The ranks to choose from, and their costs. A set that is cheaper at no rank is left out.
        statistics: The moments of the layers. A set with inputs that were not measured is left out.
        executor: Runs the computations.
        progress: Where to show progress.

    Raises:
        InputError: The moments are not finite, the costs depend on an unknown dimension, or a data file has
            changed.
    """
    by_id = {binding.layer.id: binding for binding in bindings}
    chosen: list[tuple[Names, MomentsRef, int]] = []
    for names in _sets(model, walk, by_id, statistics, executor):
        found = statistics.shared_inputs(names)
        ranks = shared_ranks([by_id[name].layer for name in names], grid)
        if found is not None and ranks.size:
            chosen.append((names, found, int(ranks[-1])))

    def items() -> Iterator[SharedItem]:
        for names, found, top in chosen:
            yield shared_item(model, walk, [by_id[name] for name in names], top, found)

    if not chosen:
        return {}
    begin, curves = monotonic(), {}
    with progress.stage("shared", len(chosen)) as step:
        for (names, _, _), computed in zip(chosen, executor.map(shared_errors, items()), strict=True):
            curves[names] = computed
            step()
    _log.debug("computed the errors of %d shared encoders in %.2f s", len(chosen), monotonic() - begin)
    return curves


def _sets(
    model: Model, walk: Walk, bindings: Mapping[str, Binding], statistics: Statistics, executor: Executor
) -> Iterator[Names]:
    """The sets of layers that may share an encoder; of many siblings, only if their inputs were measured."""
    groups = families(binding.layer for binding in bindings.values())
    large = [names for names in groups if len(names) > FEW and statistics.shared_inputs(names) is not None]

    def items() -> Iterator[SharedItem]:
        for names in large:
            siblings = [bindings[name] for name in names]
            yield shared_item(model, walk, siblings, 1, statistics.shared_inputs(names))

    known = dict(zip(large, executor.map(likeness, items()) if large else (), strict=True))
    for names in groups:
        yield from joins(names, known.get(names))
