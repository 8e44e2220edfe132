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


class Accumulator:
    """Moments of a stream of vectors, with float64 accumulators.

    Chunks of rows are centred on the mean so far and multiplied in their own dtype. float32 takes half the
    time of float64; its error, on real activations, is about 1e-6 of the product of two standard deviations.
    The vector form of the pairwise update of Chan, Golub, LeVeque, "Algorithms for Computing the Sample
    Variance", 1983, merges the chunks.
    """

    def __init__(self, name: str, groups: int, size: int, targets: int = 0) -> None:
        """Start without vectors.

        Args:
            name: The origin of the vectors, for messages.
            groups: Number of groups, g.
            size: Length of a vector, n.
            targets: Number of targets behind every vector, m; only their products with the vector are summed.
        """
        self._name = name
        self._count = 0
        self._size = size
        self._mean = np.zeros((groups, size + targets))
        self._second = np.zeros((groups, size + targets, size))
        self._power = np.zeros((groups, targets))
        self._waiting: list[NDArray[Any]] = []
        self._waiting_rows = 0
        self._blocks = Blocks(groups, size)

    def add(self, rows: NDArray[Any], samples: NDArray[np.intp] | None = None) -> None:
        """Add vectors.

        Args:
            rows: Array of float32 or float64, shape (number, g, n + m); it is not changed.
            samples: The number of the sample of every vector, ascending; None if it is unknown.

        Raises:
            InputError: The vectors hold NaN, Inf or numbers whose squares overflow.
        """
        if not len(rows):
            return
        self._blocks.add(rows[..., : self._size], samples)
        # A merge updates all n² moments, so few rows are copied and merged later with others.
        if len(rows) < self._merged_at():
            self._waiting.append(rows.copy(order="K"))
            self._waiting_rows += len(rows)
            if self._waiting_rows < self._merged_at():
                return
            rows = self._taken()
        self._merge(rows)

    def close_block(self) -> None:
        """End a batch of whole samples: vectors of the next one are independent of those so far."""
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
        n = self._size
        mean, second = self._mean[:, :n].copy(), self._second[:, :n] / self._count
        inputs = Moments(self._count, mean, second, self._blocks.independent(mean, second))
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
            for group, second in enumerate(self._second):
                part = centred[:, group]
                second[:n] += part[:, :n].T @ part[:, :n]  # BLAS computes half of a symmetric product
                second[n:] += part[:, n:].T @ part[:, :n]
                second -= count * np.multiply.outer(offset[group], offset[group, :n])
                second += weight * np.multiply.outer(shift[group], shift[group, :n])
            squares = np.einsum("igm,igm->gm", *[centred[..., n:].astype(np.float64)] * 2)
            self._power += squares - count * offset[:, n:] ** 2 + weight * shift[:, n:] ** 2
        diagonals = self._second.diagonal(axis1=1, axis2=2), self._power
        if not all(np.isfinite(diagonal).all() for diagonal in diagonals):
            raise InputError(
                f"On the calibration inputs, the activations of {self._name} hold NaN, Inf or numbers whose "
                "squares overflow: leave out the inputs that lead to them, or exclude the layer."
            )
        self._mean += shift * (count / total)
        self._count = total


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of the vectors of several streams, merged by the same update, in the given order.

    The variances of second moments of independent streams add with the squares of their shares.
    """
    count, mean, second = parts[0].count, parts[0].mean, parts[0].second
    for part in parts[1:]:
        total = count + part.count
        share, shift = part.count / total, part.mean - mean
        between = shift[:, :, None] * shift[:, None, :]
        second = (1 - share) * second + share * part.second + share * (1 - share) * between
        mean = mean + share * shift
        count = total
    worths = [part.independent for part in parts]
    if any(worth is None for worth in worths):
        return Moments(count, mean, second)
    variance = sum((p.count / count) ** 2 / (worth or 1.0) for p, worth in zip(parts, worths, strict=True))
    return Moments(count, mean, second, min(count, 1 / variance))


def merged_pairs(parts: Sequence[tuple[Moments, Targets]]) -> tuple[Moments, Targets]:
    """The moments of the vectors of several streams and of their targets, merged as by `merged`."""
    (first, targets), *others = parts
    count, mean_x = first.count, first.mean
    mean, cross, power = targets.mean, targets.cross, targets.power
    for inputs, part in others:
        total = count + inputs.count
        share, shift, shift_x = inputs.count / total, part.mean - mean, inputs.mean - mean_x
        between = share * (1 - share)
        cross = (1 - share) * cross + share * part.cross + between * shift[:, :, None] * shift_x[:, None, :]
        power = (1 - share) * power + share * part.power + between * np.sum(shift**2, axis=1)
        mean, mean_x, count = mean + share * shift, mean_x + share * shift_x, total
    return merged([inputs for inputs, _ in parts]), Targets(mean, cross, power)
