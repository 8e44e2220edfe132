"""Which input channels of a layer to keep, and the weight that makes up for the others.

A layer W reads channels x, and only these layers' producers compute them. Dropping a channel removes a column
of W and the row of every producer that computes it. On calibration inputs the kept columns S are refitted in
closed form: with C = E[x xᵀ] and X = E[y xᵀ], the best weight on the kept channels is X_S C_SS⁻¹.

The channels are dropped as by the optimal brain surgeon (Hassibi and Stork, Second order derivatives for
network pruning, 1993), with all output features and all elements of a kernel together: the error grows by
tr(W_i (C⁻¹)_ii⁻¹ W_iᵀ) where channel i goes and the others are refitted.
"""

from __future__ import annotations

from math import inf

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.quadratic import Quadratic

Indices = NDArray[np.intp]
Floats = NDArray[np.float64]

RIDGE = 0.01
"""The least ridge. The channels that stay take over the weights of those that go, which a larger ridge would
forbid; on MiniLM's feed-forward layers, a tenth and a thousandth both had more error on held-out inputs."""

_JUDGED = 8
"""So many refits are judged on held-out inputs; between them, the curve is scaled linearly."""

_SMALL = 1e-12

_BLOCK = 64
"""So many channels are dropped before the matrices shrink."""


def order(quadratic: Quadratic, channels: int) -> Indices:
    """The channels in the order of their worth: the first j are the ones to keep of width j.

    Args:
        quadratic: The error of the layer's weight; one operator group.
        channels: Number of input channels; divides the length of the patches.

    Returns:
        Shape (channels,).
    """
    inverse, weight = _inverse(quadratic.second[0]), quadratic.optimum[0]
    left, dropped = np.arange(channels), []
    while left.size > 1:
        count = min(_BLOCK, left.size - 1)
        surgeon = _Surgeon(inverse, weight, left.size)
        positions = [surgeon.drop() for _ in range(count)]
        dropped += left[positions].tolist()
        stays = np.delete(np.arange(left.size), positions)
        inverse, weight = surgeon.rest(stays)
        left = left[stays]
    return np.array([*left, *reversed(dropped)], dtype=np.intp)


def _inverse(second: Floats) -> Floats:
    """C⁻¹ from Cholesky's factorization, in a third of the time of a solution with the unit matrix."""
    lower, failed = scipy.linalg.lapack.dpotrf(second, lower=1)
    if failed:
        return np.asarray(np.linalg.inv(second), np.float64)
    inverse, _ = scipy.linalg.lapack.dpotri(lower, lower=1)
    return np.asarray(np.tril(inverse) + np.tril(inverse, -1).T)


class _Surgeon:
    """Drops channels one by one; changes of the matrices are kept as products until the block ends.

    With U and V collected from the dropped channels, the inverse is now H − U Uᵀ, and the weight W − V Uᵀ.
    """

    def __init__(self, inverse: Floats, weight: Floats, channels: int) -> None:
        """Start with H = C⁻¹, shape (p, p), and the best weight W on all channels, shape (f, p)."""
        self._inverse, self._weight = inverse, weight
        size = len(inverse) // channels
        self._shape = channels, size
        index = np.arange(channels)
        self._own = inverse.reshape(channels, size, channels, size)[index, :, index, :]
        columns = weight.reshape(-1, channels, size)
        self._grams = np.einsum("fca,fcb->cab", columns, columns)
        self._alive = np.ones(channels, dtype=bool)
        self._left = np.empty((len(inverse), 0), order="F")
        self._right = np.empty((len(weight), 0), order="F")

    def drop(self) -> int:
        """Drop the channel with the least growth of the error; returns its position."""
        size = self._shape[1]
        growth = np.where(self._alive, self._growth(), np.inf)
        channel = int(np.argmin(growth))
        elements = slice(channel * size, (channel + 1) * size)
        root = _root(self._own[channel])
        left = self._inverse[:, elements] - self._left @ self._left[elements].T
        right = self._weight[:, elements] - self._right @ self._left[elements].T
        left, right = _divided(left, root), _divided(right, root)
        self._update(left, right)
        self._left = np.concatenate([self._left, left], axis=1)
        self._right = np.concatenate([self._right, right], axis=1)
        self._alive[channel] = False
        return channel

    def _growth(self) -> Floats:
        """The growth of the error by every channel that goes; of those that went, any number."""
        # A channel that went has an empty block, which no one may divide by.
        own = np.where(self._alive[:, None, None], self._own, np.eye(self._shape[1]))
        if self._shape[1] == 1:
            return np.asarray((self._grams / own)[:, 0, 0])
        return np.asarray(np.trace(np.linalg.solve(own, self._grams), axis1=1, axis2=2))

    def _update(self, left: Floats, right: Floats) -> None:
        """Update the channels' own blocks of the inverse, and the Gram matrices of their weights."""
        channels, size = self._shape
        u = left.reshape(channels, size, size)
        met = (right.T @ self._weight - (right.T @ self._right) @ self._left.T).reshape(size, channels, size)
        flat = u.swapaxes(1, 2)
        crossed = _product(u, met.swapaxes(0, 1))
        self._own = self._own - _product(u, flat)
        kept = _product(_product(u, right.T @ right), flat)
        self._grams = self._grams - crossed - crossed.swapaxes(1, 2) + kept

    def rest(self, channels: Indices) -> tuple[Floats, Floats]:
        """The inverse and the weight of the channels that stay."""
        elements = np.arange(len(self._inverse)).reshape(self._shape)[channels].reshape(-1)
        left = self._left[elements]
        inverse = self._inverse[np.ix_(elements, elements)] - left @ left.T
        return inverse, self._weight[:, elements] - self._right @ left.T


def _root(own: Floats) -> Floats:
    """The lower triangle R with R Rᵀ; that of one element is its root."""
    return np.asarray(np.sqrt(own) if own.size == 1 else np.linalg.cholesky(own))


def _divided(values: Floats, root: Floats) -> Floats:
    """X R⁻ᵀ for a triangle R, which mostly has one element; there a solver takes longer than a division."""
    if root.size == 1:
        return values / root
    return np.asarray(scipy.linalg.solve_triangular(root, values.T, lower=True).T)


def _product(one: Floats, other: Floats) -> Floats:
    """Products of stacks of small matrices; matmul is slow for stacks of single elements."""
    return np.asarray(one * other if one.shape[-1] == 1 else one @ other)


def errors(quadratic: Quadratic, kept: Indices, held: Quadratic | None = None) -> NDArray[np.float64]:
    """The relative error e / e(0) for every width at once, with the kept channels refitted.

    A refit has many parameters, so its error on the inputs that it was fitted to flatters it. With held-out
    inputs, some refits are judged on them, and the curve is scaled by what these show.

    Args:
        quadratic: The error of the layer's weight; one operator group.
        kept: The channels in the order of their worth, shape (channels,).
        held: The error on held-out inputs.

    Returns:
        Shape (channels + 1,), at the widths 0 … channels; never increasing.
    """
    if float(quadratic.power[0]) <= 0:
        return np.zeros(kept.size + 1)
    elements = _elements(quadratic, kept, kept.size)
    # The leading blocks of one triangle are the triangles of all widths. Each column of X L⁻ᵀ is the part of
    # the outputs that only its element explains beside those before it.
    lower = np.linalg.cholesky(quadratic.second[0][np.ix_(elements, elements)])
    explained = scipy.linalg.solve_triangular(lower, quadratic.cross[0][:, elements].T, lower=True)
    gains = np.sum(explained**2, axis=1).reshape(kept.size, -1).sum(axis=1)
    curve = np.append(1.0, np.clip(1 - np.cumsum(gains) / float(quadratic.power[0]), 0.0, 1.0))
    if held is None or not curve.any():
        return curve
    widths = np.unique(np.linspace(1, kept.size, _JUDGED + 1).astype(int))[:-1]
    shown = _held_errors(lower, explained, held, elements, widths * (elements.size // kept.size))
    scale = np.interp(np.arange(kept.size + 1), widths, shown / np.maximum(curve[widths], _SMALL))
    judged: NDArray[np.float64] = np.minimum.accumulate(np.minimum(curve * scale, 1.0))
    judged[0] = 1.0
    return judged


def _held_errors(
    lower: Floats, explained: Floats, held: Quadratic, elements: Indices, numbers: NDArray[np.intp]
) -> Floats:
    """The errors on held-out inputs of the weights that are refitted to the first elements.

    Args:
        lower: L of the moments of all elements, in their order.
        explained: L⁻¹ Xᵀ.
        held: The error on held-out inputs.
        elements: The order of the elements.
        numbers: The numbers of elements of the refits.
    """
    second = held.second[0][np.ix_(elements, elements)]
    cross = held.cross[0][:, elements].T
    power = float(np.sum(held.power))
    errors = []
    for number in numbers:
        first = slice(0, number)
        weight = scipy.linalg.solve_triangular(lower[first, first], explained[first], trans=1, lower=True)
        lost = power + float(np.sum(weight * (second[first, first] @ weight - 2 * cross[first])))
        errors.append(max(lost / power, 0.0) if power > 0 else inf if lost > 0 else 0.0)
    return np.array(errors)


def _elements(quadratic: Quadratic, kept: Indices, channels: int) -> Indices:
    """The elements of patches that belong to some of the channels, in the order of these channels."""
    return np.arange(quadratic.second.shape[1]).reshape(channels, -1)[kept].reshape(-1)


def _refitted(quadratic: Quadratic, kept: Indices, channels: int) -> tuple[Indices, Floats]:
    """The elements of the kept channels, and the columns of the best weight that reads only these."""
    elements = _elements(quadratic, kept, channels)
    second = quadratic.second[0][np.ix_(elements, elements)]
    columns = scipy.linalg.solve(second, quadratic.cross[0][:, elements].T, assume_a="pos").T
    return elements, columns


def fit(quadratic: Quadratic, shape: tuple[int, ...], kept: Indices) -> Factors:
    """The encoder that selects the channels to keep, and the decoder that is refitted to them.

    Args:
        quadratic: The error to minimize; one operator group.
        shape: Shape of the canonical weight, (1, f, c, *kernel).
        kept: The channels to keep, in any order.

    Returns:
        Float64 arrays in the fold whose decoder holds the kernel; every row of the encoder has a single 1.
    """
    _, f, c, *kernel = shape
    kept, width = np.sort(kept), kept.size
    _, decoder = _refitted(quadratic, kept, c)
    encoder = np.zeros((1, 1, width, c, *[1] * len(kernel)))
    encoder[0, 0, np.arange(width), kept] = 1.0
    return Factors(Fold.DECODE.on(tuple(kernel)), encoder, decoder.reshape(1, f, 1, width, *kernel))


def selected(factors: Factors) -> Indices:
    """The channels that the encoder of `fit` selects, ascending."""
    encoder = factors.encoder[0, 0].reshape(*factors.encoder.shape[2:4])
    return np.asarray(np.argmax(encoder, axis=1))
