"""The vectors that a layer's weight multiplies, cut out of the activations that its node reads.

All operators share one identity. With W the layer's canonical weight and x one row of `patches`, group i of
the output at this position is W[i].reshape(f / g, p) @ x[i], without the bias and without a BatchNorm
behind. `outputs` brings the node's results into the same order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**25
"""The most bytes of a chunk of rows; a single line of positions is never split, so it may take more."""

_ENOUGH = 256
"""So many rows for each of their elements are enough: the moments of N independent rows of length p are off
by about p / N of themselves, and neighbours in a picture, whose patches overlap, are left out first."""


G = TypeVar("G", bound="Geometry")


class Geometry(Protocol):
    """The elements of an activation that meet the weight together; hashable, to find equal geometries."""

    def rows(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The rows of one activation that meet the weight, in chunks of shape (rows, g, p)."""

    def results(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The node's results, in the order of the rows, in chunks of shape (rows, g, f / g)."""

    def thinned(self, needed: int) -> Self:
        """The same for fewer positions; at least `needed` of each sample must stay, or all of them."""


def thinned(geometry: G, length: int, samples: int) -> G:
    """A geometry that cuts out as many rows as their moments need, not those of all positions.

    Args:
        geometry: The way in which a node reads its input.
        length: Length of a row, or of a result, whose second moments are wanted.
        samples: Number of samples, over all runs.
    """
    return geometry.thinned(ceil(_ENOUGH * length / samples))


def patches(geometry: Geometry, value: NDArray[Any], depth: int = 0) -> Iterator[NDArray[Any]]:
    """The rows that meet a layer's weight, in chunks of at most `CHUNK` bytes.

    A row that broadcasts over several groups of a batched weight is in all of them. The rows of a Gemm
    include its scale. For a transposed use, the identity holds with the transpose of W[i].

    Args:
        geometry: The way in which the node reads its input.
        value: The node's activation, a float array.
        depth: Number of axes that stack the activations of several runs; empty arrays have no rows.

    Yields:
        Read-only arrays of shape (rows, g, p), p = c / g · prod(kernel) in the order (c / g, *kernel). The
        dtype is float64 if the activation's is, else float32. The order of the rows follows the axes of the
        output before its features (batch), then the axes behind them (positions).
    """
    for single in _unstacked(value, depth):
        yield from geometry.rows(single)


def outputs(geometry: Geometry, value: NDArray[Any], depth: int = 0) -> Iterator[NDArray[Any]]:
    """The results of a layer, in the order of the rows of `patches`, in chunks of at most `CHUNK` bytes.

    Args:
        geometry: The way in which the node lays out its result.
        value: The node's result, a float array.
        depth: Number of axes that stack the results of several runs.

    Yields:
        Read-only arrays of shape (rows, g, f / g), of dtype float64 if the result's is, else float32.
    """
    for single in _unstacked(value, depth):
        yield from geometry.results(single)


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors along the last axis of an activation, or along the one before it.

    Attributes:
        batch: Sizes of the leading axes of the weight; their product is the number of groups.
        reads_columns: Whether the vectors are the columns of the activation.
        gives_columns: Whether the results are columns.
        scale: The factor of the product (a Gemm's alpha).
    """

    batch: tuple[int, ...] = ()
    reads_columns: bool = False
    gives_columns: bool = False
    scale: float = 1.0

    def rows(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The rows that meet the weight."""
        for chunk in vectors(self.batch, value, self.reads_columns):
            yield chunk if self.scale == 1 else chunk * chunk.dtype.type(self.scale)

    def results(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The vectors of the node's result."""
        yield from vectors(self.batch, value, self.gives_columns)

    def thinned(self, needed: int) -> Self:
        """All vectors count: each is a token of its own."""
        return self


def _unstacked(value: NDArray[Any], depth: int) -> Iterator[NDArray[Any]]:
    """The activations of single runs; none if the node did not run."""
    if value.size:
        yield from value.reshape(-1, *value.shape[depth:]) if depth else (value,)


def vectors(batch: tuple[int, ...], value: NDArray[Any], columns: bool) -> Iterator[NDArray[Any]]:
    """Vectors of a matrix product: axes that the weight also has become groups, all others rows."""
    if value.ndim == 1:
        value = value[None]
    elif columns:
        value = value.swapaxes(-1, -2)
    *leading, m, n = value.shape
    shape = np.broadcast_shapes(tuple(leading), batch)
    value = np.broadcast_to(value, (*shape, m, n))
    groups = [axis for axis, size in enumerate(batch, len(shape) - len(batch)) if size > 1]
    rows = [axis for axis in range(len(shape)) if axis not in groups]
    view = value.transpose(*rows, len(shape), *groups, len(shape) + 1)
    for part, _ in parts(view, len(rows) + 1):
        yield part.reshape(-1, prod(batch), n).astype(row_dtype(view), copy=False)


def channel_major(view: NDArray[Any], lead: int) -> Iterator[NDArray[Any]]:
    """Chunks of a view (*rows, g, *n) with `lead` axes of rows, laid out in memory with the rows last.

    Every copy then goes along the lines of the input, which is several times as fast as row by row.
    """
    for part, axes in parts(view, lead):
        groups, *features = part.shape[axes:]
        chunk = np.empty((groups, *features, *part.shape[:axes]), row_dtype(view))
        chunk[...] = np.moveaxis(part, tuple(range(axes)), tuple(range(-axes, 0)))
        yield chunk.reshape(groups, prod(features), -1).transpose(2, 0, 1)


def parts(view: NDArray[Any], lead: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Cut a view along its leading axes until each part takes at most `CHUNK` bytes."""
    step = CHUNK // max(1, view[:1].size * row_width(view))
    if step or lead == 1:
        for start in range(0, len(view), max(1, step)):
            yield view[start : start + max(1, step)], lead
    else:
        for entry in view:
            yield from parts(entry, lead - 1)


def row_dtype(value: NDArray[Any]) -> type[np.floating[Any]]:
    """The dtype of the rows: BLAS multiplies float64 and float32 only."""
    return np.float64 if value.dtype == np.float64 else np.float32


def row_width(value: NDArray[Any]) -> int:
    """Number of bytes of one number of a row."""
    return np.dtype(row_dtype(value)).itemsize
