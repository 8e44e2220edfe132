"""The errors that a few options of every layer cause at the model's outputs.

Rules:

1. The options with activation errors next to `PROBED` are tried, each alone in the model, on some of the
   calibration inputs (`calibrate.sensitivity`).
2. Layers that the inputs do not reach are not tried: they have no effect on these inputs, but may have one
   on others.
3. Layers without a measured effect count as average ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.calibrate import sensitivity
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.statistics import Statistics
from onnx_lowrank.core.option import Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.segments import Substitute
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.fit import added_inside, factors_item
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import dense

_log = logging.getLogger(__name__)

PROBED = (0.01, 0.04, 0.12, 0.3, 0.6)
"""Relative activation errors near which the effect on the model's outputs is measured."""

Effects = tuple[tuple[float, float], ...]
"""Pairs: an activation error of one layer, and the error that it causes at the model's outputs."""


def effects(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    tables: Sequence[Candidates],
    calibration: Calibration,
    executor: Executor,
    progress: Progress,
) -> list[Effects]:
    """Measure the errors that some options cause at the model's outputs.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        tables: Their candidates, scored by activation errors.
        calibration: The inputs.
        executor: Makes the factors.
        progress: Where to show progress.

    Returns:
        The effects of every layer's options, at least one pair for each layer.

    Raises:
        InputError: A data file has changed.
    """
    unseen = calibration.statistics.reasons
    chosen = {table.layer: () if table.layer in unseen else _probes(table) for table in tables}

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        options = [option for option, _ in chosen[binding.layer.id]]
        return _substitutes(model, walk, binding, options, calibration.statistics, executor)

    with progress.stage("outputs", 1) as step:
        caused = sensitivity.measure(
            model,
            walk,
            [binding for binding in bindings if chosen[binding.layer.id]],
            substitutes,
            calibration.samples,
            calibration.engine,
            step=step,
        )
    return _assumed([_pairs(chosen[table.layer], caused, table.layer) for table in tables])


def _probes(table: Candidates) -> tuple[tuple[Option, float], ...]:
    """The options with errors next to `PROBED`, and these errors, in ascending order."""
    # Not >= 0: the logarithm of the kept layer's error 0 is infinite.
    known = np.flatnonzero(table.error > 0)
    if not known.size:
        return ()
    # Logarithms, as the probed errors lie on a scale of factors.
    distance = np.abs(np.log(table.error[known][None] / np.array(PROBED)[:, None]))
    picks = sorted({int(known[n]) for n in distance.argmin(axis=1)}, key=lambda n: float(table.error[n]))
    options = ((table.option(pick), float(table.error[pick])) for pick in picks)
    return tuple((option, error) for option, error in options if option is not None)


def _pairs(
    chosen: Sequence[tuple[Option, float]], caused: Mapping[str, NDArray[np.float64]], layer: str
) -> Effects:
    """The effects of one layer; none if they were not measured or are all zero."""
    if layer not in caused or not caused[layer].any():
        return ()
    return tuple(zip((error for _, error in chosen), caused[layer].tolist(), strict=True))


def _assumed(measured: Sequence[Effects]) -> list[Effects]:
    """The effects, and those of an average layer for every layer without (rule 3)."""
    pairs = [pair for layer in measured for pair in layer]
    usual = float(np.median([caused / error for error, caused in pairs])) if pairs else 1.0
    _log.debug("measured %d errors at the outputs, %.3g of those at their layers", len(pairs), usual)
    return [layer or ((1.0, usual),) for layer in measured]


def _substitutes(
    model: Model,
    walk: Walk,
    binding: Binding,
    options: Sequence[Option],
    statistics: Statistics,
    executor: Executor,
) -> Iterator[Substitute]:
    """A layer's dense weight and bias under each option, without refinement."""
    changeable = bias(model, walk, binding)
    items = (factors_item(model, walk, binding, option, changeable, statistics) for option in options)
    added = added_inside(changeable)
    for made in executor.map(dense, items):
        shifted = made.lost if made.lost is None or added is None else made.lost + added
        yield Substitute(made.weight, shifted)
