"""The certificate of the error of a layer's factors, block by block.

No weight, product or residual is held in float64 as a whole: blocks of channels, or of features if the matrix
is higher than wide, give the Frobenius norm and the Gram matrix of the smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy  # imports its parts on first use
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Certificate, Factors, KeptRows
from onnx_lowrank.linalg.backend import Shared, in_turn, one_blas_thread
from onnx_lowrank.linalg.folding import compose

Floats = NDArray[np.float64]

_UNIT = 2.0**-53  # unit roundoff u of float64
_BLOCK = 1 << 20
"""Elements of a block."""

_TOGETHER = 4
"""Blocks that are in memory at once; threads share them."""

_PANEL = 256
"""Rows of a part of a Gram matrix that one thread computes."""

_ITERATED = 1024
"""The least side of a Gram matrix whose largest eigenvalue an iteration finds."""

_TOLERANCE = 1e-11  # of this eigenvalue, relative

_SAFE_EXPONENT = 100  # largest entries of 2^±100 are safe: sums of 2^40 squares stay in range


def taken(shape: tuple[int, ...]) -> int:
    """Approximate bytes that a certificate takes beside the weight: three times some blocks, Gram matrices.

    Args:
        shape: The shape of the canonical weight.
    """
    _, f, *rest = shape
    return 24 * min(math.prod(shape), _TOGETHER * _BLOCK) + 40 * min(f, math.prod(rest)) ** 2


def certify(weight: NDArray[Any], factors: Factors, shared: Shared = in_turn) -> Certificate:
    """Upper bounds, tight to about 1e-9, on the norms of W − Ŵ relative to those of W, per operator group.

    The matrix is that of the encode fold, f × (c · kernel), for factors in any fold. Nothing is estimated:
    every rounding error of this computation, except underflow, is bounded and added. With
    u = 2⁻⁵³ and γ_n = nu / (1 − nu), for any order of summation, with or without fused multiply-add
    (N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3 and 10):

    - Residual: a product of inner length j errs by at most γ_j |D||E| (eq. 3.13), in the Frobenius norm
      by γ_j ‖D‖_F ‖E‖_F per slice; subtracting adds u ‖R‖_F.
    - Frobenius norm of an m × n matrix, summed by rows: relative error at most γ_{m+n+2}.
    - Largest σ² of A (n × m, n ≤ m) from above: the computed Gram G errs by at most γ_m ‖A‖²_F. If the
      Cholesky factorization of tI − G runs to its end, then λ_max(G) ≤ t + γ_{n+1} / (1 − γ_{n+1}) ·
      trace(tI − G) (theorem 10.3 and eq. 10.7; S. Rump, Verification of positive definiteness, 2006).
      So the eigenvalue solver need not be trusted: it gives t, and Cholesky proves the bound.
    - Largest σ of W from below: ‖Wᵀx‖ / ‖x‖ for the x of one inverse iteration; any x is a valid bound.

    Args:
        weight: The layer's canonical weight with its BatchNorm folded in, shape (g, f, c, *kernel), of
            float64 or a dtype that float64 holds exactly.
        factors: The factors as stored, in their own dtype.
        shared: Runs the parts of a large matrix in idle threads, too; they change no bits.

    Returns:
        The bounds; 0 for a group whose weight and factors are zero, infinite for factors that are not finite.
    """
    exact = factors.astype(np.dtype(np.float64))
    errors = map(_product_error, exact.encoder, exact.decoder)

    def made(group: int, block: slice) -> Floats:
        return np.asarray(compose(_part(exact, group, block, by_feature=_is_high(weight)))[0])

    return _certified(weight, made, errors, factors.encoder.shape[3], shared)


def certify_weight(weight: NDArray[Any], stored: NDArray[Any], shared: Shared = in_turn) -> Certificate:
    """The bounds of `certify` for a whole weight in place of factors.

    Args:
        weight: As for `certify`.
        stored: The new weight as stored, in canonical form with the same BatchNorm folded in.
        shared: As for `certify`.
    """

    def made(group: int, block: slice) -> Floats:
        return _cut(stored, group, block, by_feature=_is_high(weight))

    return _certified(weight, made, [0.0] * len(weight), weight.shape[2], shared)


def _certified(
    weight: NDArray[Any],
    made: Callable[[int, slice], Floats],
    errors: Iterable[float],
    width: int,
    shared: Shared,
) -> Certificate:
    """Bounds for a weight in place of another one.

    Args:
        weight: The canonical weight.
        made: A block of the new weight: the channels of a group, or its features if the matrix is high.
        errors: The error of the new weight in the Frobenius norm, one for every group.
        width: Channels of a slice.
        shared: As for `certify`.
    """
    is_high, slices = _is_high(weight), list(_slices(weight, width))

    def flat(block: Floats) -> Floats:
        return block.reshape(len(block), -1)

    bounds = []
    for group, error in enumerate(errors):

        def original(n: int, group: int = group) -> Floats:
            return flat(_cut(weight, group, slices[n], by_feature=is_high))

        def residual(n: int, group: int = group) -> Floats:
            cut = _cut(weight, group, slices[n], by_feature=is_high)
            return flat(cut - made(group, slices[n]))

        whole, lost = (
            _measured(_Blocks(block, len(slices), is_high, shared)) for block in (original, residual)
        )
        bounds.append(_relative_norms(whole, lost, error))
    return Certificate(
        spectral=tuple(spectral for spectral, _ in bounds),
        frobenius=tuple(frobenius for _, frobenius in bounds),
    )


def _is_high(weight: NDArray[Any]) -> bool:
    """Whether the encode matrix of a group has more rows than columns."""
    _, f, *rest = weight.shape
    return bool(f > math.prod(rest))


def _slices(weight: NDArray[Any], width: int) -> Iterator[slice]:
    """The channels of a group in blocks of bounded size; its features if the matrix is high.

    A block of channels is a part of a slice of `width` channels, or some whole slices.
    """
    _, f, c, *_ = weight.shape
    count = f if _is_high(weight) else c
    step = max(1, _BLOCK * count // max(1, weight[0].size))
    if _is_high(weight):
        width = count
    whole = width if step < width else step // width * width
    for first in range(0, count, whole):
        last = min(first + whole, count)
        yield from (slice(begin, min(begin + step, last)) for begin in range(first, last, step))


def _cut(weight: NDArray[Any], group: int, block: slice, *, by_feature: bool) -> Floats:
    part = weight[group, block] if by_feature else weight[group, :, block]
    return part.astype(np.float64)


def _part(factors: Factors, group: int, block: slice, *, by_feature: bool) -> Factors:
    """The factors of one group whose product is a block of its features, or of its channels (`_slices`)."""
    encoder, decoder = factors.encoder[group : group + 1], factors.decoder[group : group + 1]
    rows, width = factors.rows, encoder.shape[3]
    if by_feature:
        rows = rows and KeptRows(rows.indices, rows.values[block])
        return Factors(factors.fold, encoder, decoder[:, block], rows)
    first, last = block.start // width, -(-block.stop // width)
    begin = block.start - first * width
    encoder = encoder[:, first:last, :, begin : begin + min(width, block.stop - block.start)]
    if rows is not None:
        inside = (rows.indices >= block.start) & (rows.indices < block.stop)
        rows = KeptRows(rows.indices[inside] - block.start, rows.values[:, inside])
    return Factors(factors.fold, encoder, decoder[:, :, first:last], rows)


def certify_product(first: NDArray[Any], second: NDArray[Any], stored: NDArray[Any]) -> Certificate:
    """Upper bounds on the norms of B · A − P relative to those of B · A, for the product P as it is stored.

    The product is computed in float64. Its rounding error is bounded as in `certify`. The norms of the
    computed product, less this error, are lower bounds on the norms of B · A.

    Args:
        first: A, shape (m, n), float64.
        second: B, shape (f, m), float64.
        stored: P in the dtype in which it is stored, shape (f, n).

    Returns:
        The bounds, for one group; infinite if the product may be zero.
    """
    exact = second @ first
    error = _gamma(first.shape[0] + 8) * _frobenius(first).above * _frobenius(second).above
    if not np.any(exact):
        bound = math.inf if error or np.any(stored) else 0.0
        return Certificate((bound,), (bound,))
    is_high, lost = len(exact) > exact.shape[1], exact - stored.astype(np.float64)
    product, residual = (
        _measured(_Blocks([matrix].__getitem__, 1, is_high, in_turn)) for matrix in (exact, lost)
    )
    spectral, frobenius = _relative_norms(product, residual, error)
    sizes = [math.ldexp(n, product.exponent) for n in (_spectral_below(product), product.size.below)]
    # The norms of B · A are at least those of the computed product less its error.
    shrunk = [max(0.0, 1 - error / size) * (1 - 8 * _UNIT) for size in sizes]
    bounds = [
        math.inf if shrink == 0 else bound / shrink * (1 + 8 * _UNIT)
        for bound, shrink in zip((spectral, frobenius), shrunk, strict=True)
    ]
    return Certificate((bounds[0],), (bounds[1],))


class _Bounds(NamedTuple):
    """A lower and an upper bound on a number."""

    below: float
    above: float


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A matrix in blocks.

    Attributes:
        block: Gives one of its blocks: some of its columns, or of its rows if it is high.
        count: The number of blocks.
        is_high: Whether it has more rows than columns, so that the blocks hold rows.
        shared: Runs the parts of a computation.
    """

    block: Callable[[int], Floats]
    count: int
    is_high: bool
    shared: Shared


@dataclass(frozen=True, slots=True)
class _Measured:
    """A matrix, divided by a power of two so that its squares do not under- or overflow.

    Attributes:
        blocks: Its blocks, not divided.
        largest: Its largest absolute entry, not divided; not a finite number if an entry is none.
        exponent: The exponent of the power: the division is exact. Almost all matrices are safe without.
        size: Bounds on its Frobenius norm.
        gram: The Gram matrix of its smaller side, shape (n, n).
        longer: The length of its other side.
    """

    blocks: _Blocks
    largest: float
    exponent: int
    size: _Bounds
    gram: Floats
    longer: int


def _measured(blocks: _Blocks) -> _Measured:
    """Measure a matrix in one pass over its blocks; numbers with unsafe squares need another one."""
    largest, size, gram, longer = _summed(blocks, 0)
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    if abs(exponent) > _SAFE_EXPONENT:
        _, size, gram, longer = _summed(blocks, exponent)
    else:
        exponent = 0
    return _Measured(blocks, largest, exponent, size, gram, longer)


def _summed(blocks: _Blocks, exponent: int) -> tuple[float, _Bounds, Floats, int]:
    """The largest absolute entry, the size, the Gram matrix and the longer side of a divided matrix."""
    gram: Floats = np.zeros((0, 0))
    squares: list[Floats] = []
    largest, longer = 0.0, 0
    for begin in range(0, blocks.count, _TOGETHER):
        number = min(_TOGETHER, blocks.count - begin)
        parts = blocks.shared(partial(_sized, blocks, exponent, begin), number)
        for _, own_largest, own in parts:
            # Not max(), which may drop a number that is none.
            largest = float(np.maximum(largest, own_largest))
            squares = [*squares, own] if blocks.is_high or not squares else [squares[0] + own]
        together = np.concatenate([block for block, _, _ in parts], axis=0 if blocks.is_high else 1)
        wide = together.T if blocks.is_high else together
        gram = gram if longer else np.zeros((len(wide), len(wide)))
        _add_gram(gram, wide, blocks.shared)
        longer += wide.shape[1]
    for begin in range(_PANEL, len(gram), _PANEL):
        gram[:begin, begin : begin + _PANEL] = gram[begin : begin + _PANEL, :begin].T
    norm = math.sqrt(np.sum(np.concatenate(squares))) if squares else 0.0
    relative = _gamma(len(gram) + longer + 4)
    return largest, _Bounds(norm * (1 - relative), norm * (1 + relative)), gram, longer


def _sized(blocks: _Blocks, exponent: int, begin: int, number: int) -> tuple[Floats, float, Floats]:
    """A divided block, its largest absolute entry, and the squared norms of its rows."""
    block = blocks.block(begin + number)
    with np.errstate(over="ignore", invalid="ignore"):
        divided = np.ldexp(block, -exponent) if exponent else block
        return divided, float(np.max(np.abs(divided))), np.einsum("ij,ij->i", divided, divided)


def _add_gram(gram: Floats, wide: Floats, shared: Shared) -> None:
    """Add M Mᵀ in and below the diagonal; the largest parts begin first."""
    begins = range(0, len(gram), _PANEL)[::-1]

    def add(number: int) -> None:
        begin, end = begins[number], begins[number] + _PANEL
        with np.errstate(over="ignore", invalid="ignore"):
            gram[begin:end, :end] += wide[begin:end] @ wide[:end].T

    shared(add, len(begins))


def _relative_norms(original: _Measured, residual: _Measured, error: float) -> tuple[float, float]:
    """Upper bounds on the spectral and Frobenius norm of a residual that is known up to an error."""
    if original.largest == 0:
        bound = 0.0 if residual.largest == 0 else math.inf
        return bound, bound
    # Otherwise, the search for a shift that proves a bound never ends.
    if not math.isfinite(residual.largest):
        return math.inf, math.inf
    shift = residual.exponent - original.exponent
    spectral = math.ldexp(_spectral_above(residual), shift)
    frobenius = math.ldexp(residual.size.above, shift)
    error = math.ldexp(error, -original.exponent) + _UNIT * frobenius
    above = (spectral + error) / _spectral_below(original) * (1 + 8 * _UNIT)
    return above, (frobenius + error) / original.size.below * (1 + 8 * _UNIT)


def _product_error(encoder: NDArray[np.float64], decoder: NDArray[np.float64]) -> float:
    """Upper bound, in the Frobenius norm, on the rounding error of composing one group's factors."""
    k, j = encoder.shape[:2]
    by_slice = (
        _frobenius(encoder[i].reshape(j, -1)).above * _frobenius(decoder[:, i].reshape(-1, j)).above
        for i in range(k)
    )
    return _gamma(j + 8) * math.hypot(*by_slice)


def _gamma(n: int) -> float:
    """Higham's γ_n = nu / (1 − nu), the relative error of n roundings."""
    return n * _UNIT / (1 - n * _UNIT)


def _frobenius(matrix: NDArray[np.float64]) -> _Bounds:
    """Bounds on the Frobenius norm; einsum squares and adds without a temporary of the matrix' size."""
    norm = math.sqrt(np.sum(np.einsum("ij,ij->i", matrix, matrix)))
    relative = _gamma(sum(matrix.shape) + 4)
    return _Bounds(norm * (1 - relative), norm * (1 + relative))


def _spectral_above(matrix: _Measured) -> float:
    """Upper bound on the largest singular value of a matrix."""
    if matrix.largest == 0:
        return 0.0
    n = len(matrix.gram)
    top, _ = _top(matrix.gram)
    margin = 2 * n * _gamma(n + 1)  # rounding can make Cholesky fail for a smaller one
    while not _is_above(top * (1 + margin), matrix.gram):
        margin *= 2
    shift = top * (1 + margin)
    above = shift * (1 + n * _gamma(n + 4)) + _gamma(matrix.longer) * matrix.size.above**2
    return math.sqrt(above) * (1 + 4 * _UNIT)


def _is_above(shift: float, gram: Floats) -> bool:
    """Whether Cholesky's factorization of t I − G runs to its end."""
    shifted = -gram
    shifted[np.diag_indices(len(gram))] += shift
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def _spectral_below(matrix: _Measured) -> float:
    """Lower bound on the largest singular value of a matrix that is not zero; see `_spectral_above`."""
    n = len(matrix.gram)
    top, x = _top(matrix.gram)
    if x is None:
        start = np.random.default_rng(0).standard_normal(n)  # in practice not orthogonal to the top one
        shift = top * (1 + 2 * n * _gamma(n + 1))
        x = np.asarray(np.linalg.solve(shift * np.eye(n) - matrix.gram, start), np.float64)
    x = x / np.max(np.abs(x))
    length = float(np.linalg.norm(x)) * (1 + _gamma(n + 4))
    images = matrix.blocks.shared(
        lambda number: float(np.linalg.norm(_image(matrix, number, x))), matrix.blocks.count
    )
    image = math.hypot(*images) * (1 - _gamma(matrix.longer + 2 * len(images) + 2))
    return (image / length - _gamma(n) * matrix.size.above) * (1 - 8 * _UNIT)


def _image(matrix: _Measured, number: int, x: Floats) -> Floats:
    block = matrix.blocks.block(number)
    safe = np.ldexp(block, -matrix.exponent) if matrix.exponent else block
    # Not by the lengths: a block of a high matrix may be square.
    return safe @ x if matrix.blocks.is_high else safe.T @ x


def _top(gram: Floats) -> tuple[float, Floats | None]:
    """Approximately the largest eigenvalue of a Gram matrix; of a large one an eigenvector, too."""
    n = len(gram)
    if n < _ITERATED:
        return float(np.linalg.eigvalsh(gram)[-1]), None
    start = np.random.default_rng(0).standard_normal(n)  # fixed, so that results repeat
    with one_blas_thread(solvers=True):
        try:
            values, vectors = scipy.sparse.linalg.eigsh(gram, 1, which="LA", v0=start, tol=_TOLERANCE)
        except scipy.sparse.linalg.ArpackNoConvergence:
            return float(np.linalg.eigvalsh(gram)[-1]), None
    return float(values[0]), np.asarray(vectors[:, 0])
