"""The divergence of probabilities, KL(p ‖ p̂) at a temperature, times its square: for rows of classes.

So classes that the original finds nearly as likely as the first count, too. From Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.losses.loss import Kind, Known, Loss

TEMPERATURE = 2.0
_TINY = 1e-12  # the least probability; float32 rounds smaller ones to 0, which has no logarithm


def _make(known: Known) -> Loss | None:
    if not known.is_class:
        return None

    def loss(got: Tensor, wanted: Tensor) -> Tensor:
        if known.is_share:
            got, wanted = got.clamp_min(_TINY).log(), wanted.clamp_min(_TINY).log()
        ours, theirs = (functional.log_softmax(rows / TEMPERATURE, dim=-1) for rows in (wanted, got))
        divergence = functional.kl_div(theirs, ours, reduction="batchmean", log_target=True)
        return divergence * TEMPERATURE**2

    return loss


KIND = Kind("divergence", _make)
