"""Factors with a small error on a layer's activations, and the errors of all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array, Factors, Moments
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.linalg import projection
from onnx_lowrank.linalg.backend import Backend, array_namespace, eigenvectors
from onnx_lowrank.linalg.factorize import balance
from onnx_lowrank.linalg.folding import compose, split, unfold
from onnx_lowrank.linalg.narrowing import Way
from onnx_lowrank.linalg.quadratic import Quadratic, about, error, matrices_of, ridges


def errors(
    quadratic: Quadratic, shape: tuple[int, ...], fold: Fold, k: int, top: int, backend: Backend
) -> NDArray[np.float64]:
    """The relative error of the factors of `fit` without refinement, for every rank at once.

    The encoder of rank j is the first j rows of the encoder of rank `top`, so one Cholesky factorization
    serves all ranks, and where the encoder is the best one, eigenvalues alone.

    Args:
        quadratic: The error to minimize.
        shape: Shape of the canonical weight, (g, f, c, *kernel).
        fold: How to unfold it.
        k: Number of slices; divides c.
        top: The largest rank, at most the full rank.
        backend: Where to compute.

    Returns:
        e / e(0) at the ranks 0 … top, shape (top + 1,); never increasing.
    """
    total = float(np.sum(quadratic.power))
    if total <= 0:
        return np.zeros(top + 1)
    with lane(quadratic, backend) as place:
        problem = projection.folded(quadratic, shape, fold, k, place)
        if projection.is_exact(problem):
            gains = place.to_numpy(projection.exact_gains(problem, top, place))
        else:
            gains = place.to_numpy(projection.gains(problem, projection.encoder(problem, top)))
    return np.concatenate([np.ones(1), np.clip(1 - np.cumsum(gains) / total, 0.0, 1.0)])


def fit(
    quadratic: Quadratic,
    shape: tuple[int, ...],
    option: Option,
    backend: Backend,
    held: Quadratic | None = None,
    steps: int = 0,
    way: Way | None = None,
) -> Factors:
    """Factors of one option with a small error: the encoder first, then the decoder by least squares.

    The encoder of slice i is Uᵀ M_i. M_i is the slice's matrix in the quadratic's minimizer, U holds the top
    eigenvectors of M_i K_i M_iᵀ, and K_i are the moments of the encoder's inputs. That is optimal for the
    encode fold with one slice, and at full rank. Other options can be refined; every step of the refinement
    solves for the decoder. A narrow option has its own ways (`linalg.narrowing`).

    Args:
        quadratic: The error to minimize.
        shape: Shape of the canonical weight, (g, f, c, *kernel).
        option: Fold, number of slices (divides c) and rank (between 1 and the full rank).
        backend: Where to compute.
        held: The error on held-out inputs. The refinement ends when this error no longer falls, and the
            factors with its least value are returned. Without it, the last factors are returned.
        steps: The most iterations of the refinement.
        way: For a narrow option, the way to make the layer narrower.

    Returns:
        Float64 NumPy arrays; every slice balanced as U√Σ and √ΣVᵀ of its product.
    """
    if option.lowering is Lowering.NARROW:
        if way is None:
            raise RuntimeError("a narrow option needs the way to make its layer narrower")
        return way.fit(quadratic, shape, option.j)
    with lane(quadratic, backend) as place:
        problem = projection.folded(quadratic, shape, option.fold, option.k, place)
        if option.j == min(problem.optimum.shape[-2:]):
            xp = array_namespace(problem.optimum)
            return _factors(xp.linalg.svd(problem.optimum, full_matrices=False), option.fold, shape, place)
        encoder = projection.encoder(problem, option.j)
        if steps and not (option.fold.on(shape[3:]) is Fold.ENCODE and option.k == 1):
            score = None if held is None else partial(_held_error, held, problem, option.fold, shape, place)
            encoder = projection.refine(problem, encoder, place, score, steps)
        svd = _product_svd(projection.solve(problem, encoder).left, encoder)
        return _factors(svd, option.fold, shape, place)


def products(
    quadratic: Quadratic, shape: tuple[int, ...], options: Sequence[Option], backend: Backend
) -> Iterator[NDArray[np.float64]]:
    """The products of the factors of `fit` without refinement, for several options of one layer.

    Options with the same fold and number of slices share the encoder of the largest rank, whose first rows
    are the smaller encoders.

    Args:
        quadratic: The error to minimize.
        shape: Shape of the canonical weight, (g, f, c, *kernel).
        options: The options, with ranks below full rank.
        backend: Where to compute.

    Yields:
        The products in the order of the options, each of the weight's shape.
    """
    with lane(quadratic, backend) as place:
        known: dict[tuple[Fold, int], tuple[projection.Problem, Array]] = {}
        for option in options:
            key = option.fold, option.k
            if key not in known:
                problem = projection.folded(quadratic, shape, *key, place)
                top = max(other.j for other in options if (other.fold, other.k) == key)
                known[key] = problem, projection.encoder(problem, top)
            problem, encoder = known[key]
            encoder = encoder[..., : option.j, :]
            xp = array_namespace(encoder)
            product = xp.matmul(projection.solve(problem, encoder).left, encoder)
            yield place.to_numpy(unfold(product, option.fold, shape))


def output_errors(
    outputs: Moments, weight: NDArray[Any], *, centred: bool, ridge: float
) -> NDArray[np.float64]:
    """The relative errors of `output_fit` for every rank, from the moments of a layer's outputs alone.

    It is the error of projecting the outputs on their top eigenvectors. The moments of the outputs have only
    f² numbers; those of the inputs, which `errors` needs, have p².

    Args:
        outputs: Moments of the outputs W x, without bias.
        weight: Canonical weight W, shape (g, f, c, *kernel).
        centred: Whether a bias takes up the change of the mean.
        ridge: The weight of ‖W − Ŵ‖²_F beside E‖(W − Ŵ) x‖², each divided by its value at Ŵ = 0; per operator
            group.

    Returns:
        e / e(0) at the ranks 0 … min(f, c · prod(kernel)).
    """
    second, matrices = _output_moments(outputs, weight, centred, ridge)
    values = np.maximum(np.linalg.eigvalsh(second).sum(axis=0)[::-1], 0.0)
    total = values.sum()
    full = min(matrices.shape[1:])
    if total <= 0:
        return np.zeros(full + 1)
    tails = np.concatenate([np.cumsum(values[::-1])[::-1], np.zeros(1)])
    relative: NDArray[np.float64] = np.minimum(tails[: full + 1] / total, 1.0)
    return relative


def output_fit(
    outputs: Moments, weight: NDArray[Any], j: int, backend: Backend, *, centred: bool, ridge: float
) -> Factors:
    """Factors in the encode fold with one slice: D = U, the top eigenvectors of output moments, and E = UᵀW.

    Args:
        outputs: Moments of the outputs W x, without bias.
        weight: Canonical weight W, shape (g, f, c, *kernel).
        j: The rank, between 1 and min(f, c · prod(kernel)).
        backend: Where to compute.
        centred: Whether a bias takes up the change of the mean.
        ridge: As in `output_errors`.

    Returns:
        Float64 NumPy arrays, balanced.
    """
    second, matrices = _output_moments(outputs, weight, centred, ridge)
    with backend.lane(second.shape[-1]) as place:
        array = place.asarray(second)
        xp = array_namespace(array)
        vectors = eigenvectors(array)
        left = vectors[:, None, :, vectors.shape[-1] - j :]
        right = xp.matmul(xp.matrix_transpose(left), place.asarray(matrices)[:, None])
        return _factors(_product_svd(left, right), Fold.ENCODE, weight.shape, place)


def output_error(outputs: Moments, factors: Factors, *, centred: bool) -> float:
    """The relative error of the factors of `output_fit`: ‖y − P y‖² / ‖y‖², P projects on their decoder.

    Args:
        outputs: Moments of the outputs y, on any inputs.
        factors: The factors, in any dtype.
        centred: Whether a bias takes up the change of the mean.
    """
    decoder = factors.decoder.astype(np.float64)
    q, r = np.linalg.qr(decoder.reshape(*decoder.shape[:2], -1))
    q = q * (np.diagonal(r, axis1=1, axis2=2) != 0)[:, None, :]  # a column of zeros spans nothing
    second = about(outputs.mean, outputs.mean, outputs.second, centred)
    total = float(np.trace(second, axis1=1, axis2=2).sum())
    kept = float(np.sum(q * np.matmul(second, q)))
    return max(0.0, 1 - kept / total) if total > 0 else 0.0


def corrected_mean(weight: NDArray[Any], factors: Factors, inputs: Moments) -> NDArray[np.float64]:
    """(W − Ŵ) E[x]: the correction of the bias that keeps the mean of the outputs; shape (g · f,).

    Args:
        weight: Canonical weight W, shape (g, f, c, *kernel).
        factors: Its factors, in any dtype.
        inputs: Moments of the patches x.
    """
    lost = weight.astype(np.float64) - compose(factors.astype(np.dtype(np.float64)))
    change: NDArray[np.float64] = np.einsum("gfp,gp->gf", lost.reshape(*lost.shape[:2], -1), inputs.mean)
    return change.reshape(-1)


def lane(quadratic: Quadratic, backend: Backend) -> AbstractContextManager[Backend]:
    """Take `Backend.lane` after the host has computed the quadratic's minimizer."""
    _ = quadratic.optimum
    return backend.lane(quadratic.second.shape[-1])


def _held_error(
    held: Quadratic,
    problem: projection.Problem,
    fold: Fold,
    shape: tuple[int, ...],
    backend: Backend,
    encoder: Array,
) -> float:
    """The error of an encoder, with the decoder that is fitted to it, on held-out inputs."""
    xp = array_namespace(encoder)
    product = xp.matmul(projection.solve(problem, encoder).left, encoder)
    return error(held, backend.to_numpy(unfold(product, fold, shape)))


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """U√Σ and √ΣVᵀ of the product left · right."""
    return balance(*_product_svd(left, right))


def _product_svd(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of left · right, from QR factorizations of both, without the full product."""
    xp = array_namespace(left)
    q_left, r_left = xp.linalg.qr(left)
    q_right, r_right = xp.linalg.qr(xp.matrix_transpose(right))
    u, sigma, vt = xp.linalg.svd(xp.matmul(r_left, xp.matrix_transpose(r_right)), full_matrices=False)
    return xp.matmul(q_left, u), sigma, xp.matmul(vt, xp.matrix_transpose(q_right))


def _factors(
    svd: tuple[Array, Array, Array], fold: Fold, shape: tuple[int, ...], backend: Backend
) -> Factors:
    """Balanced factors on the host."""
    factors = split(*balance(*svd), fold, shape)
    return Factors(fold, backend.to_numpy(factors.encoder), backend.to_numpy(factors.decoder))


def _output_moments(
    outputs: Moments, weight: NDArray[Any], centred: bool, ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments of the outputs with the ridge, (g, f, f), and the weight as matrices, (g, f, p)."""
    matrices = matrices_of(weight)
    gram = matrices @ np.swapaxes(matrices, 1, 2)
    second = about(outputs.mean, outputs.mean, outputs.second, centred)
    size = np.trace(gram, axis1=1, axis2=2)
    level = ridges(np.trace(second, axis1=1, axis2=2) / np.where(size > 0, size, 1.0), ridge)
    return second + level[:, None, None] * gram, matrices
