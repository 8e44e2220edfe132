"""Gram matrices of large matrices of any dtype, in blocks: no whole matrix is converted to float64."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array
from onnx_lowrank.linalg.backend import Backend, array_namespace, of_each

BLOCK = 1 << 24
"""Elements of a block that is converted at once."""

_COLUMNS = 256
"""The least columns of a block: the product of a narrower one is slow."""


def row_grams(matrices: Array, backend: Backend) -> Array:
    """M Mᵀ of every matrix of a stack, in float64.

    Args:
        matrices: Shape (..., rows, cols); of NumPy any real dtype, otherwise float64.
        backend: The device of the matrices, with the idle threads.

    Returns:
        Shape (..., rows, rows).
    """
    xp = array_namespace(matrices)
    if xp is not np:
        return xp.matmul(matrices, xp.matrix_transpose(matrices))
    return of_each(_row_grams, matrices, backend)


def _row_grams(matrices: Array) -> Array:
    total: Array = None
    for part in column_blocks(matrices):
        gram = part @ part.mT
        total = gram if total is None else np.add(total, gram, out=total)
    return total


def column_blocks(matrices: Array) -> Iterator[NDArray[np.float64]]:
    """The columns of every matrix of a stack in float64, block by block.

    Args:
        matrices: Shape (..., rows, cols), any real dtype.
    """
    *stack, rows, cols = matrices.shape
    step = max(_COLUMNS, BLOCK // max(1, prod(stack) * rows))
    for begin in range(0, cols, step):
        yield matrices[..., begin : begin + step].astype(np.float64, copy=False)
