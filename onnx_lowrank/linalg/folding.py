"""Convert weights to matrices and back; this defines a slice, for spectra and factors alike.

A canonical weight has shape (g, f, c, *kernel): groups of the operator, output features and input
channels per group, spatial kernel. All functions keep the dtype and the namespace of their arrays.
"""

from __future__ import annotations

from math import prod

from onnx_lowrank.core.factors import Array, Factors
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.backend import array_namespace


def fold(weight: Array, fold: Fold, k: int) -> Array:
    """Cut the input channels of a canonical weight into k slices, then fold every slice to a matrix.

    Args:
        weight: Shape (g, f, c, *kernel).
        fold: How to unfold.
        k: Number of slices; divides c.

    Returns:
        Matrices of shape (g, k, rows, cols); rows run over (output feature, decoder kernel), columns
        over (input channel of the slice, encoder kernel), the last fastest.
    """
    xp = array_namespace(weight)
    g, f, c, *kernel = weight.shape
    order = _order(fold, len(kernel))
    encoder, decoder = fold.kernels(tuple(kernel))
    sliced = xp.reshape(weight, (g, f, k, c // k, *kernel))
    return xp.reshape(xp.permute_dims(sliced, order), (g, k, f * prod(decoder), c // k * prod(encoder)))


def side(shape: tuple[int, ...], fold: Fold, k: int) -> int:
    """The smaller number of rows and columns of the k slices of a canonical weight of this shape."""
    _, f, c, *kernel = shape
    encoder, decoder = fold.kernels(tuple(kernel))
    return min(f * prod(decoder), c // k * prod(encoder))


def unfold(matrices: Array, fold: Fold, shape: tuple[int, ...]) -> Array:
    """The inverse of `fold`.

    Args:
        matrices: Shape (g, k, rows, cols).
        fold: How they were folded.
        shape: Shape of the canonical weight, (g, f, c, *kernel).
    """
    xp = array_namespace(matrices)
    g, f, c, *kernel = shape
    k = matrices.shape[1]
    order = _order(fold, len(kernel))
    sliced = (g, f, k, c // k, *kernel)
    permuted = xp.reshape(matrices, tuple(sliced[axis] for axis in order))
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return xp.reshape(xp.permute_dims(permuted, inverse), shape)


def split(left: Array, right: Array, fold: Fold, shape: tuple[int, ...]) -> Factors:
    """Lay out the two matrix factors of every slice as the weights of the two operators.

    Args:
        left: Shape (g, k, rows, j).
        right: Shape (g, k, j, cols).
        fold: How the slices were folded.
        shape: Shape of the canonical weight, (g, f, c, *kernel).
    """
    xp = array_namespace(left)
    g, f, c, *kernel = shape
    _, k, j, _ = right.shape
    encoder_kernel, decoder_kernel = fold.kernels(tuple(kernel))
    decoder = xp.permute_dims(xp.reshape(left, (g, k, f, prod(decoder_kernel), j)), (0, 2, 1, 4, 3))
    return Factors(
        fold=fold,
        encoder=xp.reshape(right, (g, k, j, c // k, *encoder_kernel)),
        decoder=xp.reshape(decoder, (g, f, k, j, *decoder_kernel)),
    )


def compose(factors: Factors) -> Array:
    """The canonical weight, of shape (g, f, c, *kernel): the product of the factors, with the kept rows."""
    xp = array_namespace(factors.encoder, factors.decoder)
    g, k, j, width, *encoder_kernel = factors.encoder.shape
    _, f, _, _, *decoder_kernel = factors.decoder.shape
    kernel = (max(sizes) for sizes in zip(encoder_kernel, decoder_kernel, strict=True))
    decoder = xp.reshape(factors.decoder, (g, f, k, j, prod(decoder_kernel)))
    left = xp.reshape(xp.permute_dims(decoder, (0, 2, 1, 4, 3)), (g, k, f * prod(decoder_kernel), j))
    right = xp.reshape(factors.encoder, (g, k, j, width * prod(encoder_kernel)))
    weight = unfold(xp.matmul(left, right), factors.fold, (g, f, k * width, *kernel))
    if factors.rows is not None:
        weight[:, :, factors.rows.indices] = factors.rows.values
    return weight


def _order(fold: Fold, n: int) -> tuple[int, ...]:
    """The axes of (g, f, k, c/k, *kernel) in the order g, k, f, decoder kernel, c/k, encoder kernel."""
    encoder = fold.encoder_axes(n)
    decoder = tuple(axis for axis in range(n) if axis not in encoder)
    return (0, 2, 1, *(4 + axis for axis in decoder), 3, *(4 + axis for axis in encoder))
