"""Work items for layers that can share an encoder: their likeness, errors of all ranks, factors of all."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Fit, LayerFit, Moments
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg import shared
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.certificate import certify
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, shrinkage
from onnx_lowrank.work.fitting import FittedLayer, held_error, lost_mean, stored_as
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from onnx_lowrank.work.weights import WeightRef


@dataclass(frozen=True, slots=True, eq=False)
class SharedItem:
    """Layers that read the same tensor, with one rank: for their errors up to it, or for their factors.

    Attributes:
        weights: Their weights; one operator group, the same c and kernel.
        j: The rank.
        moments: The moments of their inputs; None if they are unknown.
        centred: For each, whether a bias absorbs the change of the mean.
    """

    weights: tuple[WeightRef, ...]
    j: int
    moments: MomentsRef | None
    centred: tuple[bool, ...]

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: the moments, and copies of both for every layer."""
        _, _, *rest = self.weights[0].shape
        p, f = prod(rest), sum(weight.shape[1] for weight in self.weights)
        moments = 0 if self.moments is None else self.moments.nbytes
        matrices = (len(self.weights) + 5) * p**2 + 12 * f * p + 4 * self.j * p + 4 * self.j**2
        return sum(weight.nbytes for weight in self.weights) + moments + 8 * matrices


def shared_errors(item: SharedItem, backend: Backend) -> list[NDArray[np.float64]]:
    """Compute the relative errors of every layer at the ranks 0 … j, as `fitted_together` fits them.

    Raises:
        InputError: The moments are not finite.
        PlanError: There are no moments of the inputs.
    """
    weights, (_, inputs) = [weight.read() for weight in item.weights], _moments(item)
    ridge = shrinkage(inputs, INPUT_RIDGE)
    stack = shared.stacked(weights, inputs, item.centred, ridge)
    members = shared.problems(weights, inputs, item.centred, ridge)
    return shared.errors(stack, members, [weight.shape for weight in item.weights], item.j, backend)


def likeness(item: SharedItem, backend: Backend) -> NDArray[np.float64]:
    """How alike the outputs of the layers are (`linalg.shared.likeness`), whatever the rank.

    Raises:
        InputError: The moments are not finite.
        PlanError: There are no moments of the inputs.
    """
    weights, (_, inputs) = [weight.read() for weight in item.weights], _moments(item)
    centred = [all(item.centred)] * len(weights)
    return shared.likeness(shared.problems(weights, inputs, centred, shrinkage(inputs, INPUT_RIDGE)))


def fitted_together(item: SharedItem, backend: Backend) -> list[FittedLayer]:
    """Make the encoder of all layers and their decoders, and certify each layer's factors as stored.

    Raises:
        InputError: The moments are not finite, or a data file has changed.
        PlanError: There are no moments of the inputs.
    """
    weights, (moments, inputs) = [weight.read() for weight in item.weights], _moments(item)
    ridge, dtype = shrinkage(inputs, INPUT_RIDGE), item.weights[0].dtype
    encoder = stored_encoder(item, inputs, backend)
    members = shared.problems(weights, inputs, item.centred, ridge)
    made = []
    for weight, member, centred in zip(weights, members, item.centred, strict=True):
        stored = stored_as(shared.fit(member, weight.shape, encoder, backend), dtype)
        lost = lost_mean(weight, stored, moments, None) if centred else None
        loss = held_error(weight, stored, moments, centred=centred)
        made.append(FittedLayer(stored, certify(weight, stored), LayerFit(Fit.ACTIVATIONS, error=loss), lost))
    return made


def stored_encoder(item: SharedItem, inputs: Moments, backend: Backend) -> NDArray[Any]:
    """The encoder of all layers, shape (1, 1, j, c, *kernel), in the dtype of the weights.

    Args:
        item: The layers and the rank; its moments do not count.
        inputs: The moments of the inputs.
        backend: Where to compute.
    """
    weights, ridge = [weight.read() for weight in item.weights], shrinkage(inputs, INPUT_RIDGE)
    stack = shared.stacked(weights, inputs, item.centred, ridge)
    encoder = shared.encoder(stack, item.weights[0].shape, item.j, backend)
    with np.errstate(over="ignore"):  # a value beyond the range of the dtype becomes infinite
        return encoder.astype(item.weights[0].dtype)


def _moments(item: SharedItem) -> tuple[LayerMoments, Moments]:
    """The moments of the layers, and those of their inputs."""
    moments = LayerMoments() if item.moments is None else item.moments.read()
    if moments.inputs is None:
        raise PlanError("A plan that shares encoders needs moments of their inputs: pass --calibration.")
    return moments, moments.inputs
