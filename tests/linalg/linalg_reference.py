"""The definition of a fold once more, written as loops, and weights of a planted spectrum."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.option import Fold

# The canonical shapes (g, f, c, *kernel): tall, square and wide for most k; every kind of kernel; groups.
SHAPES = (
    (1, 12, 4),
    (1, 6, 6),
    (1, 4, 12),
    (3, 4, 8),
    (1, 5, 6, 3),
    (2, 6, 4, 1),
    (1, 4, 12, 1, 1),
    (1, 4, 6, 3, 3),
    (1, 16, 4, 3, 3),
    (1, 3, 8, 2, 3),
    (1, 4, 6, 5, 1),
    (1, 6, 4, 1, 5),
    (2, 3, 6, 3, 2),
    (1, 3, 4, 2, 3, 2),
    (4, 1, 1, 3, 3),
)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def folds_of(kernel: tuple[int, ...]) -> tuple[Fold, ...]:
    """Every fold that is defined for a kernel, coinciding ones too."""
    return tuple(Fold) if len(kernel) == 2 else (Fold.ENCODE, Fold.DECODE)


CASES = [(shape, fold, k) for shape in SHAPES for fold in folds_of(shape[3:]) for k in divisors(shape[2])]


def on_rows(fold: Fold, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The parts of a kernel position that belong to the row and to the column index."""
    match fold:
        case Fold.ENCODE:
            return (), spatial
        case Fold.ROWS:
            return spatial[:1], spatial[1:]
        case Fold.COLS:
            return spatial[1:], spatial[:1]
        case Fold.DECODE:
            return spatial, ()


def places(shape: tuple[int, ...], fold: Fold, k: int) -> dict[tuple[int, ...], tuple[int, int, int, int]]:
    """For every index of a canonical weight its (group, slice, row, column)."""
    _, _, c, *kernel = shape
    row_sizes, column_sizes = on_rows(fold, tuple(kernel))
    found = {}
    for index in product(*map(range, shape)):
        group, feature, channel, *spatial = index
        row_part, column_part = on_rows(fold, tuple(spatial))
        row, column = feature, channel % (c // k)
        for size, place in zip(row_sizes, row_part, strict=True):
            row = row * size + place
        for size, place in zip(column_sizes, column_part, strict=True):
            column = column * size + place
        found[index] = (group, channel // (c // k), row, column)
    return found


def matrix_shape(shape: tuple[int, ...], fold: Fold, k: int) -> tuple[int, ...]:
    return tuple(1 + max(place) for place in zip(*places(shape, fold, k).values(), strict=True))


def naive_fold(weight: NDArray, fold: Fold, k: int) -> NDArray:
    matrices = np.full(matrix_shape(weight.shape, fold, k), np.nan)
    for index, place in places(weight.shape, fold, k).items():
        matrices[place] = weight[index]
    return matrices


def planted(
    shape: tuple[int, ...], fold: Fold, k: int, condition: float, seed: int
) -> tuple[NDArray, NDArray]:
    """A weight whose every slice has singular values from 1 down to 1 / condition, and these values."""
    rng = np.random.default_rng(seed)
    g, _, rows, cols = matrix_shape(shape, fold, k)
    m = min(rows, cols)
    sigma = np.geomspace(1, 1 / condition, m)
    matrices = np.empty((g, k, rows, cols))
    for place in np.ndindex(g, k):
        left = np.linalg.qr(rng.standard_normal((rows, m)))[0]
        right = np.linalg.qr(rng.standard_normal((cols, m)))[0]
        matrices[place] = (left * sigma) @ right.T
    weight = np.empty(shape)
    for index, place in places(shape, fold, k).items():
        weight[index] = matrices[place]
    return weight, sigma


def tail(sigma: NDArray, j: int) -> float:
    """Frobenius error of the best rank-j approximation of every slice (Eckart–Young)."""
    return float(np.sqrt(np.sum(sigma[..., j:] ** 2)))
