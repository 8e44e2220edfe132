"""Moments of drawn samples, and least squares with the dense map P of a fold's encoder."""

import numpy as np
from linalg_reference import naive_fold, places
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.core.option import Fold


def samples(g: int, p: int, count: int, seed: int) -> NDArray:
    """Correlated vectors with a mean, shape (g, count, p)."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((g, p, p)) * np.geomspace(1, 0.05, p)
    return rng.standard_normal((g, count, p)) @ np.swapaxes(mixing, 1, 2) + rng.standard_normal((g, 1, p))


def moments(x: NDArray) -> Moments:
    mean = x.mean(axis=1)
    deviations = x - mean[:, None]
    return Moments(x.shape[1], mean, np.swapaxes(deviations, 1, 2) @ deviations / x.shape[1])


def targets(y: NDArray, x: NDArray) -> Targets:
    mean = y.mean(axis=1)
    deviations = y - mean[:, None]
    cross = np.swapaxes(deviations, 1, 2) @ (x - x.mean(axis=1, keepdims=True)) / x.shape[1]
    return Targets(mean, cross, np.sum(deviations**2, axis=(1, 2)) / x.shape[1])


def dense_map(encoder: NDArray, shape: tuple[int, ...], fold: Fold) -> NDArray:
    """P of one group's encoder (k, j, q): rows (rank, slice, tap), columns in the order (c, *kernel)."""
    k, j, _ = encoder.shape
    found = places((1, 1, *shape[2:]), fold, k)
    taps = 1 + max(row for _, _, row, _ in found.values())
    result = np.zeros((j, k, taps, len(found)))
    for column, index in enumerate(np.ndindex(1, 1, *shape[2:])):
        _, i, tap, place = found[index]
        result[:, i, tap, column] = encoder[i, :, place]
    return result.reshape(j * k * taps, -1)


def dense_encoder(weight: NDArray, second: NDArray, fold: Fold, k: int, j: int) -> NDArray:
    """The top eigenvectors' encoder of a weight of one group, shape (k, j, q)."""
    found = places((1, 1, *weight.shape[2:]), fold, k)
    spots = list(found.values())
    taps, q = 1 + max(s[2] for s in spots), 1 + max(s[3] for s in spots)
    where = {(i, tap, place): n for n, (_, i, tap, place) in enumerate(spots)}
    matrices = naive_fold(weight, fold, k)[0]
    result = np.empty((k, j, q))
    for i in range(k):
        blocks = []
        for tap in range(taps):
            index = [where[i, tap, place] for place in range(q)]
            blocks.append(second[np.ix_(index, index)])
        _, vectors = np.linalg.eigh(matrices[i] @ np.mean(blocks, axis=0) @ matrices[i].T)
        result[i] = vectors[:, ::-1][:, :j].T @ matrices[i]
    return result


def least_error(second: NDArray, cross: NDArray, power: float, dense: NDArray) -> float:
    """e at the best decoder of a dense map, by the pseudoinverse."""
    image = cross @ dense.T
    return power - float(np.sum(image @ np.linalg.pinv(dense @ second @ dense.T, hermitian=True) * image))
