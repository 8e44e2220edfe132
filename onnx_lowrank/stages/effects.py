"""What a few options of every layer do to the model's outputs.

Rules:

1. The options whose activation errors lie next to `PROBED` are tried, each alone in the model, on some of
   the calibration inputs (`calibrate.sensitivity`).
2. Layers that the inputs do not reach have no effect on these outputs, which says nothing of others: they
   are not tried.
3. Layers whose effect cannot be measured count as average ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.calibrate import sensitivity
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.core.option import Option
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.layers.found import Found, prepared
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.probe.segments import Substitute
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.fit import activation_factors, lost_mean

_log = logging.getLogger(__name__)

PROBED = (0.01, 0.04, 0.12, 0.3, 0.6)
"""Relative activation errors near which the effect on the model's outputs is measured."""

Effects = tuple[tuple[float, float], ...]
"""Pairs of an activation error of one layer and the error at the model's outputs that it causes."""


def effects(
    found: Found,
    tables: Sequence[Candidates],
    calibration: Calibration,
    backend: Backend,
    progress: Progress,
) -> list[Effects]:
    """Measure what some options do to the model's outputs.

    Args:
        found: The model.
        tables: The candidates of its layers, scored by their activation errors.
        calibration: The inputs.
        backend: Where the linear algebra runs.
        progress: Where to show progress.

    Returns:
        The effects of every layer's options, at least one pair for each layer.

    Raises:
        InputError: A data file has changed.
    """
    unseen = calibration.statistics.reasons
    chosen = {table.layer: () if table.layer in unseen else _probes(table) for table in tables}

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        for option, _ in chosen[binding.layer.id]:
            yield _substitute(found, binding, option, calibration, backend)

    with progress.stage("outputs", 1) as step:
        caused = sensitivity.measure(
            found.model,
            found.walk,
            [binding for binding in found.bindings if chosen[binding.layer.id]],
            substitutes,
            calibration.samples,
            calibration.engine,
            step=step,
        )
    return _assumed([_pairs(chosen[table.layer], caused, table.layer) for table in tables])


def _probes(table: Candidates) -> tuple[tuple[Option, float], ...]:
    """The options whose errors are next to `PROBED`, with their errors, ascending."""
    known = np.flatnonzero(table.error > 0)
    if not known.size:
        return ()
    distance = np.abs(np.log(table.error[known][None] / np.array(PROBED)[:, None]))
    picks = sorted({int(known[n]) for n in distance.argmin(axis=1)}, key=lambda n: float(table.error[n]))
    options = ((table.option(pick), float(table.error[pick])) for pick in picks)
    return tuple((option, error) for option, error in options if option is not None)


def _pairs(
    chosen: Sequence[tuple[Option, float]], caused: Mapping[str, NDArray[np.float64]], layer: str
) -> Effects:
    """The effects of one layer; none where they were not measured, or are all zero."""
    if layer not in caused or not caused[layer].any():
        return ()
    return tuple(zip((error for _, error in chosen), caused[layer].tolist(), strict=True))


def _assumed(measured: Sequence[Effects]) -> list[Effects]:
    """The effects with those of an average layer where none were measured (rule 3)."""
    pairs = [pair for layer in measured for pair in layer]
    usual = float(np.median([caused / own for own, caused in pairs])) if pairs else 1.0
    _log.debug("measured %d errors at the outputs, %.3g of those at their layers", len(pairs), usual)
    return [layer or ((1.0, usual),) for layer in measured]


def _substitute(
    found: Found, binding: Binding, option: Option, calibration: Calibration, backend: Backend
) -> Substitute:
    """A layer's dense weight and bias under an option, without refinement."""
    weight, dtype = prepared(found, binding)
    moments = calibration.statistics[binding.layer.id]
    own = bias(found.model, found.walk, binding)
    factors = activation_factors(
        weight, option, moments, backend, centred=own is not None, steps=0
    ) or factorize(weight, option, backend, dtype)
    if own is None:
        return Substitute(compose(factors))
    added = own.values if own.in_node else 0.0
    return Substitute(compose(factors), lost_mean(weight, factors, moments, own) + added)
