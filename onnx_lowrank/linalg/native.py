"""Routines of SciPy's BLAS and LAPACK, in place and without the interpreter's lock.

SciPy's own wrappers hold the lock while a routine runs, so other threads wait. SciPy publishes the addresses
of the routines for Cython; ctypes calls them and releases the lock.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@cache
def _routine(library: str, name: str) -> Callable[..., None]:
    """A routine of `scipy.linalg.cython_blas` or `scipy.linalg.cython_lapack`."""
    capsule = importlib.import_module(f"scipy.linalg.{library}").__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    pointer = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None)(pointer)


def _call(library: str, name: str, *arguments: str | int | float | NDArray[Any]) -> None:
    """Call a routine. All of Fortran's arguments are addresses; arrays are given as they lie in memory."""
    _routine(library, name)(*(_address(argument) for argument in arguments))


def _address(argument: str | int | float | NDArray[Any]) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    return ctypes.byref(ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument))


def product(rows: Floats, symmetric: Floats) -> Floats:
    """B S, from the part of S in and above the diagonal.

    Args:
        rows: B, shape (m, n), contiguous.
        symmetric: S, shape (n, n), with contiguous rows; it may be a part of a larger matrix.
    """
    count, size = rows.shape
    made = np.empty_like(rows)
    stride = _stride(symmetric)
    # Fortran sees the transposes: the upper triangle is its lower one, and B S = (S Bᵀ)ᵀ.
    sizes = size, count, 1.0, symmetric, stride, rows, size, 0.0, made, size
    _call("cython_blas", "dsymm", "L", "L", *sizes)
    return made


def subtract(symmetric: Floats, left: Floats, right: Floats) -> None:
    """S −= Aᵀ B + Bᵀ A, in and above the diagonal of S.

    Args:
        symmetric: S, as for `product`.
        left: A, shape (m, n), contiguous.
        right: B, as A.
    """
    count, size = left.shape
    sizes = size, count, -1.0, left, size, right, size, 1.0, symmetric, _stride(symmetric)
    _call("cython_blas", "dsyr2k", "L", "N", *sizes)


def eigenvalues_of_band(band: Floats) -> Floats:
    """The eigenvalues of a symmetric band matrix A, ascending.

    Args:
        band: Shape (n, w + 1), contiguous: A[i, i + d] at (i, d). It is overwritten.

    Raises:
        numpy.linalg.LinAlgError: The iteration does not converge.
    """
    size, width = band.shape
    diagonal, beside = np.empty(size), np.empty(max(1, size - 1))
    unused, work, state = np.empty(1), np.empty(size), np.zeros(1, np.int32)
    sizes = size, width - 1, band, width, diagonal, beside, unused, 1, work, state
    _call("cython_lapack", "dsbtrd", "N", "L", *sizes)
    _call("cython_lapack", "dsterf", size, diagonal, beside, state)
    if state[0]:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return diagonal


def top_eigenvectors(symmetric: Floats, count: int) -> Floats:
    """The eigenvectors of the largest eigenvalues, as columns, by ascending eigenvalues.

    Only these are computed, with multiple relatively robust representations (I. Dhillon and B. Parlett,
    Multiple representations to compute orthogonal eigenvectors of symmetric tridiagonal matrices, 2004).

    Args:
        symmetric: Shape (n, n).
        count: Their number, from 1 to n.

    Returns:
        Shape (n, count).

    Raises:
        numpy.linalg.LinAlgError: The computation fails.
    """
    size = len(symmetric)
    reflectors = np.array(symmetric, np.float64, order="C")
    diagonal, beside, factors = np.empty(size), np.empty(size), np.empty(size)
    work, state, numbers = np.empty(64 * size), np.zeros(1, np.int32), np.empty(10 * size, np.int32)
    sizes = size, reflectors, size, diagonal, beside, factors, work, work.size, state
    _call("cython_lapack", "dsytrd", "L", *sizes)
    values, vectors = np.empty(size), np.empty((count, size))
    supports, found, robust = np.empty(2 * count, np.int32), np.empty(1, np.int32), np.zeros(1, np.int32)
    wanted = 0.0, 0.0, size - count + 1, size, found, values, vectors, size, count, supports, robust
    _call(
        *("cython_lapack", "dstemr", "V", "I", size, diagonal, beside, *wanted),
        *(work, work.size, numbers, numbers.size, state),
    )
    if state[0] or found[0] != count:
        raise np.linalg.LinAlgError("Eigenvectors did not converge")
    rotated = size, count, reflectors, size, factors, vectors, size, work, work.size, state
    _call("cython_lapack", "dormtr", "L", "L", "N", *rotated)
    return vectors.T


def _stride(matrix: Floats) -> int:
    return matrix.strides[0] // matrix.itemsize
