"""Cut the samples of a large feed into batches, so that a run takes a bounded amount of memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_lowrank.engines.engine import Deployed, Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.running import first_run
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

MEMORY = 2**26
"""The approximate bytes that the tensors of one batch take. ONNX Runtime keeps several times as much."""

_GROWTH = 32  # a first convolution makes 64 channels of 3
_FEW = 2**16  # inputs of fewer bytes are one batch, so most runs need no trial run


def samples(feed: Feed, wanted: tuple[Spec, ...]) -> int | None:
    """Number of samples of a feed; None if the feed cannot be split.

    A feed can be split if the first axes of all inputs, except scalars, are free and have one size, and if an
    input has further axes (the only axis of a waveform is time).
    """
    arrays = [(spec, feed[spec.name].shape) for spec in wanted if feed[spec.name].ndim]
    sizes = {shape[0] for _, shape in arrays}
    fixed = any(spec.shape is not None and isinstance(spec.shape[0], int) for spec, _ in arrays)
    if fixed or len(sizes) != 1 or all(len(shape) == 1 for _, shape in arrays):
        return None
    (size,) = sizes
    return int(size)


def batch_size(one: Feed, outputs: Mapping[str, Any], memory: int | None = None) -> int:
    """The number of samples that fit into memory together, by a run of one sample.

    Its inner tensors take about 32 times its inputs.

    Args:
        one: The inputs of one sample.
        outputs: The outputs on it.
        memory: Bytes that the tensors of one batch may take; None stands for `MEMORY`.
    """
    taken = max(1, _GROWTH * _bytes(one) + _bytes(outputs))
    return max(1, (MEMORY if memory is None else memory) // taken)


def batches(
    engine: Deployed, model: Model, feed: Feed, wanted: tuple[Spec, ...], *, memory: int | None = None
) -> tuple[Feed, ...]:
    """The samples of a feed, in as few batches as memory allows (`batch_size`).

    Args:
        engine: Runs the model; if it cannot, onnx's reference implementation does.
        model: The model.
        feed: Inputs that fit the model.
        wanted: The model's inputs.
        memory: Bytes that the tensors of one batch may take; None stands for `MEMORY`.

    Returns:
        Views of the inputs; the whole feed if it is small, if it cannot be split, or if the model does not
        run on one sample.
    """
    count = samples(feed, wanted)
    if count is None or count < 2 or _bytes(feed) <= _FEW:
        return (feed,)
    one = _cut(feed, 0, 1)
    for runner in (engine, Reference()):
        try:
            outputs = first_run(runner, model, (one,))[1]
        except UnsupportedError:
            continue
        except RejectedError:
            return (feed,)
        size = batch_size(one, outputs, memory)
        if size >= count:
            return (feed,)
        _log.debug("compares %d samples in batches of %d", count, size)
        return tuple(_cut(feed, start, size) for start in range(0, count, size))
    return (feed,)


def _cut(feed: Feed, start: int, size: int) -> Feed:
    return {name: array[start : start + size] if array.ndim else array for name, array in feed.items()}


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))
