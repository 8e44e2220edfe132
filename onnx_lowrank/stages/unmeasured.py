"""Layers whose errors nothing shows, and what a plan may do with them.

An error that was not measured has no unit in common with one that was. Rules:

1. With a calibrated measure, a layer is kept if nothing was measured of it (`stages.score`).
2. Without calibration, heads are kept. A head gives a score to every row of a table: it is the transpose of
   the table, or has an output for each of the table's rows. The relative error of a weight counts it like any
   other layer, but its error is the error of the output, and no later layer has a share in that.
3. Without calibration, the largest table keeps at least half of its rank. Its relative error weighs all rows
   alike, but few rows are read often: on MiniLM, half of the rank loses 0.19 of the squared norm of all rows,
   and 0.42 of that of the rows in a text. With less, the error says nothing. Smaller tables, such as those of
   positions, are mostly read evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.layer import Layer

_ADVICE = "give some with --calibration"

LEAST_SHARE = 0.5
"""The least share of its rank that the largest table keeps without calibration (rule 3)."""


def heads(layers: Sequence[Layer]) -> dict[str, str]:
    """The layers that are kept without calibration, by id, each with the reason (rule 2)."""
    # Not any table: one of positions can have as many rows as a hidden layer has outputs.
    words = _words(layers)
    reasons = {}
    for layer in layers:
        if any(use.transposed for use in layer.uses) and is_table(layer):
            what = "the table is an output head, too"
        elif not layer.kernel and layer.groups == 1 and layer.c < layer.f == words:
            what = "it is an output head, with an output for every row of the largest table"
        else:
            continue
        reasons[layer.id] = f"{what}, and without inputs nothing shows its error: {_ADVICE}"
    return reasons


def is_table(layer: Layer) -> bool:
    """Whether some use looks up rows."""
    return any(use.reads_indices for use in layer.uses)


def _words(layers: Sequence[Layer]) -> int:
    """The number of rows of the largest table; 0 without tables."""
    return max((layer.c for layer in layers if layer.uses[0].reads_indices), default=0)


def without_calibration(layers: Sequence[Layer], tables: Sequence[Candidates]) -> list[Candidates]:
    """The candidates that rules 2 and 3 leave."""
    reasons, words = heads(layers), _words(layers)
    left = []
    for layer, table in zip(layers, tables, strict=True):
        if layer.id in reasons:
            left.append(kept(table, reasons[layer.id]))
        else:
            enough = table.j >= LEAST_SHARE * table.full
            is_largest = is_table(layer) and layer.c == words
            left.append(table.where(enough) if is_largest else table)
    return left


def kept(table: Candidates, reason: str) -> Candidates:
    """The candidates of a layer that can only be kept, for a reason."""
    return replace(table.where(np.zeros(table.cost.size, dtype=bool)), reason=reason)
