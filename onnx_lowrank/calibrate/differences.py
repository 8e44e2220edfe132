"""The elements in which two results of a model differ by more than rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_EQUAL = 1e-3  # of the largest element: float16 rounds sums of attention in another order


def differs(value: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each element differs, floats by more than rounding; all do if the shapes differ."""
    if value.shape != other.shape:
        return np.ones(value.shape, np.bool_)
    if value.dtype.kind in "biu":
        return np.asarray(value != other)
    if value.dtype.kind != "c" and value.dtype.itemsize < 4:
        value, other = value.astype(np.float32), other.astype(np.float32)
    finite = np.isfinite(value)
    scale = np.abs(value[finite]).max(initial=0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        is_far = ~(np.abs(value - other) <= _EQUAL * scale)
    # Infinite elements, such as those of masks, are compared as they are.
    is_other: NDArray[np.bool_] = np.where(finite, is_far, (value != other) & ~np.isnan(value))
    return is_other
