"""The errors that a few options of every layer cause at the model's outputs.

Rules:

1. The options with activation errors next to `PROBED` are tried, each alone in the model, on some of the
   calibration inputs (`calibrate.sensitivity`).
2. Layers that the inputs do not reach are not tried.
3. Layers with an effect of zero on these inputs count as average ones: they may have one on others.
4. The effect of a layer that was not tried is unknown, and no other layer's effect says anything about it. If
   nothing can be tried at all, the errors of the layers' outputs stand for the effects of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.calibrate import sensitivity
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.outcomes import Outcomes
from onnx_lowrank.calibrate.sensitivity import NOTHING, Memory, unknown
from onnx_lowrank.core.option import Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import Bias, bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.segments import Substitute
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.fit import added_inside, factors_item
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import DenseItem, dense

_log = logging.getLogger(__name__)

PROBED = (1 / 128, 1 / 32, 1 / 8, 1 / 2)
"""Relative activation errors near which the effect on the model's outputs is measured: evenly spaced in their
logarithms, in which effects between them are linear. Three points misjudge layers that lose much."""

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
    narrow: Mapping[str, Candidates] = MappingProxyType({}),
) -> tuple[Sequence[Effects | str], Mapping[str, Effects]]:
    """Measure the errors that some options cause at the model's outputs.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        tables: Their candidates, scored by activation errors.
        calibration: The inputs.
        executor: Makes the factors.
        progress: Where to show progress.
        narrow: The narrowings of layers that can be narrowed, by id.

    Returns:
        For every layer the effects of its options, at least one pair; or why they are unknown, a sentence.
        And the effects of narrowings, by id of the layer: errors of dropped channels spread otherwise over
        the positions than those of low ranks, so they have effects of their own.

    Raises:
        InputError: A data file has changed.
    """
    unseen = calibration.statistics.reasons
    chosen = {table.layer: () if table.layer in unseen else _probes(table) for table in tables}
    widths = {layer: _probes(table) for layer, table in narrow.items() if layer not in unseen}
    tried = {layer: (*probes, *widths.get(layer, ())) for layer, probes in chosen.items()}
    # Not only those with a chain: some layers can be narrowed, but no chain of them is cheaper.
    measured = [binding for binding in bindings if tried[binding.layer.id]]
    with progress.stage("outputs", 1) as step:
        caused = _caused(model, walk, measured, tried, calibration, executor, step)
    if not caused:
        return _assumed([()] * len(tables)), {}
    known = [_pairs(chosen[table.layer], caused, table.layer) for table in tables]
    narrowed = {layer: _pairs(tried, caused, layer, len(chosen[layer])) for layer, tried in widths.items()}
    # A layer that has no options is kept anyway.
    reasons = (unseen.get(table.layer) or caused.reasons.get(table.layer, "") for table in tables)
    found = [reason or pairs for pairs, reason in zip(_assumed(known), reasons, strict=True)]
    return found, {layer: pairs for layer, pairs in narrowed.items() if pairs}


def _caused(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    tried: Mapping[str, Sequence[tuple[Option, float]]],
    calibration: Calibration,
    executor: Executor,
    step: Callable[[float], None],
) -> sensitivity.Sensitivities:
    """The errors at the model's outputs that options of some layers cause, in their order."""
    statistics, samples = calibration.statistics, calibration.varied
    biases = {binding.layer.id: bias(model, walk, binding) for binding in bindings}

    def item(binding: Binding) -> DenseItem:
        options = [option for option, _ in tried[binding.layer.id]]
        return _item(model, walk, binding, options, biases[binding.layer.id], statistics)

    memory: Memory = NOTHING
    if calibration.keeper is not None:
        layers = [binding.layer.id for binding in bindings]
        keeper = calibration.keeper.of("effects", statistics.padding, layers)
        memory = Outcomes(keeper, {b.layer.id: keeper.key(b.layer.id, item(b)) for b in bindings})
    missing = unknown(bindings, memory)
    known = len(bindings) - len(missing)
    _log.debug("the effects of %d layers are in the cache, %d are measured", known, len(missing))
    with closing(_substitutes(missing, item, biases, executor)) as made:
        # Layers that cannot be overridden are passed over, and their substitutes with them.
        def substitutes(binding: Binding) -> list[Substitute]:
            return next(found for layer, found in made if layer == binding.layer.id)

        return sensitivity.measure(
            model,
            walk,
            bindings,
            substitutes,
            samples,
            calibration.engine,
            threads=executor.threads,
            padding=statistics.padding,
            trials=len(PROBED),
            memory=memory,
            step=step,
        )


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
    chosen: Sequence[tuple[Option, float]],
    caused: Mapping[str, NDArray[np.float64]],
    layer: str,
    start: int = 0,
) -> Effects:
    """The effects of one layer's options from a number on; none if they were not measured or are all zero."""
    if layer not in caused or not caused[layer].any():
        return ()
    errors = (error for _, error in chosen)
    return tuple(zip(errors, caused[layer][start : start + len(chosen)].tolist(), strict=True))


def _assumed(measured: Sequence[Effects]) -> list[Effects]:
    """The effects, and those of an average layer for every layer without (rule 3)."""
    pairs = [pair for layer in measured for pair in layer]
    usual = float(np.median([caused / error for error, caused in pairs])) if pairs else 1.0
    _log.debug("measured %d errors at the outputs, %.3g of those at their layers", len(pairs), usual)
    return [layer or ((1.0, usual),) for layer in measured]


def _item(
    model: Model,
    walk: Walk,
    binding: Binding,
    options: Sequence[Option],
    changeable: Bias | None,
    statistics: Statistics,
) -> DenseItem:
    """The work item of a layer's substitutes."""
    item = factors_item(model, walk, binding, options[0], changeable, statistics)
    way = statistics.ways.get(binding.layer.id)
    return DenseItem(item.weight, tuple(options), item.moments, item.centred, item.added, way)


def _substitutes(
    bindings: Sequence[Binding],
    item: Callable[[Binding], DenseItem],
    biases: Mapping[str, Bias | None],
    executor: Executor,
) -> Generator[tuple[str, list[Substitute]]]:
    """Each layer's dense weights and biases under its options, without refinement.

    The executor makes those of the next layers while a layer is measured.
    """
    for binding, made in zip(bindings, executor.map(dense, map(item, bindings)), strict=True):
        added = added_inside(biases[binding.layer.id])
        yield (
            binding.layer.id,
            [
                Substitute(one.weight, one.lost if one.lost is None or added is None else one.lost + added)
                for one in made
            ],
        )
