"""Moments of streams of vectors: centred, with float64 accumulators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.independence import Blocks
from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.errors import InputError
from onnx_lowrank.operators.geometry import CHUNK

Floats = NDArray[np.float64]


class Accumulator:
    """Moments of a stream of vectors, with float64 accumulators.

    Chunks of rows are centred on the mean so far and multiplied in their own dtype. float32 takes half the
    time of float64; its error, on real activations, is about 1e-6 of the product of two standard deviations.
    The vector form of the pairwise update of Chan, Golub, LeVeque, "Algorithms for Computing the Sample
    Variance", 1983, merges the chunks.
    """

    def __init__(
        self, name: str, groups: int, size: int, targets: int = 0, *, is_weighed: bool = True
    ) -> None:
        """Start without vectors.

        Args:
            name: The origin of the vectors, for messages.
            groups: Number of groups, g.
            size: Length of a vector, n.
            targets: Number of targets behind every vector, m; only their products with the vector are summed.
            is_weighed: Whether to find how many independent vectors they are worth, which takes time.
        """
        self._name = name
        self._count = 0
        self._size = size
        self._mean = np.zeros((groups, size + targets))
        self._second = np.zeros((groups, size + targets, size))
        self._power = np.zeros((groups, targets))
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._corrections: list[tuple[Floats, Floats]] = []
        self._blocks = Blocks(groups, size) if is_weighed else None

    def add(self, rows: NDArray[Any], samples: NDArray[np.intp] | None = None) -> None:
        """Add vectors.

        Args:
            rows: Array of float32 or float64, shape (number, g, n + m); it is not changed.
            samples: The number of the sample of every vector, ascending; None if it is unknown.

        Raises:
            InputError: The vectors hold NaN, Inf or numbers whose squares overflow.
        """
        if len(rows):
            if self._blocks is not None:
                self._blocks.add(rows[..., : self._size], samples)
            self._add(rows)

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: Accumulator) -> None:
        """Add the vectors of another accumulator, whose blocks are closed, behind those so far.

        Args:
            other: An accumulator of the same groups, sizes and targets; it is not used any more.

        Raises:
            InputError: The vectors hold numbers whose squares overflow.
        """
        if self._blocks is not None and other._blocks is not None:
            self._blocks.merge(other._blocks)
        if other._count:
            other._correct()
            total = self._count + other._count
            shift, weight = other._mean - self._mean, self._count * other._count / total
            self._second += other._second
            for group, second in enumerate(self._second):
                _add_outer(second, weight, shift[group], shift[group, : self._size])
            self._power += other._power + weight * shift[:, self._size :] ** 2
            self._mean += shift * (other._count / total)
            self._count = total
            self._check()
        for rows in other._waiting:
            self._add(rows)

    def _add(self, rows: NDArray[Any]) -> None:
        """Add vectors to the moments; a merge updates all n² of them, so few vectors wait for others."""
        if len(rows) < self._merged_at():
            self._waiting.append(rows.copy(order="K"))
            self._waiting_rows += len(rows)
            if self._waiting_rows < self._merged_at():
                return
            rows = self._taken()
        self._merge(rows)

    def close_block(self) -> None:
        """End a batch of whole samples: vectors of the next one are independent of those so far."""
        if self._blocks is not None:
            self._blocks.close()

    def moments(self) -> Moments | None:
        """The moments of all vectors so far, biased (divided by their number); None without vectors.

        The vectors are in closed blocks, or all count as independent.
        """
        pair = self.pair()
        return None if pair is None else pair[0]

    def pair(self) -> tuple[Moments, Targets] | None:
        """The moments of the vectors, as `moments` gives them, and those of their targets."""
        if self._waiting:
            self._merge(self._taken())
        if not self._count:
            return None
        self._correct()
        n = self._size
        mean, second = self._mean[:, :n].copy(), self._second[:, :n] / self._count
        worth = None if self._blocks is None else self._blocks.independent(mean, second)
        inputs = Moments(self._count, mean, second, worth)
        power = self._power.sum(axis=1) / self._count
        return inputs, Targets(self._mean[:, n:].copy(), self._second[:, n:] / self._count, power)

    def _merged_at(self) -> int:
        groups, length = self._mean.shape
        return max(1, min(2 * length, CHUNK // (8 * groups * length)))

    def _taken(self) -> NDArray[Any]:
        rows = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting, self._waiting_rows = [], 0
        return rows

    def _merge(self, rows: NDArray[Any]) -> None:
        count, n = len(rows), self._size
        with np.errstate(over="ignore", invalid="ignore"):
            about = self._mean if self._count else rows.mean(axis=0)
            center = about.astype(rows.dtype)
            centred = rows - center
            offset = centred.sum(axis=0).astype(np.float64) / count
            shift = offset + center - self._mean
            total = self._count + count
            weight = self._count * count / total
            added = np.stack([np.sqrt(count) * offset, np.sqrt(weight) * shift], axis=1)
            self._corrections.append((added, added[..., :n] * np.array([-1.0, 1.0])[:, None]))
            for group, second in enumerate(self._second):
                part = centred[:, group]
                second[:n] += part[:, :n].T @ part[:, :n]  # BLAS computes half of a symmetric product
                second[n:] += part[:, n:].T @ part[:, :n]
            squares = np.einsum("igm,igm->gm", *[centred[..., n:].astype(np.float64)] * 2)
            self._power += squares - count * offset[:, n:] ** 2 + weight * shift[:, n:] ** 2
        self._mean += shift * (count / total)
        self._count = total
        self._check()
        if len(self._corrections) == _TOGETHER:
            self._correct()

    def _correct(self) -> None:
        """Add the corrections of rank one of the last merges in one pass, as each would take a pass alone."""
        if not self._corrections:
            return
        left, right = (np.concatenate(parts, axis=1) for parts in zip(*self._corrections, strict=True))
        for group, second in enumerate(self._second):
            second += left[group].T @ right[group]
        self._corrections = []

    def _check(self) -> None:
        """Check that the moments are finite.

        Raises:
            InputError: They are not.
        """
        diagonals = self._second.diagonal(axis1=1, axis2=2), self._power
        if not all(np.isfinite(diagonal).all() for diagonal in diagonals):
            raise InputError(
                f"On the calibration inputs, the activations of {self._name} hold NaN, Inf or numbers whose "
                "squares overflow: leave out the inputs that lead to them, or exclude the layer."
            )


def _add_outer(
    matrix: NDArray[np.float64], factor: float, left: NDArray[np.float64], right: NDArray[np.float64]
) -> None:
    """Add the multiple of an outer product in place, in blocks of rows, which take little memory."""
    step = max(1, _BLOCK // len(right))
    for start in range(0, len(left), step):
        rows = slice(start, start + step)
        matrix[rows] += factor * np.multiply.outer(left[rows], right)


_TOGETHER = 16
"""So many merges are corrected together."""

_BLOCK = 2**17
"""Elements of an outer product that are computed at a time."""


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of the vectors of several streams, in the given order.

    With shares s of the vectors and means m, they are Σ s S + Σ s (m − Σ s m)(m − Σ s m)ᵀ. The variances of
    second moments of independent streams add with the squares of their shares.
    """
    count, shares = _shares(parts)
    mean, apart = _means([part.mean for part in parts], shares)
    second = _mixed([part.second for part in parts], shares, apart, apart)
    worths = [part.independent for part in parts]
    if any(worth is None for worth in worths):
        return Moments(count, mean, second)
    variance = sum((p.count / count) ** 2 / (worth or 1.0) for p, worth in zip(parts, worths, strict=True))
    return Moments(count, mean, second, min(count, 1 / variance))


def merged_pairs(parts: Sequence[tuple[Moments, Targets]]) -> tuple[Moments, Targets]:
    """The moments of the vectors of several streams and of their targets, merged as by `merged`."""
    inputs, targets = [part for part, _ in parts], [part for _, part in parts]
    _, shares = _shares(inputs)
    _, apart_x = _means([part.mean for part in inputs], shares)
    mean, apart = _means([part.mean for part in targets], shares)
    cross = _mixed([part.cross for part in targets], shares, apart, apart_x)
    power = np.tensordot(shares, [part.power for part in targets], 1) + np.sum(apart**2, axis=(1, 2))
    return merged(inputs), Targets(mean, cross, power)


def _shares(parts: Sequence[Moments]) -> tuple[int, Floats]:
    """The number of all vectors, and the share of each stream, shape (streams,)."""
    count = sum(part.count for part in parts)
    return count, np.array([part.count / count for part in parts])


def _means(means: Sequence[Floats], shares: Floats) -> tuple[Floats, Floats]:
    """The mean of all streams, (g, n), and √s (m − mean) of each, (g, streams, n)."""
    mean = np.tensordot(shares, means, 1)
    return mean, np.stack(
        [(each - mean) * root for each, root in zip(means, np.sqrt(shares), strict=True)], 1
    )


def _mixed(moments: Sequence[Floats], shares: Floats, left: Floats, right: Floats) -> Floats:
    """Σ s M + Lᵀ R, in few passes over the moments, which may be large."""
    mixed: Floats = np.swapaxes(left, 1, 2) @ right
    scaled = np.empty_like(mixed)
    for share, each in zip(shares, moments, strict=True):
        mixed += np.multiply(each, share, out=scaled)
    return mixed
