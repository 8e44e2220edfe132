"""Gram matrices of large matrices of any dtype, in blocks: no whole matrix is converted to float64."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from onnx_lowrank.core.factors import Array
from onnx_lowrank.linalg.backend import Backend, array_namespace, as_float64, of_each

BLOCK = 1 << 24
"""Elements of a block that is converted at once."""

_COLUMNS = 256
"""The least columns of a block: the product of a narrower one is slow."""


def row_grams(matrices: Array, backend: Backend) -> Array:
    """M Mᵀ of every matrix of a stack, in float64.

    Args:
        matrices: Shape (..., rows, cols), any real dtype.
        backend: The device of the matrices, with the idle threads.

    Returns:
        Shape (..., rows, rows).
    """
    if array_namespace(matrices) is not np:
        return _row_grams(matrices)
    return of_each(_row_grams, matrices, backend)


def _row_grams(matrices: Array) -> Array:
    xp = array_namespace(matrices)
    total: Array = None
    for part in column_blocks(matrices):
        gram = part @ xp.matrix_transpose(part)
        if total is None:
            total = gram
        else:
            total += gram
    return total


def column_blocks(matrices: Array) -> Iterator[Array]:
    """The columns of every matrix of a stack in float64, block by block.

    Args:
        matrices: Shape (..., rows, cols), any real dtype.
    """
    *stack, rows, cols = matrices.shape
    step = max(_COLUMNS, BLOCK // max(1, prod(stack) * rows))
    for begin in range(0, cols, step):
        yield as_float64(matrices[..., begin : min(begin + step, cols)])
