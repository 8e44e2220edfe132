"""The errors of layers that share a factor, for every set of them that may share one (`allocate.joins`)."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Costs
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.joins import FEW, Joined, Names, families, joined
from onnx_lowrank.allocate.options import shared_ranks
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.fit import joined_item, shared_item
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.joins import JoinedItem, joined_errors
from onnx_lowrank.work.sharing import SharedItem, likeness

_log = logging.getLogger(__name__)


def errors(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    grid: Grid[Costs],
    ways: Container[Lowering],
    statistics: Statistics,
    executor: Executor,
    progress: Progress,
) -> Mapping[Joined, Sequence[NDArray[np.float64]]]:
    """For the layers of every set, the relative errors at the ranks 0, 1, … of their factor.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers, in graph order.
        grid: The ranks to choose from, and their costs. A set that is cheaper at no rank is left out.
        ways: The lowerings of the factors that layers may share.
        statistics: The moments of the layers. A set with moments that were not measured is left out.
        executor: Runs the computations.
        progress: Where to show progress.

    Raises:
        InputError: The moments are not finite, the costs depend on an unknown dimension, or a data file has
            changed.
    """
    by_id = {binding.layer.id: binding for binding in bindings}
    layers = [binding.layer for binding in bindings]
    chosen: list[tuple[Joined, int]] = []
    for group in joined(layers, ways, _likenesses(model, walk, by_id, statistics, executor)):
        lowering, names = group
        ranks = shared_ranks([by_id[name].layer for name in names], lowering, grid)
        if ranks.size and _is_measured(group, statistics):
            chosen.append((group, int(ranks[-1])))

    def items() -> Iterator[JoinedItem]:
        for (lowering, names), top in chosen:
            yield joined_item(model, walk, [by_id[name] for name in names], lowering, top, statistics)

    if not chosen:
        return {}
    begin, curves = monotonic(), {}
    with progress.stage("shared", len(chosen)) as step:
        for (group, _), computed in zip(chosen, executor.map(joined_errors, items()), strict=True):
            curves[group] = computed
            step()
    _log.debug("computed the errors of %d shared factors in %.2f s", len(chosen), monotonic() - begin)
    return curves


def _likenesses(
    model: Model, walk: Walk, bindings: Mapping[str, Binding], statistics: Statistics, executor: Executor
) -> Mapping[Names, NDArray[np.float64]]:
    """How alike many siblings are, by family, where their inputs were measured."""
    groups = families(binding.layer for binding in bindings.values())
    large = [names for names in groups if len(names) > FEW and statistics.shared_inputs(names) is not None]

    def items() -> Iterator[SharedItem]:
        for names in large:
            siblings = [bindings[name] for name in names]
            yield shared_item(model, walk, siblings, 1, statistics.shared_inputs(names))

    return dict(zip(large, executor.map(likeness, items()) if large else (), strict=True))


def _is_measured(group: Joined, statistics: Statistics) -> bool:
    """Whether moments show what the layers of a set lose by sharing a factor."""
    lowering, names = group
    if lowering is Lowering.SHARED:
        return statistics.shared_inputs(names) is not None
    found = [statistics.reference(name) for name in names]
    return statistics.summed_outputs(names) is not None and all(ref and ref.of_inputs for ref in found)
