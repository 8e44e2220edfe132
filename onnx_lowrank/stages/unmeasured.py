"""Layers whose errors nothing shows, and what a plan may do with them.

An error that was not measured has no unit in common with one that was. Rules:

1. With a calibrated measure, a layer is kept if nothing was measured of it (`stages.score`).
2. Without calibration, heads are kept. A head gives a score to every row of a table: it is the transpose of
   the table, or has an output for each of the table's rows. The relative error of a weight counts it like any
   other layer, but its error is the error of the output, and no later layer has a share in that. SmolLM2's
   perplexity is 25 on 12 windows of 128 tokens. At the ratio 0.95 it is 23,799 if the tied table alone goes
   to rank 434 of 576, and 1,383 if other layers are compressed in its place.

Tables that are no heads stay among the choices. On MiniLM without calibration, at the ratios 0.8 and 0.6, the
cosine with the original is 0.84 and 0.56. It is 0.51 at 0.8 if the table is kept, 0.81, 0.67 and 0.54 if its
error to the power 3 counts 6, 12 and 37 times, and 0.42 at 0.6 if it keeps half of its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.layer import Layer

_ADVICE = "give some with --calibration"


def _heads(layers: Sequence[Layer]) -> dict[str, str]:
    """The layers that are kept without calibration, by id, each with the reason (rule 2)."""
    # Not any table: one of positions can have as many rows as a hidden layer has outputs.
    words = max((layer.c for layer in layers if layer.uses[0].reads_indices), default=0)
    reasons = {}
    for layer in layers:
        if len({use.transposed for use in layer.uses}) > 1 and any(use.reads_indices for use in layer.uses):
            what = "the table is an output head, too"
        elif not layer.kernel and layer.groups == 1 and layer.c < layer.f == words:
            what = "it is an output head, with an output for every row of the largest table"
        else:
            continue
        reasons[layer.id] = f"{what}, and without inputs nothing shows its error: {_ADVICE}"
    return reasons


def without_calibration(layers: Sequence[Layer], tables: Sequence[Candidates]) -> list[Candidates]:
    """The candidates that rule 2 leaves."""
    reasons = _heads(layers)
    return [
        table.only_keep(reasons[layer.id]) if layer.id in reasons else table
        for layer, table in zip(layers, tables, strict=True)
    ]
