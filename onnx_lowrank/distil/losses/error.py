"""The squared error about the mean, E‖y − ŷ‖² / E‖y − ȳ‖², which reports show: for every output."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.losses.loss import ERROR, Kind, Known, Loss


def _make(known: Known) -> Loss:
    def loss(got: Tensor, wanted: Tensor) -> Tensor:
        return functional.mse_loss(got, wanted) / known.power

    return loss


KIND = Kind(ERROR, _make)
