"""A table as a low-rank table plus rows that stay as they are.

Texts read few rows of a table often and most rows never, so the error of a table lies in few rows. A low rank
spends a column for all rows on each direction; a kept row costs as much as it has numbers, and errs nothing.
The kept rows are those of most weight w_i ‖x_i‖². The others get the rank-j table of least weighted error:
it projects them on the top eigenvectors of Σ w_i x_i x_iᵀ over the rows that are not kept.

The number of kept rows is proportional to the rank (`core.layer.Layer.kept_per_rank`), so the options of a
table stay one curve over the rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors, KeptRows
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.activations import balanced
from onnx_lowrank.linalg.folding import split
from onnx_lowrank.linalg.quadratic import matrices_of

Floats = NDArray[np.float64]


def row_weights(weight: NDArray[Any], counts: NDArray[np.integer], ridge: float) -> Floats:
    """The weight of every row: its frequency, and a floor for rows that are never read.

    Args:
        weight: Canonical weight, shape (1, f, c); c rows of f numbers.
        counts: How often every row was read, shape (c,).
        ridge: The power of the floor over that of the frequencies, each summed over the rows.
    """
    energy = _energy(weight)
    frequencies = counts / max(int(counts.sum()), 1)
    size, power = float(energy.sum()), float(frequencies @ energy)
    if power <= 0 or size <= 0:
        return np.full(len(counts), 1 / len(counts))
    return np.asarray(frequencies + ridge * power / size)


def errors(weight: NDArray[Any], weights: Floats, per_rank: int, every: int) -> Floats:
    """The relative weighted error at the ranks 0 … f, constant between multiples of a step.

    Args:
        weight: Canonical weight, shape (1, f, c).
        weights: The weight of every row, shape (c,).
        per_rank: Number of rows that stay for each unit of rank.
        every: The step.

    Returns:
        Shape (f + 1,); never increasing.
    """
    (matrix,) = matrices_of(weight)
    order = _order(weight, weights)
    second = (matrix * weights) @ matrix.T
    f, total = len(matrix), float(np.trace(second))
    if total <= 0:
        return np.zeros(f + 1)
    curve, kept = np.ones(f + 1), 0
    for j in range(every, f + 1, every):
        taken = order[kept : j * per_rank]
        kept = j * per_rank
        rows = matrix[:, taken]
        second = second - (rows * weights[taken]) @ rows.T
        lost = np.maximum(np.linalg.eigvalsh(second)[: f - j], 0.0).sum()
        curve[j:] = min(float(lost) / total, float(curve[j - 1]))
    return curve


def fit(weight: NDArray[Any], weights: Floats, per_rank: int, j: int) -> Factors:
    """The factors and the kept rows at a rank, in float64; the factors are balanced.

    Args:
        weight: Canonical weight, shape (1, f, c).
        weights: The weight of every row, shape (c,).
        per_rank: Number of rows that stay for each unit of rank.
        j: The rank, between 1 and f.
    """
    (matrix,) = matrices_of(weight)
    kept = np.sort(_order(weight, weights)[: j * per_rank])
    rest = weights.copy()
    rest[kept] = 0.0
    _, vectors = np.linalg.eigh((matrix * rest) @ matrix.T)
    left = vectors[None, None, :, len(vectors) - j :]
    right = np.swapaxes(left, -1, -2) @ matrix
    right[..., kept] = 0.0
    factors = split(*balanced(left, right), Fold.ENCODE, weight.shape)
    factors.encoder[..., kept] = 0.0  # the kept rows are added to it
    return Factors(factors.fold, factors.encoder, factors.decoder, KeptRows(kept, matrix[:, kept]))


def error(weight: NDArray[Any], made: Floats, counts: NDArray[np.integer]) -> float:
    """The relative squared error of looked-up rows; 0 if the rows that were read are all zero.

    Args:
        weight: Canonical weight, shape (1, f, c).
        made: The weight in its place, of the same shape.
        counts: How often every row was read, shape (c,).
    """
    total = float(counts @ _energy(weight))
    return float(counts @ _energy(weight - made)) / total if total > 0 else 0.0


def _order(weight: NDArray[Any], weights: Floats) -> NDArray[np.intp]:
    """The rows by descending weighted power; of equal rows the first comes first."""
    return np.argsort(-weights * _energy(weight), kind="stable")


def _energy(weight: NDArray[Any]) -> Floats:
    """‖x_i‖² of every row."""
    (matrix,) = matrices_of(weight)
    return np.asarray(np.einsum("fc,fc->c", matrix, matrix))
