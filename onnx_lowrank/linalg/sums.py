"""One decoder for several layers whose outputs are added up, and an encoder for each of them.

The sum y = Σ W_i x_i is one layer with the weight [W_1 … W_m] and the inputs x_1 … x_m. With U the top
eigenvectors of the second moments of y, the decoder U and the encoders Uᵀ W_i give U Uᵀ y: of all sums of
rank j, the one with the least error (Eckart and Young). Its error is the rest of the eigenvalues, whatever
the layers' outputs have to do with each other. Every layer has the ridge of `quadratic.of_weight`: the error
is E‖y − ŷ‖² + Σ λ_i ‖W_i − Ŵ_i‖², and the moments are those of y plus Σ λ_i W_i W_iᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array, Factors, Moments
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.activations import balanced, lane
from onnx_lowrank.linalg.backend import Backend, array_namespace, eigenvectors
from onnx_lowrank.linalg.quadratic import Quadratic, about, input_power, matrices_of, ridges

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Second moments of outputs, with the ridges.

    Attributes:
        total: Those of the sum, shape (f, f).
        own: Those of every layer's outputs alone, shape (f, f).
    """

    total: NDArray[np.float64]
    own: tuple[NDArray[np.float64], ...]


def outputs_of(
    weights: Sequence[NDArray[Any]],
    summed: Moments,
    inputs: Sequence[Moments],
    *,
    centred: bool,
    ridge: Sequence[float],
) -> Outputs:
    """The moments of the outputs of a sum's layers.

    Args:
        weights: Canonical weights of the layers, of one operator group, with the same f.
        summed: Moments of the sum of their outputs.
        inputs: For each, the moments of its inputs.
        centred: Whether a bias takes up the change of the mean of the sum.
        ridge: For each, λ_i as in `quadratic.of_weight`.
    """
    total, own = about(summed.mean, summed.mean, summed.second, centred)[0], []
    for weight, read, least in zip(weights, inputs, ridge, strict=True):
        (matrix,), second = matrices_of(weight), about(read.mean, read.mean, read.second, centred)
        added = ridges(input_power(second), least)[0] * (matrix @ matrix.T)
        total = total + added
        own.append(matrix @ second[0] @ matrix.T + added)
    return Outputs(total, tuple(own))


def errors(outputs: Outputs, top: int, backend: Backend) -> list[NDArray[np.float64]]:
    """The relative errors of every layer with a shared decoder, for every rank at once.

    The error of the sum is split among the layers in proportion to what each loses by itself. So the errors
    times the powers of the layers' outputs add up to the error of the sum.

    Args:
        outputs: The moments of the outputs.
        top: The largest rank, at most f.
        backend: Where to compute.

    Returns:
        For every layer e / e(0) at the ranks 0 … top, e(0) the power of its outputs.
    """
    with backend.lane(len(outputs.total)) as place:
        vectors = eigenvectors(place.asarray(outputs.total))
        seconds = (place.asarray(second) for second in (outputs.total, *outputs.own))
        lost, *alone = [_tails(second, vectors, place)[: top + 1] for second in seconds]
    total = np.sum(alone, axis=0)
    share = np.divide(lost, total, where=total > 0, out=np.zeros_like(lost))
    powers = [float(np.trace(second)) for second in outputs.own]
    return [
        tail * share / power if power > 0 else np.zeros(top + 1)
        for tail, power in zip(alone, powers, strict=True)
    ]


def fit(outputs: Outputs, weights: Sequence[NDArray[Any]], j: int, backend: Backend) -> list[Factors]:
    """The factors of every layer; all have the same decoder.

    Args:
        outputs: The moments of the outputs.
        weights: The canonical weights.
        j: The rank, at most f and the number of all inputs.
        backend: Where to compute.

    Returns:
        Float64 NumPy arrays; the decoder is balanced with all encoders together.
    """
    matrices = np.concatenate([matrices_of(weight)[0] for weight in weights], axis=1)
    with backend.lane(len(outputs.total)) as place:
        left = eigenvectors(place.asarray(outputs.total))[:, len(outputs.total) - j :]
        xp = array_namespace(left)
        made = balanced(left, xp.matmul(left.T, place.asarray(matrices)))
        decoder, encoder = (place.to_numpy(part) for part in made)
    ends = np.cumsum([prod(weight.shape[2:]) for weight in weights])
    parts = np.split(encoder, ends[:-1], axis=1)
    return [_factors(part, decoder, weight.shape) for part, weight in zip(parts, weights, strict=True)]


def encoded(member: Quadratic, shape: Shape, decoder: NDArray[Any], backend: Backend) -> Factors:
    """The factors of one layer: the shared decoder D, and the best encoder for it, D⁺ Ŵ.

    Ŵ is the weight of least error. The error of D E is that of Ŵ plus the size of Ŵ − D E, which has the
    same least E whatever the moments of the inputs are.

    Args:
        member: The error to minimize.
        shape: Shape of the layer's weight, (1, f, c, *kernel).
        decoder: The decoder as stored, shape (1, f, 1, j, *ones).
        backend: Where to compute.

    Returns:
        Float64 arrays; the decoder has the values of `decoder`.
    """
    exact = decoder.astype(np.float64)
    with lane(member, backend) as place:
        left = place.asarray(exact.reshape(shape[1], -1))
        xp = array_namespace(left)
        encoder = xp.matmul(xp.linalg.pinv(left), place.asarray(member.optimum[0]))
        return _factors(place.to_numpy(encoder), exact, shape)


def _factors(encoder: NDArray[np.float64], decoder: NDArray[np.float64], shape: Shape) -> Factors:
    """The factors of one layer, given its encoder, (j, p), and the decoder in any shape."""
    _, f, *rest = shape
    ones = (1,) * len(rest[1:])
    fold = Fold.ENCODE.on(tuple(rest[1:]))
    return Factors(fold, encoder.reshape(1, 1, -1, *rest), decoder.reshape(1, f, 1, len(encoder), *ones))


def _tails(second: Array, vectors: Array, backend: Backend) -> NDArray[np.float64]:
    """Σ_{m ≥ n} u_mᵀ S u_m for n = 0 … f, for the eigenvectors u_m with ascending eigenvalues in columns."""
    xp = array_namespace(vectors)
    values = backend.to_numpy(xp.sum(vectors * xp.matmul(second, vectors), axis=0))
    return np.append(np.cumsum(np.maximum(values, 0.0))[::-1], 0.0)
