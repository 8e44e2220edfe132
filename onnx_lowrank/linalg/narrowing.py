"""The ways to make a layer narrower together with others; each is chosen once, for all widths.

One of the two factors belongs to the other layers. It selects channels, or it has one block for each head of
attention, so that the other layers take it in without a new operator:

- Channels: the encoder selects input channels (`linalg.selection`).
- Values: a layer reads the heads z = A v of attention. A mixes positions, so (A v) P = A (v P) for every
  matrix P. The encoder is block-diagonal with the blocks Pᵀ, which the values v take in.
- Scores: queries q and keys k meet only in q kᵀ. With P P'ᵀ of rank r between them, q P are the queries and
  k P' the keys. The decoder of the queries' weight is block-diagonal with the blocks P' for the keys.

All heads get the same size r. Where several query heads share keys and values, they share P, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Rows
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import selection
from onnx_lowrank.linalg.quadratic import Quadratic

Floats = NDArray[np.float64]

_FLAT = 1e-9
"""The least variance of a direction, relative to the largest: it is divided by."""


class Way(ABC):
    """A way to make one layer narrower."""

    __slots__ = ()

    @abstractmethod
    def fit(self, quadratic: Quadratic, shape: tuple[int, ...], width: int) -> Factors:
        """The factors of a width, one of which the layer keeps.

        Args:
            quadratic: The error to minimize; one operator group.
            shape: Shape of the canonical weight, (1, f, c, *kernel).
            width: The width.
        """

    def given(self, values: Floats, width: int) -> Floats:
        """The values of all features, shape (f,), that the layer gives in place of others at a width."""
        return values

    def shift(self, width: int) -> Floats | None:
        """The change of the bias at a width, shape (f,); None if it is that of the outputs' mean."""
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Channels(Way):
    """Drops input channels.

    Attributes:
        order: The channels in the order of their worth, shape (c,).
    """

    order: NDArray[np.intp]

    def fit(self, quadratic: Quadratic, shape: tuple[int, ...], width: int) -> Factors:
        """The encoder selects the first channels."""
        return selection.fit(quadratic, shape, self.order[:width])


@dataclass(frozen=True, slots=True, eq=False)
class Values(Way):
    """Makes the heads of attention smaller between the values and the layer that reads the result.

    Attributes:
        basis: For every head of the values an orthogonal matrix, shape (heads, d, d). Its first r columns
            span the subspace that is kept at size r.
        shared: The number of heads of the layer's input that come from one head of the values.
    """

    basis: Floats
    shared: int

    def fit(self, quadratic: Quadratic, shape: tuple[int, ...], width: int) -> Factors:
        """The encoder has a block Pᵀ for every head; the decoder is refitted to the result."""
        rotation = np.repeat(self.basis, self.shared, axis=0)
        heads = len(rotation)
        factors = selection.fit(_rotated(quadratic, rotation), shape, self._order[:width])
        encoder = _diagonal(rotation[..., : width // heads].swapaxes(1, 2))
        return Factors(factors.fold, encoder.reshape(factors.encoder.shape), factors.decoder)

    def errors(self, quadratic: Quadratic, held: Quadratic | None = None) -> Floats:
        """The relative error e / e(0) at the widths 0 … c, as `selection.errors`."""
        rotation = np.repeat(self.basis, self.shared, axis=0)
        rotated = None if held is None else _rotated(held, rotation)
        curve = selection.errors(_rotated(quadratic, rotation), self._order, rotated)
        return _in_steps(curve[:: len(rotation)], len(rotation))

    @property
    def _order(self) -> NDArray[np.intp]:
        """The rotated channels: the first of every head, then the second of every head, and so on."""
        heads, d, _ = self.basis.shape
        return np.arange(heads * self.shared * d).reshape(-1, d).T.reshape(-1)


def values(quadratic: Quadratic, heads: int, shared: int) -> Values:
    """The subspace of every head of the values in which the layer's outputs lose least.

    C_h are the moments of the channels of a head, less what the other heads explain, and W_h is the layer's
    weight on them. The right singular vectors of W_h C_h^½ give the subspace: the error grows by
    ‖W_h C_h^½ (I − Π)‖² where one head is projected and the weights of the others are refitted.

    Args:
        quadratic: The error of the layer's weight; one operator group without a kernel.
        heads: Number of heads of the values.
        shared: The number of heads of the layer's input that come from one head of the values.
    """
    weight = quadratic.optimum[0]
    d = weight.shape[1] // (heads * shared)
    own = _own(quadratic.second[0], heads * shared).reshape(heads, shared, d, d).mean(axis=1)
    columns = weight.reshape(len(weight), heads, shared, d)
    grams = np.einsum("fhsi,fhsj->hij", columns, columns)
    root, inverse = _roots(own)
    _, vectors = np.linalg.eigh(root @ grams @ root)
    # Orthogonal columns with the same spans: the values keep their range, also in float16.
    basis, _ = np.linalg.qr(inverse @ vectors[..., ::-1])
    return Values(basis, shared)


def _own(second: Floats, heads: int) -> Floats:
    """For every head, the moments of its channels that those of the other heads do not explain."""
    d = len(second) // heads
    index = np.arange(heads)
    blocks = np.linalg.inv(second).reshape(heads, d, heads, d)[index, :, index, :]
    return np.linalg.inv(blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Scores(Way):
    """Makes the heads of queries and keys smaller; the layer computes the queries.

    Attributes:
        queries: For every head of the keys the columns P for its queries, shape (heads, d, d).
        keys: The columns P' for the keys; P P'ᵀ = I with all columns, and the first r stay.
        shared: The number of heads of the queries that meet one head of the keys.
        added: The bias of the queries, shape (f,); None without one.
    """

    queries: Floats
    keys: Floats
    shared: int
    added: Floats | None = None

    def fit(self, quadratic: Quadratic, shape: tuple[int, ...], width: int) -> Factors:
        """The encoder is the best weight times the blocks Pᵀ; the decoder has the blocks P'."""
        _, f, c, *kernel = shape
        into, out = self._columns(width)
        heads, d, _ = into.shape
        encoder = into.swapaxes(1, 2) @ quadratic.optimum[0].reshape(heads, d, -1)
        ones = [1] * len(kernel)
        decoder = _diagonal(out).reshape(1, f, 1, width, *ones)
        return Factors(Fold.DECODE.on(tuple(kernel)), encoder.reshape(1, 1, width, c, *ones), decoder)

    def given(self, values: Floats, width: int) -> Floats:
        """P' Pᵀ of the values of every head."""
        into, out = self._columns(width)
        parts = values.reshape(len(into), -1, 1)
        return np.asarray(out @ (into.swapaxes(1, 2) @ parts)).reshape(-1)

    def shift(self, width: int) -> Floats | None:
        """The bias is projected like the weight: the layer has no other features to give it."""
        return None if self.added is None else self.given(self.added, width) - self.added

    def _columns(self, width: int) -> tuple[Floats, Floats]:
        """P and P' of every head of the queries."""
        size = width // (len(self.queries) * self.shared)
        into, out = (np.repeat(part[..., :size], self.shared, axis=0) for part in (self.queries, self.keys))
        return into, out

    def errors(self, queries: Floats, keys: Floats) -> Floats:
        """E‖q kᵀ − q P P'ᵀ kᵀ‖² / E‖q kᵀ‖² over all heads, if queries and keys are independent.

        Args:
            queries: E[qᵀ q] of every head, shape (heads · shared, d, d).
            keys: E[kᵀ k], shape (heads, d, d).

        Returns:
            At the widths 0 … f, shape (f + 1,); never increasing.
        """
        first = self.queries.swapaxes(1, 2) @ _summed(queries, self.shared) @ self.queries
        second = self.keys.swapaxes(1, 2) @ keys @ self.keys
        # I − P P'ᵀ is the product of the columns that go, so of the products only the last block counts.
        lost = np.sum(first * second, axis=0)[::-1, ::-1].cumsum(axis=0).cumsum(axis=1).diagonal()[::-1]
        total = lost[0]
        if total <= 0:
            return np.zeros(self.queries.shape[0] * self.shared * len(lost) + 1)
        curve = np.minimum.accumulate(np.clip(np.append(lost / total, 0.0), 0.0, 1.0))
        return _in_steps(curve, len(self.queries) * self.shared)


@dataclass(frozen=True, slots=True, eq=False)
class PackedScores(Way):
    """Makes queries and keys smaller that one packed matrix computes; the layer is that matrix.

    With M = P P'ᵀ, q M kᵀ = (q M) (k Mᵀ)ᵀ, since M² = M. So the layer gives q M and k Mᵀ in place of q and k.
    The encoder has the rows of q P and of k P', and every other row of the weight as it is.

    Attributes:
        scores: The subspaces.
        rows: The features that are the queries, and those that are the keys.
        added: The bias of all features, shape (f,); None without one.
    """

    scores: Scores
    rows: tuple[Rows, Rows]
    added: Floats | None = None

    def fit(self, quadratic: Quadratic, shape: tuple[int, ...], width: int) -> Factors:
        """The encoder has the rows for narrow queries and keys; the decoder has the blocks P' and P."""
        _, f, c, *kernel = shape
        encoder = self._given(quadratic.optimum[0], width, decoded=False)
        ones = [1] * len(kernel)
        decoder = np.zeros((f, len(encoder)))
        old = new = 0
        for rows, _, out in self._parts(width):
            kept = rows.start - old
            decoder[old : rows.start, new : new + kept] = np.eye(kept)
            old, new = rows.start + rows.size, new + kept
            size = out.shape[0] * out.shape[2]
            decoder[rows.start : old, new : new + size] = _diagonal(out)
            new += size
        decoder[old:, new:] = np.eye(f - old)
        parts = (1, 1, len(encoder), c, *ones), (1, f, 1, len(encoder), *ones)
        return Factors(Fold.DECODE.on(tuple(kernel)), encoder.reshape(parts[0]), decoder.reshape(parts[1]))

    def given(self, values: Floats, width: int) -> Floats:
        """The projected values of queries and keys; all others are as they are."""
        return self._given(values[:, None], width, decoded=True)[:, 0]

    def shift(self, width: int) -> Floats | None:
        """The bias is projected like the weight."""
        return None if self.added is None else self.given(self.added, width) - self.added

    def errors(self, queries: Floats, keys: Floats) -> Floats:
        """As for queries and keys with matrices of their own."""
        return self.scores.errors(queries, keys)

    def _parts(self, width: int) -> list[tuple[Rows, Floats, Floats]]:
        """The rows that get fewer, in their order, each with its blocks in the encoder and in the decoder."""
        made, shared = self.scores, self.scores.shared
        size = width // (len(made.queries) * shared)
        into, out = made.queries[..., :size], made.keys[..., :size]
        queries = self.rows[0], np.repeat(into, shared, axis=0), np.repeat(out, shared, axis=0)
        return sorted((queries, (self.rows[1], out, into)), key=lambda part: part[0].start)

    def _given(self, values: Floats, width: int, *, decoded: bool) -> Floats:
        """The rows of the encoder, or those that the decoder makes of them."""
        made, at = [], 0
        for rows, into, out in self._parts(width):
            heads = values[rows.start : rows.start + rows.size].reshape(*into.shape[:2], -1)
            small = into.swapaxes(1, 2) @ heads
            made += [
                values[at : rows.start],
                (out @ small if decoded else small).reshape(-1, values.shape[1]),
            ]
            at = rows.start + rows.size
        return np.concatenate([*made, values[at:]])


def scores(queries: Floats, keys: Floats, added: Floats | None = None) -> Scores:
    """The subspaces of queries and keys in which their products lose least.

    For independent queries and keys, E‖q (I − M) kᵀ‖² is the squared Frobenius norm of A (I − M) B with the
    roots A and B of their moments. M = A⁻¹ U Uᵀ A of rank r has the least, where U are the first left
    singular vectors of A B (Eckart and Young).

    Args:
        queries: E[qᵀ q] of every head, shape (heads · shared, d, d).
        keys: E[kᵀ k] of every head, shape (heads, d, d); about their mean where a Softmax ignores what is the
            same for all keys.
        added: The bias of the queries, shape (heads · shared · d,).
    """
    shared = len(queries) // len(keys)
    root, inverse = _roots(_summed(queries, shared))
    left, singular, _ = np.linalg.svd(root @ _roots(keys)[0])
    # New queries and new keys get the same variances, so that neither leaves the range of float16.
    least = _FLAT * np.maximum(singular[:, :1], np.finfo(np.float64).tiny)
    scale = np.sqrt(np.maximum(singular, least))[:, None, :]
    return Scores(inverse @ left * scale, root @ left / scale, shared, added)


def head_moments(weight: Floats, second: Floats, heads: int, mean: Floats | None = None) -> Floats:
    """E[qᵀ q] of every head of q = W x + b.

    Args:
        weight: W, shape (heads · d, c).
        second: Centred second moments of x, shape (c, c).
        heads: Number of heads.
        mean: E[q], shape (heads · d,); None for moments about it.

    Returns:
        Shape (heads, d, d).
    """
    rows = weight.reshape(heads, -1, weight.shape[1])
    moments: Floats = rows @ second @ rows.swapaxes(1, 2)
    if mean is None:
        return moments
    parts = mean.reshape(heads, -1)
    return moments + parts[:, :, None] * parts[:, None, :]


def blocks(matrix: NDArray[np.generic], heads: int) -> Floats:
    """The blocks of a block-diagonal matrix (heads · m, heads · n), shape (heads, m, n)."""
    rows, columns = matrix.shape
    index = np.arange(heads)
    parts = matrix.astype(np.float64).reshape(heads, rows // heads, heads, columns // heads)
    return parts[index, :, index, :]


def _diagonal(parts: Floats) -> Floats:
    """The block-diagonal matrix of blocks (heads, m, n)."""
    heads, m, n = parts.shape
    matrix = np.zeros((heads, m, heads, n))
    index = np.arange(heads)
    matrix[index, :, index, :] = parts
    return matrix.reshape(heads * m, heads * n)


def _summed(moments: Floats, shared: int) -> Floats:
    """The moments of all heads that share, summed."""
    return np.asarray(moments.reshape(-1, shared, *moments.shape[1:]).sum(axis=1))


def _rotated(quadratic: Quadratic, rotation: Floats) -> Quadratic:
    """The error as a function of the weight on rotated channels: z Q for the heads z of the inputs.

    Args:
        quadratic: The error; one operator group.
        rotation: Orthogonal matrices Q, shape (heads, d, d).
    """
    heads, d, _ = rotation.shape
    second = quadratic.second[0].reshape(heads, d, heads, d)
    second = np.einsum("hai,hagb,gbj->higj", rotation, second, rotation, optimize=True)
    cross = quadratic.cross[0].reshape(-1, heads, d)
    cross = np.einsum("fha,hai->fhi", cross, rotation)
    size = heads * d
    return Quadratic(second.reshape(1, size, size), cross.reshape(1, -1, size), quadratic.power)


def _roots(moments: Floats) -> tuple[Floats, Floats]:
    """The symmetric roots of stacks of moments, and their inverses."""
    spread, vectors = np.linalg.eigh(moments)
    largest = np.maximum(spread[:, -1:], np.finfo(np.float64).tiny)
    root = np.sqrt(np.maximum(spread, _FLAT * largest))[:, None, :]
    flipped = vectors.swapaxes(1, 2)
    return np.asarray(vectors * root @ flipped), np.asarray(vectors / root @ flipped)


def _in_steps(curve: Floats, step: int) -> Floats:
    """A curve over every number, from one over the multiples of a step."""
    return np.append(np.repeat(curve[:-1], step), curve[-1])
