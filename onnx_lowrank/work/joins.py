"""Work items for layers that share a factor, whichever it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.work.fitting import FittedLayer
from onnx_lowrank.work.sharing import SharedItem, fitted_together, shared_errors
from onnx_lowrank.work.sums import SummedItem, fitted_sum, summed_errors

JoinedItem = SharedItem | SummedItem
"""Layers that share an encoder, or a decoder."""


def joined_errors(item: JoinedItem, backend: Backend) -> list[NDArray[np.float64]]:
    """Compute the relative errors of every layer at the ranks 0 … j, as `fitted_jointly` fits them.

    Raises:
        InputError: The moments are not finite.
        PlanError: There are no moments.
    """
    return shared_errors(item, backend) if isinstance(item, SharedItem) else summed_errors(item, backend)


def fitted_jointly(item: JoinedItem, backend: Backend) -> list[FittedLayer]:
    """Make the factors of all layers, and certify each layer's factors as stored.

    Raises:
        InputError: The moments are not finite, or a data file has changed.
        PlanError: There are no moments.
    """
    return fitted_together(item, backend) if isinstance(item, SharedItem) else fitted_sum(item, backend)
