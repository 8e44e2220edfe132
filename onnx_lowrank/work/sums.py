"""Work items for layers that share a decoder: the errors of all ranks, and the factors of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Fit, LayerFit
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg import sums
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.certificate import certify
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, shrinkage
from onnx_lowrank.work.fitting import FittedLayer, held_error, lost_mean, stored_as
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from onnx_lowrank.work.weights import WeightRef


@dataclass(frozen=True, slots=True, eq=False)
class SummedItem:
    """Layers whose results are added up, with one rank: for their errors up to it, or for their factors.

    Attributes:
        weights: Their weights; one operator group, the same f.
        j: The rank.
        moments: The moments of the sum of their results; None if they are unknown.
        inputs: For each, the moments of its inputs; None if they are unknown.
        centred: For each, whether a bias absorbs the change of the mean; that of one layer serves all.
        added: The biases that their nodes add, summed, shape (f,); the sum of the results includes them.
    """

    weights: tuple[WeightRef, ...]
    j: int
    moments: MomentsRef | None
    inputs: tuple[MomentsRef | None, ...]
    centred: tuple[bool, ...]
    added: NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: the moments, the weights, and matrices of outputs."""
        f = self.weights[0].shape[1]
        elements = 6 * sum(weight.size for weight in self.weights) + (len(self.weights) + 6) * f**2
        largest = max(prod(weight.shape[2:]) for weight in self.weights)
        moments = sum(ref.nbytes for ref in (self.moments, *self.inputs) if ref is not None)
        return moments + 8 * (elements + 3 * largest**2)


def summed_errors(item: SummedItem, backend: Backend) -> list[NDArray[np.float64]]:
    """Compute the relative errors of every layer at the ranks 0 … j, as `fitted_sum` fits them.

    Raises:
        InputError: The moments are not finite.
        PlanError: There are no moments of the sum, or of the inputs.
    """
    weights = [weight.read() for weight in item.weights]
    outputs, _, _ = _outputs(item, weights)
    return sums.errors(outputs, item.j, backend)


def fitted_sum(item: SummedItem, backend: Backend) -> list[FittedLayer]:
    """Make the decoder of all layers and their encoders, and certify each layer's factors as stored.

    The first layer with a bias takes up the change of the mean of the sum.

    Raises:
        InputError: The moments are not finite, or a data file has changed.
        PlanError: There are no moments of the sum, or of the inputs.
    """
    weights, centred = [weight.read() for weight in item.weights], any(item.centred)
    outputs, summed, inputs = _outputs(item, weights)
    found, dtype = sums.fit(outputs, weights, item.j, backend), item.weights[0].dtype
    taker = item.centred.index(True) if centred else -1
    made = []
    for number, (weight, factors, moments) in enumerate(zip(weights, found, inputs, strict=True)):
        stored = stored_as(factors, dtype)
        lost = lost_mean(weight, stored, summed, item.added) if number == taker else None
        loss = held_error(weight, stored, moments, centred=centred)
        made.append(FittedLayer(stored, certify(weight, stored), LayerFit(Fit.ACTIVATIONS, error=loss), lost))
    return made


def _outputs(
    item: SummedItem, weights: list[NDArray[Any]]
) -> tuple[sums.Outputs, LayerMoments, list[LayerMoments]]:
    """The moments of the outputs of the layers; those of the sum and of the inputs as they were measured."""
    summed, *inputs = [LayerMoments() if r is None else r.read() for r in (item.moments, *item.inputs)]
    read = [moments.inputs for moments in inputs if moments.inputs is not None]
    if summed.outputs is None or len(read) < len(inputs):
        raise PlanError(
            "A plan that shares decoders needs moments of the sums and of their inputs: pass --calibration."
        )
    ridge = [shrinkage(moments, INPUT_RIDGE) for moments in read]
    made = sums.outputs_of(weights, summed.outputs, read, centred=any(item.centred), ridge=ridge)
    return made, summed, inputs
