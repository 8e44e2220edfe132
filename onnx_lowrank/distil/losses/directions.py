"""The error of the cosines between the rows of a batch, relative to their variation: for embeddings.

Applications rank by these cosines. From Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.
"""

from __future__ import annotations

from torch import Tensor

from onnx_lowrank.distil.losses.loss import Kind, Known, Loss

_TINY = 1e-6  # of a variation: all rows of a batch may be equal


def _make(known: Known) -> Loss | None:
    if not known.is_direction:
        return None

    def loss(got: Tensor, wanted: Tensor) -> Tensor:
        ours, theirs = wanted @ wanted.T, got @ got.T
        return (
            (ours - theirs).square().mean() / ours.var().clamp_min(_TINY) if len(ours) > 1 else got.sum() * 0
        )

    return loss


KIND = Kind("relations", _make)
