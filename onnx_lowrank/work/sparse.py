"""Work items of tables that keep some of their rows (`linalg.sparse`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg import sparse
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.quadratic import shrinkage
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from onnx_lowrank.work.weights import WeightRef


@dataclass(frozen=True, slots=True, eq=False)
class SparseItem:
    """Asks for the errors of a table that keeps some of its rows.

    Attributes:
        weight: The table.
        moments: Its moments, with the counts of its rows.
        per_rank: The rows that stay for each unit of rank.
        every: The step between the ranks.
    """

    weight: WeightRef
    moments: MomentsRef
    per_rank: int
    every: int

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: copies of the table in float64."""
        return self.weight.nbytes + 24 * self.weight.size


def sparse_errors(item: SparseItem, backend: Backend) -> NDArray[np.float64]:
    """The relative errors at the ranks 0, 1, …, f; the host computes them for every device.

    Raises:
        InputError: A data file has changed.
    """
    weight = item.weight.read()
    weights = _weights(weight, item.moments.read())
    return sparse.errors(weight, weights, item.per_rank, item.every)


def sparse_factors(weight: NDArray[Any], moments: LayerMoments, j: int, per_rank: int) -> Factors:
    """The factors and the kept rows of a table at a rank, in float64.

    Raises:
        PlanError: Nothing shows which rows are read.
    """
    return sparse.fit(weight, _weights(weight, moments), per_rank, j)


def _weights(weight: NDArray[Any], moments: LayerMoments) -> NDArray[np.float64]:
    """The weights of the rows, with the floor that moments of the looked-up rows give in any fit."""
    if moments.counts is None or moments.outputs is None:
        raise PlanError(
            "A plan that keeps rows of a table needs inputs that show which are read: pass --calibration."
        )
    return sparse.row_weights(weight, moments.counts, shrinkage(moments.outputs, moments.least))
