"""Singular values of every slice, for every number of slices, from a few nested Gram matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array, Spectra
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import banded
from onnx_lowrank.linalg.backend import Backend, array_namespace, eigenvalues, in_turn
from onnx_lowrank.linalg.folding import fold as fold_slices
from onnx_lowrank.linalg.folding import side
from onnx_lowrank.linalg.gram import column_blocks, row_grams

_KNOWN = 256
"""The least size of Gram matrices of which known entries are copied."""


def spectra(
    weight: NDArray[Any],
    wanted: Mapping[Fold, Sequence[int]],
    backend: Backend,
    stored: np.dtype[Any] | None = None,
) -> Spectra:
    """Singular values of the slices of one weight, for many folds and numbers of slices at once.

    Singular values are the square roots of the eigenvalues of the Gram matrix of the smaller side, and
    these Gram matrices nest. If a slice is at least as wide as high, its row Gram matrix M Mᵀ is the sum of
    the row Gram matrices of the finer slices in it. Otherwise, the column Gram matrix Mᵀ M of a fine slice
    is a diagonal block of that of the coarser slice around it. So one product serves a whole chain of
    divisors k.

    Squaring costs digits: a value σ has an absolute error of about ε σ_1² / σ, with ε = 2.2e-16 and the
    largest value σ_1 of its slice. So values below about 1e-8 σ_1 are noise, also those that are exactly
    zero. Weights of at most float32 have no such digits to lose; float64 weights use the SVD.

    Args:
        weight: Canonical weight, shape (g, f, c, *kernel), any real dtype, finite.
        wanted: For every fold the numbers of slices k; each divides c.
        backend: Where to compute.
        stored: The dtype whose precision the weight has, if it is not that of the array (a float32 weight
            with its BatchNorm folded in, as float64).

    Returns:
        For every wanted (fold, k) the singular values, descending, of shape (g, k, min(rows, cols)).
    """
    is_exact = (stored or weight.dtype) == np.float64
    with backend.lane(max((side(weight.shape, fold, 1) for fold in wanted), default=0)) as place:
        values = _by_svd if is_exact else partial(_by_gram, place)
        array = place.asarray(weight) if is_exact else place.held(weight)
        return {
            (fold, k): place.to_numpy(sigma)
            for fold, counts in wanted.items()
            for k, sigma in values(array, fold, counts)
        }


def operations(shape: tuple[int, ...], wanted: Mapping[Fold, Sequence[int]]) -> float:
    """Floating-point operations of `spectra`: the Gram matrices that follow from no others, and eigenvalues.

    A Gram matrix of n × m takes n² m operations, half of those of a product, and its tridiagonal form 4/3 n³
    (G. Golub and C. Van Loan, Matrix Computations, 4th ed., section 8.3).

    Args:
        shape: Shape of the canonical weight, (g, f, c, *kernel).
        wanted: For every fold the numbers of slices k.
    """
    g, f, c, *kernel = shape
    total = 0.0
    for fold, counts in wanted.items():
        encoder, decoder = fold.kernels(tuple(kernel))
        rows, cols = f * prod(decoder), c * prod(encoder)
        sides = {k: min(rows, cols // k) for k in counts}
        total += g * max((n * rows * cols for n in sides.values()), default=0)
        total += g * sum(4 / 3 * k * n**3 for k, n in sides.items())
    return total


def _by_svd(weight: Array, fold: Fold, counts: Iterable[int]) -> Iterator[tuple[int, Array]]:
    xp = array_namespace(weight)
    for k in counts:
        yield k, xp.linalg.svdvals(fold_slices(weight, fold, k))


def _by_gram(
    backend: Backend, weight: Array, fold: Fold, counts: Iterable[int]
) -> Iterator[tuple[int, Array]]:
    _, f, c, *kernel = weight.shape
    encoder, decoder = fold.kernels(tuple(kernel))
    rows, cols = f * prod(decoder), c * prod(encoder)
    wide = {k for k in counts if cols // k >= rows}
    for k, gram in _row_grams(weight, fold, wide, backend):
        yield k, _singular_values(gram, backend)
    for k, gram in _column_grams(weight, fold, set(counts) - wide, backend):
        yield k, _singular_values(gram, backend)


def _row_grams(
    weight: Array, fold: Fold, counts: Iterable[int], backend: Backend
) -> Iterator[tuple[int, Array]]:
    """M Mᵀ of every slice, finest slices first: shape (g, k, rows, rows) for each k."""
    order = sorted(counts, reverse=True)
    sources = _sources(order, lambda finer, k: finer % k == 0)
    grams: dict[int, Array] = {}
    for k in order:
        finer = sources[k]
        if finer is None:
            gram = row_grams(fold_slices(weight, fold, k), backend)
        else:
            xp = array_namespace(grams[finer])
            g, _, rows, _ = grams[finer].shape
            gram = xp.sum(xp.reshape(grams[finer], (g, k, finer // k, rows, rows)), axis=2)
        _keep(grams, k, gram, sources)
        yield k, gram


def _column_grams(
    weight: Array, fold: Fold, counts: Iterable[int], backend: Backend
) -> Iterator[tuple[int, Array]]:
    """Mᵀ M of every slice, coarsest slices first: shape (g, k, cols, cols) for each k."""
    order = sorted(counts)
    sources = _sources(order, lambda coarser, k: k % coarser == 0)
    grams: dict[int, Array] = {}
    for k in order:
        coarser = sources[k]
        if coarser is None:
            matrices = fold_slices(weight, fold, k)
            matrices = array_namespace(matrices).matrix_transpose(matrices)
            gram = _with_known(matrices, grams, backend)
        else:
            gram = diagonal_blocks(grams[coarser], k // coarser)
        _keep(grams, k, gram, sources)
        yield k, gram


def _with_known(matrices: Array, grams: Mapping[int, Array], backend: Backend) -> Array:
    """M Mᵀ of transposed slices; the entries that Gram matrices of coarser slices hold are copied.

    Args:
        matrices: The transposes of the slices, shape (g, k, n, rows).
        grams: Gram matrices of coarser slices, by their number, shape (g, number, size, size).
        backend: The device of the matrices, with the idle threads.
    """
    g, k, n, _ = matrices.shape
    if array_namespace(matrices) is not np or not grams or n < _KNOWN:
        return row_grams(matrices, backend)
    coarser = grams[max(grams)]

    def gram(number: int) -> Array:
        group, i = divmod(number, k)
        return _filled(matrices[group, i], i * n, coarser[group])

    run = backend.shared or in_turn
    return np.array(run(gram, g * k)).reshape(g, k, n, n)


def _filled(matrix: Array, begin: int, known: Array) -> Array:
    """M Mᵀ of rows of a matrix, of which a part is known.

    Args:
        matrix: M, shape (n, columns), any real dtype.
        begin: The number of the first of these rows.
        known: The Gram matrices of consecutive rows, shape (count, size, size).
    """
    n, size = len(matrix), known.shape[-1]
    inner = range(begin // size * size + size, begin + n, size)
    pieces = [slice(*pair) for pair in pairwise((0, *(cut - begin for cut in inner), n))]
    gram = np.zeros((n, n))
    for part in column_blocks(matrix) if inner else ():
        for piece in pieces[:-1]:
            gram[piece.stop :, piece] += part[piece.stop :] @ part[piece].T
    for piece in pieces:
        which, first = divmod(begin + piece.start, size)
        own = slice(first, first + piece.stop - piece.start)
        gram[piece, piece] = known[which, own, own]
        gram[piece, piece.stop :] = gram[piece.stop :, piece].T
    return gram


def _sources(order: Sequence[int], nests: Callable[[int, int], bool]) -> dict[int, int | None]:
    """For every number of slices, the closest earlier one whose Gram matrices give its own; None for none."""
    return {
        k: next((other for other in reversed(order[:number]) if nests(other, k)), None)
        for number, k in enumerate(order)
    }


def _keep(grams: dict[int, Array], k: int, gram: Array, sources: Mapping[int, int | None]) -> None:
    """Keep Gram matrices as long as others follow from them; for a large layer they are gigabytes."""
    last = {source: other for other, source in sources.items() if source is not None}
    source = sources[k]
    if source is not None and last[source] == k:
        del grams[source]
    if k in last:
        grams[k] = gram


def diagonal_blocks(gram: Array, count: int) -> Array:
    """The `count` diagonal blocks of every matrix: (g, k, n, n) to (g, k · count, n / count, n / count)."""
    xp = array_namespace(gram)
    g, k, n, _ = gram.shape
    size = n // count
    blocks = xp.permute_dims(xp.reshape(gram, (g, k, count, size, count, size)), (0, 1, 3, 5, 2, 4))
    diagonal = xp.permute_dims(xp.linalg.diagonal(blocks), (0, 1, 4, 2, 3))
    return xp.reshape(diagonal, (g, k * count, size, size))


def _singular_values(gram: Array, backend: Backend) -> Array:
    if backend.device is not None and gram.shape[-1] < backend.device.least:
        gram = backend.to_numpy(gram)
    xp = array_namespace(gram)
    # A 1×1 matrix is its own eigenvalue; there can be thousands, and a call of LAPACK for each is slow.
    ascending = gram[..., 0] if gram.shape[-1] == 1 else eigenvalues(gram, backend, _eigenvalues)
    descending = xp.flip(ascending, axis=-1)
    return xp.sqrt(xp.maximum(descending, xp.zeros_like(descending)))


def _eigenvalues(matrices: Array) -> Array:
    """The eigenvalues of every symmetric matrix of a stack, ascending."""
    xp, size = array_namespace(matrices), matrices.shape[-1]
    if xp is not np or size < banded.LEAST:
        return xp.linalg.eigvalsh(matrices)
    flat = matrices.reshape(-1, size, size)
    return np.array([banded.eigenvalues(matrix) for matrix in flat]).reshape(matrices.shape[:-1])
