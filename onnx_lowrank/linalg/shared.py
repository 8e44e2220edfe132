"""One encoder for several layers with the same inputs x, and a decoder for each of them.

The encoder of rank j is chosen for the stack of the layers' weights, each divided by the root of its outputs'
power. So the sum of the layers' relative errors is minimal: with C = E[x xᵀ], the encoder spans the leading
right singular vectors of the stack whitened by C. The decoders are least squares, each for its own layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors, Moments
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import projection
from onnx_lowrank.linalg.activations import balanced, lane
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.folding import split
from onnx_lowrank.linalg.quadratic import Quadratic, of_weight


def problems(
    weights: Sequence[NDArray[Any]], inputs: Moments, centred: Sequence[bool], ridge: float
) -> tuple[Quadratic, ...]:
    """The error of every layer's weight, as `of_weight` gives it.

    Args:
        weights: Canonical weights of one operator group, with the same c and kernel.
        inputs: Moments of their inputs.
        centred: For each, whether a bias takes up the change of the mean.
        ridge: The ridge of all.
    """
    pairs = zip(weights, centred, strict=True)
    return tuple(of_weight(weight, inputs, centred=each, ridge=ridge) for weight, each in pairs)


def stacked(
    weights: Sequence[NDArray[Any]], inputs: Moments, centred: Sequence[bool], ridge: float
) -> Quadratic:
    """The error of the stack of weights, in which every layer's outputs have the same power.

    The means count unless all layers have a bias that takes up their change.

    Args:
        weights: As for `problems`.
        inputs: As for `problems`.
        centred: As for `problems`.
        ridge: As for `problems`.
    """
    powers = np.array([float(problem.power[0]) for problem in problems(weights, inputs, centred, ridge)])
    # The mean power keeps the stack in the range of the weights, and the encoder in that of its dtype.
    scales = np.sqrt(np.divide(powers.mean(), powers, where=powers > 0, out=np.zeros_like(powers)))
    scaled = [weight.astype(np.float64) * scale for weight, scale in zip(weights, scales, strict=True)]
    return of_weight(np.concatenate(scaled, axis=1), inputs, centred=all(centred), ridge=ridge)


def likeness(members: Sequence[Quadratic]) -> NDArray[np.float64]:
    """How alike the outputs of layers are: 1 if they differ by a rotation and a factor, 0 if uncorrelated.

    This is linear CKA, ‖W_i C W_jᵀ‖² / (‖W_i C W_iᵀ‖ ‖W_j C W_jᵀ‖) in Frobenius norms (Kornblith, Norouzi,
    Lee and Hinton, Similarity of neural network representations revisited, ICML 2019).

    Args:
        members: The errors of the layers, with the same moments C of their inputs (`problems`).

    Returns:
        Shape (layers, layers), symmetric, with ones on the diagonal. Outputs that are all zero are like no
        others.
    """
    number = len(members)
    found = np.zeros((number, number))
    for i, j in combinations_with_replacement(range(number), 2):
        found[i, j] = found[j, i] = np.sum((members[i].cross[0] @ members[j].optimum[0].T) ** 2)
    norms = np.sqrt(np.outer(np.diag(found), np.diag(found)))
    alike = np.divide(found, norms, where=norms > 0, out=np.eye(number))
    return np.clip(alike, 0.0, 1.0)


def errors(
    stack: Quadratic,
    members: Sequence[Quadratic],
    shapes: Sequence[tuple[int, ...]],
    top: int,
    backend: Backend,
) -> list[NDArray[np.float64]]:
    """The relative errors of every layer with a shared encoder, for every rank at once.

    Args:
        stack: The error of the stack.
        members: The errors of the layers.
        shapes: Shapes of their weights, (1, f, c, *kernel).
        top: The largest rank, at most the full rank of the stack.
        backend: Where to compute.

    Returns:
        For every layer e / e(0) at the ranks 0 … top; never increasing.
    """
    found = []
    with lane(stack, backend) as place:
        rows = projection.encoder(_folded(stack, shapes[0], place), top)
        for member, shape in zip(members, shapes, strict=True):
            total = float(member.power[0])
            if total <= 0:
                found.append(np.zeros(top + 1))
                continue
            gains = place.to_numpy(projection.gains(_folded(member, shape, place), rows))
            found.append(np.concatenate([np.ones(1), np.clip(1 - np.cumsum(gains) / total, 0.0, 1.0)]))
    return found


def encoder(stack: Quadratic, shape: tuple[int, ...], j: int, backend: Backend) -> NDArray[np.float64]:
    """The encoder of the stack, balanced with the decoder of the stack.

    Args:
        stack: The error of the stack.
        shape: Shape of any layer's weight, (1, f, c, *kernel).
        j: The rank, at most the full rank of the stack.
        backend: Where to compute.

    Returns:
        Shape (1, 1, j, c, *kernel).
    """
    with lane(stack, backend) as place:
        problem = _folded(stack, shape, place)
        rows = projection.encoder(problem, j)
        _, right = balanced(projection.solve(problem, rows).left, rows)
        return place.to_numpy(right).reshape(1, 1, j, *shape[2:])


def fit(member: Quadratic, shape: tuple[int, ...], shared: NDArray[Any], backend: Backend) -> Factors:
    """The factors of one layer: the shared encoder, and the best decoder for it.

    Args:
        member: The error to minimize.
        shape: Shape of the layer's weight, (1, f, c, *kernel).
        shared: The encoder as stored, shape (1, 1, j, c, *kernel).
        backend: Where to compute.

    Returns:
        Float64 arrays; the encoder has the values of `shared`.
    """
    fold = Fold.ENCODE.on(tuple(shape[3:]))
    with lane(member, backend) as place:
        rows = place.asarray(shared.reshape(1, 1, shared.shape[2], -1))
        left = projection.solve(_folded(member, shape, place), rows).left
        factors = split(left, rows, fold, shape)
        return Factors(fold, place.to_numpy(factors.encoder), place.to_numpy(factors.decoder))


def _folded(quadratic: Quadratic, shape: tuple[int, ...], backend: Backend) -> projection.Problem:
    """The problem of a layer, or of the stack, with the whole kernel in the encoder."""
    rows = quadratic.cross.shape[1]
    return projection.folded(quadratic, (1, rows, *shape[2:]), Fold.ENCODE.on(tuple(shape[3:])), 1, backend)
