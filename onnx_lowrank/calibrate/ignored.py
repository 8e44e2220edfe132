"""Finds the padding that a model ignores: it tries the model with other ids there.

A mask among the inputs says which positions are hidden; its name alone does not show that the model obeys it,
or which axes of its tensors count positions. So the model runs twice on two samples, the second time with
ids of shown positions in place of the hidden ones. It ignores hidden positions if

1. its outputs are equal at all shown positions, and those without positions are equal as a whole, and
2. the inputs of its layers are equal at all shown positions: outputs alone may be blind to a change.

A layer whose vectors at hidden positions, and no others, differ has a vector for every position. Where
anything is in doubt, no position is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.differences import differs
from onnx_lowrank.calibrate.jobs import Job
from onnx_lowrank.calibrate.lookups import Lookup
from onnx_lowrank.calibrate.shares import Samples
from onnx_lowrank.calibrate.trimming import removable
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.pasts import named_role
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

_SAMPLES, _BATCHES = 2, 64
_MEMORY = 2**29
"""The most bytes of outputs and taps of two samples; a model that gives more is not tried."""
_SIDES = ("encoder", "decoder")


def find_padding(
    model: Model,
    jobs: Mapping[Job, Sequence[str]],
    tables: Mapping[str, Lookup],
    samples: Samples,
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
    wanted = {spec.name: spec for spec in specs(model.proto)}
    masks = [spec for spec in wanted.values() if named_role(spec) == "mask"]
    tried = _tried(masks[0], wanted, samples) if len(masks) == 1 else None
    if tried is None:
        return NO_PADDING
    try:
        with engine.open(model) as run:
            return _found(run, masks[0].name, *tried, jobs, tables, tuple(wanted.values()))
    except (UnsupportedError, RejectedError) as error:
        _log.debug("whether %r hides positions is unknown: %s", masks[0].name, error)
        return NO_PADDING


def _found(
    run: Run,
    mask: str,
    feed: Feed,
    changed: Mapping[str, NDArray[Any]],
    jobs: Mapping[Job, Sequence[str]],
    tables: Mapping[str, Lookup],
    wanted: tuple[Spec, ...],
) -> Padding:
    """The padding of a feed, by a run with the changed inputs."""
    shown = feed[mask] != 0
    before = run(feed)
    if sum(v.nbytes for v in before.values() if isinstance(v, np.ndarray)) > _MEMORY:
        _log.debug("whether %r hides positions is not tried: the model gives too much", mask)
        return NO_PADDING
    after = run({**feed, **changed})
    taps = {tap.name for job in jobs for tap, _ in job.sights}
    axes = _axes({name: (value, after[name]) for name, value in before.items() if name not in taps}, shown)
    follows = {job: _follows(job, before, after, shown) for job in jobs}
    if axes is None or None in follows.values():
        _log.debug("positions that %r hides change other results: they count as all others", mask)
        return NO_PADDING
    layers = {name for job, names in jobs.items() if follows[job] for name in names}
    layers.update(
        name
        for name, table in tables.items()
        if all(read in changed and feed[read].shape == shown.shape for read in table.names)
    )
    if not layers and not axes:
        return NO_PADDING
    padding = Padding(mask, axes, frozenset(layers))
    trimmed = replace(padding, removable=removable(run, padding, feed, jobs, wanted))
    _log.debug(
        "positions that %r hides change nothing: %d layers leave them out%s",
        mask,
        len(layers),
        ", and runs end with the last shown one" if trimmed.removable else "",
    )
    return trimmed


def _tried(
    mask: Spec, wanted: Mapping[str, Spec], samples: Samples
) -> tuple[Feed, dict[str, NDArray[Any]]] | None:
    """A few samples with hidden positions and the inputs to change there; None if there are none.

    Two samples with different masks, as one sample does not show whether a tensor counts samples or positions
    first; one sample if all batches have only one.
    """
    single = None
    are_single = True
    for batch in islice(samples.batches(_SAMPLES), _BATCHES):
        shown = np.asarray(batch.feed[mask.name])
        if shown.ndim != 2 or not np.isin(shown, (0, 1)).all():
            return None
        are_single &= len(shown) == 1
        if not shown.any() or shown.all() or not (changed := _changed(batch.feed, mask, wanted, shown != 0)):
            continue
        if len(np.unique(shown, axis=0)) > 1:
            return batch.feed, changed
        single = single or (batch.feed, changed)
    return single if are_single else None


def _changed(
    feed: Feed, mask: Spec, wanted: Mapping[str, Spec], shown: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    """The inputs with a value for every position, with those of shown positions in place of hidden ones."""
    found = {}
    for name, spec in wanted.items():
        values = np.asarray(feed[name])
        if named_role(spec) is None and values.shape[:2] == shown.shape and _is_masked(spec, mask):
            other, given = values.copy(), values[shown]
            other[~shown] = given[np.arange(np.count_nonzero(~shown)) % len(given)]
            if not np.array_equal(other, values):
                found[name] = other
    return found


def _is_masked(spec: Spec, mask: Spec) -> bool:
    """Whether a mask may belong to an input: not if one is of the encoder and the other of the decoder."""
    # Their lengths do not show it: by chance, both sides may have as many positions.
    sides = {name if (name := each.name.lower().split("_")[0]) in _SIDES else "" for each in (spec, mask)}
    return len(sides) == 1


def _axes(outputs: Mapping[str, tuple[Any, Any]], shown: NDArray[np.bool_]) -> dict[str, int] | None:
    """The axis of positions of every output that hidden positions change.

    None if they change other elements, and if an output is no array of numbers, which could hide that.
    """
    found = {}
    for name, (value, other) in outputs.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU":
            return None
        changed = differs(value, other)
        if not changed.any():
            continue
        fit = [axis for axis in range(1, value.ndim) if (len(value), value.shape[axis]) == shown.shape]
        axis = next((axis for axis in fit if not np.moveaxis(changed, axis, 1)[shown].any()), None)
        if axis is None:
            return None
        found[name] = axis
    return found


def _follows(
    job: Job, before: Mapping[str, Any], after: Mapping[str, Any], shown: NDArray[np.bool_]
) -> bool | None:
    """Whether the vectors of a job are those of the positions, and differ at hidden positions alone.

    None if vectors of shown positions differ: then the model does not ignore hidden ones.
    """
    follows = True
    for tap, form in job.sights:
        rows, others = ([*job.cut(form, made[tap.name], tap.depth)] for made in (before, after))
        if tap.depth or sum(map(len, rows)) != shown.size or sum(map(len, others)) != shown.size:
            follows = False
            continue
        both = zip(rows, others, strict=True)
        changed = np.concatenate([differs(a, b).reshape(len(a), -1).any(axis=1) for a, b in both])
        if changed[shown.ravel()].any():
            # Positions may come first, and the samples second.
            if changed[shown.T.ravel()].any():
                return None
            follows = False
        follows &= bool(changed.any())
    return follows
