"""Finds the padding that a model ignores: it tries the model with other ids there.

A mask among the inputs says which positions are hidden; its name alone does not show that the model obeys it,
or which axes of its tensors count positions. So the model runs twice on a few samples, the second time with
ids of shown positions in place of the hidden ones. If its outputs are equal at all shown positions, and those
without positions are equal as a whole, it ignores hidden positions. A layer whose vectors at hidden
positions, and no others, differ has a vector for every position.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.jobs import Job
from onnx_lowrank.calibrate.lookups import Lookup
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.pasts import named_role
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

_SAMPLES, _BATCHES = 4, 64
_EQUAL = 1e-3  # of the largest element: float16 rounds sums of attention in another order


class _Samples(Protocol):
    def batches(self, size: int) -> Iterable[Batch]: ...


def find_padding(
    model: Model,
    jobs: Mapping[Job, Sequence[str]],
    tables: Mapping[str, Lookup],
    samples: _Samples,
    engine: Engine,
) -> Padding:
    """Find the padding of calibration inputs; none where hidden positions change a result.

    Args:
        model: The model, which also returns the tensors of the jobs.
        jobs: Measurements, each with its layers.
        tables: Tables whose indices are inputs, by layer.
        samples: The inputs.
        engine: Runs the model.
    """
    wanted = specs(model.proto)
    masks = [spec.name for spec in wanted if named_role(spec) == "mask"]
    feed = _hiding(masks[0], samples) if len(masks) == 1 else None
    if feed is None:
        return NO_PADDING
    shown = feed[masks[0]] != 0
    changed = _changed(feed, wanted, shown)
    if not changed:
        return NO_PADDING
    try:
        with engine.open(model) as run:
            before, after = run(feed), run({**feed, **changed})
    except (UnsupportedError, RejectedError) as error:
        _log.debug("whether %r hides positions is unknown: %s", masks[0], error)
        return NO_PADDING
    taps = {tap.name for job in jobs for tap, _ in job.sights}
    axes = _axes({name: pair for name, pair in _pairs(before, after) if name not in taps}, shown)
    if axes is None:
        _log.debug("positions that %r hides change other results: they count as all others", masks[0])
        return NO_PADDING
    layers = {name for job, names in jobs.items() if _follows(job, before, after, shown) for name in names}
    layers.update(name for name, table in tables.items() if set(table.names) <= changed.keys())
    _log.debug("positions that %r hides change nothing: %d layers leave them out", masks[0], len(layers))
    return Padding(masks[0], axes, frozenset(layers))


def _hiding(mask: str, samples: _Samples) -> Feed | None:
    """The first few samples that have hidden positions and shown ones; None if none of the first has."""
    for batch in islice(samples.batches(_SAMPLES), _BATCHES):
        values = np.asarray(batch.feed[mask])
        if values.ndim != 2 or not np.isin(values, (0, 1)).all():
            return None
        if values.any() and not values.all():
            return batch.feed
    return None


def _changed(feed: Feed, wanted: Sequence[Spec], shown: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """The inputs with a value for every position, with those of shown positions in place of hidden ones."""
    found = {}
    for spec in wanted:
        values = np.asarray(feed[spec.name])
        if named_role(spec) is None and values.shape[:2] == shown.shape:
            found[spec.name] = other = values.copy()
            given = values[shown]
            other[~shown] = given[np.arange(np.count_nonzero(~shown)) % len(given)]
    return found


def _pairs(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterable[tuple[str, tuple[NDArray[Any], NDArray[Any]]]]:
    """The arrays of numbers of both runs, by name."""
    for name, value in before.items():
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU":
            yield name, (value, after[name])


def _axes(
    outputs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], shown: NDArray[np.bool_]
) -> dict[str, int] | None:
    """The axis of positions of every output that hidden positions change; None if they change others."""
    found = {}
    for name, (value, other) in outputs.items():
        differs = _differs(value, other)
        if not differs.any():
            continue
        fit = [axis for axis in range(1, value.ndim) if (len(value), value.shape[axis]) == shown.shape]
        axis = next((axis for axis in fit if not np.moveaxis(differs, axis, 1)[shown].any()), None)
        if axis is None:
            return None
        found[name] = axis
    return found


def _follows(job: Job, before: Mapping[str, Any], after: Mapping[str, Any], shown: NDArray[np.bool_]) -> bool:
    """Whether the vectors of a job are those of the positions, and differ at hidden positions alone."""
    for tap, form in job.sights:
        if tap.depth:
            return False
        rows, others = (np.concatenate([*job.cut(form, made[tap.name])]) for made in (before, after))
        if len(rows) != shown.size:
            return False
        differs = np.array([row.any() for row in _differs(rows, others)])
        if not differs.any() or differs[shown.ravel()].any():
            return False
    return True


def _differs(value: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each element differs by more than rounding; all do if the shapes differ."""
    if value.shape != other.shape:
        return np.ones(value.shape, np.bool_)
    value, other = value.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(value)
    scale = np.abs(value[finite]).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        is_far = ~(np.abs(value - other) <= _EQUAL * scale)
    # Infinite elements, such as those of masks, are compared as they are.
    is_other: NDArray[np.bool_] = np.where(finite, is_far, (value != other) & ~np.isnan(value))
    return is_other
