"""Compare outputs with rows that are directions, such as embeddings of sentences or faces.

The largest element of such a row stands for no class, so its place says nothing. Applications use the cosines
and nearest neighbours of embeddings.

The rule: the rows of an output are an embedding where, in the input model's output,

1. every row has norm 1, within 1e-3, and
2. not all rows are probabilities (no element below 0, sum 1): a classifier that is certain gives rows of
   probabilities with norm 1.

The norms of logits differ from row to row and grow with certainty. The numbers of an embedding that is not
normalized look like logits; `classes` tells which outputs are compared by their largest elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.classes import are_shares

_NORM = 1e-3  # tolerance of a norm of 1, for the rounding of float16 and bfloat16
_TIED = 1e-6  # cosines that differ by less are ties: float32 rounds, and equal inputs give equal rows
_LARGEST_ROWS = 2048
_LARGEST_ELEMENTS = 2**23  # of the rows that are kept: 64 MiB for each model
_BLOCK = 256

Rows = NDArray[np.float64]


class Embedding:
    """Compares the rows of one output, and checks at the same time whether they are directions.

    The mean cosine covers all rows. Nearest neighbours are searched among every s-th row only, where s is the
    smallest power of 2 that leaves at most 2,048 rows (fewer if a row has more than 4,096 elements). The
    split of the rows into batches does not change the result.
    """

    def __init__(self) -> None:
        self._is_unit = True
        self._is_shares = True
        self._count = 0
        self._cosines = 0.0
        self._stride = 1
        self._kept: list[tuple[Rows, Rows]] = []

    def add(self, y: NDArray[Any], z: NDArray[Any]) -> None:
        """Add the rows along the last axis; rows that are not finite in the input model are left out.

        Args:
            y: The input model's output, float64, of two axes or more.
            z: The compressed model's output, finite where `y` is.
        """
        if not self._is_unit:
            return
        width = y.shape[-1]
        rows = np.isfinite(y).all(axis=-1)
        y, z = (v.reshape(-1, width) if rows.all() else v[rows] for v in (y, z))
        is_other_width = any(kept.shape[1] != width for kept, _ in self._kept[:1])
        norms = np.sqrt(np.einsum("ij,ij->i", y, y))
        if is_other_width or np.any(np.abs(norms - 1) > _NORM):
            self._is_unit = False
            self._kept.clear()
            return
        self._is_shares &= are_shares(y)
        y, z = _directions(y), _directions(z)
        self._cosines += float(np.einsum("ij,ij->", y, z))
        first = -self._count % self._stride
        self._count += len(y)
        if first < len(y):
            # Copied: a view of a few rows would keep all rows in memory.
            self._kept.append((y[first :: self._stride].copy(), z[first :: self._stride].copy()))
        self._thin(min(_LARGEST_ROWS, max(1, _LARGEST_ELEMENTS // width)))

    def _thin(self, most: int) -> None:
        """Drop every second row until at most `most` rows are left."""
        while -(-self._count // self._stride) > most:
            y, z = self._joined()
            self._kept = [(y[::2].copy(), z[::2].copy())]
            self._stride *= 2

    def _joined(self) -> tuple[Rows, Rows]:
        ours, theirs = zip(*self._kept, strict=True)
        return np.concatenate(ours), np.concatenate(theirs)

    @property
    def is_embedding(self) -> bool:
        """Whether there are rows, and all of them so far are directions."""
        return self._is_unit and not self._is_shares and self._count > 0

    @property
    def cosine(self) -> float | None:
        """The mean cosine between the rows of both models; None if rows are no directions."""
        return self._cosines / self._count if self.is_embedding else None

    @property
    def neighbours(self) -> float | None:
        """The share of rows whose nearest other row, by cosine, is the same in both models.

        None if rows are no directions, or if there are fewer than three, which leave no choice.
        """
        if not self.is_embedding:
            return None
        y, z = self._joined()
        if len(y) < 3:
            return None
        kept = 0
        for start in range(0, len(y), _BLOCK):
            block = np.arange(start, min(start + _BLOCK, len(y)))
            here = np.arange(len(block))
            ours, theirs = y[block] @ y.T, z[block] @ z.T
            ours[here, block] = theirs[here, block] = -np.inf
            found = ours[here, theirs.argmax(axis=1)]
            kept += int(np.count_nonzero(found >= ours.max(axis=1) - _TIED))
        return kept / len(y)


def _directions(rows: Rows) -> Rows:
    """The rows, scaled to norm 1; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1))
