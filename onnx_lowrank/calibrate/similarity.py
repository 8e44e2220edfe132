"""How much the blocks of a model change their inputs.

The importance of a block with the input x and the result y is 1 − E cos(x, x + y): a block that hardly turns
its input can lose most (Men et al., ShortGPT, 2024; Lin et al., MoDeGPT, 2024). A block here ends at every
sum with a skip connection, so a transformer's layer has two.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.blocks import Block, Blocks
from onnx_lowrank.probe.suffix import Cuts

_log = logging.getLogger(__name__)

_UNKNOWN = 1.0
"""The importance of a layer without a block: nothing of its input goes around it."""


def importances(
    model: Model, walk: Walk, bindings: Sequence[Binding], calibration: Calibration
) -> dict[str, float]:
    """The importance of every layer's block, by the layer's id, on the calibration inputs to fit to.

    If the model does not run with the tensors of blocks as outputs, all are equally important.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        calibration: The inputs.
    """
    blocks = Blocks(walk)
    known = {binding.layer.id: blocks.of(binding) for binding in bindings}
    distinct = list(dict.fromkeys(block for block in known.values() if block))
    try:
        found = _measured(model, walk, distinct, calibration)
    except (UnsupportedError, RejectedError) as error:
        _log.debug("the inputs and results of blocks cannot be seen: %s", error)
        found = {}
    _log.debug("measured the similarity of inputs and outputs of %d blocks", len(found))
    return {name: _UNKNOWN if block is None else found.get(block, _UNKNOWN) for name, block in known.items()}


def _measured(
    model: Model, walk: Walk, blocks: Sequence[Block], calibration: Calibration
) -> Mapping[Block, float]:
    """1 − the mean cosine of each block; blocks whose tensors have several shapes are left out."""
    if not blocks:
        return {}
    names = list(dict.fromkeys(name for block in blocks for name in (block.skip, block.result)))
    given = {value.name for value in model.proto.graph.input}
    tapped = Cuts(model, walk).returning(name for name in names if name not in given)
    sums = np.zeros((len(blocks), 2))
    with calibration.engine.open(tapped) as run:
        for batch in calibration.trimmed.batches(calibration.statistics.batch):
            if batch.held:
                continue
            made = {**batch.feed, **run(batch.feed)}
            for number, block in enumerate(blocks):
                cosines = _cosines(made[block.skip], made[block.result], block.axis)
                sums[number] += cosines.sum(), cosines.size
    return {block: 1 - total / count for block, (total, count) in zip(blocks, sums, strict=True) if count}


def _cosines(x: NDArray[np.generic], y: NDArray[np.generic], axis: int) -> NDArray[np.float64]:
    """cos(x, x + y) of every vector along an axis; none for x of another shape than y, or of zeros."""
    if x.shape != y.shape or x.ndim < -axis:
        return np.empty(0)
    before = np.moveaxis(x.astype(np.float64), axis, -1)
    after = before + np.moveaxis(y.astype(np.float64), axis, -1)
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    products = np.vecdot(before, after)
    return np.asarray(products[lengths > 0] / lengths[lengths > 0])
