"""The variation of an output over samples, by which its errors are divided.

A constant offset (boxes around fixed anchors, logits of rare classes) can be most of ‖y‖, but it does not
depend on the inputs. So the errors of whole models and of single layers are both relative to ‖y − ȳ‖.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-12  # of the energy of an output: a smaller variation is rounding


class Spread:
    """Σ ‖y − ȳ‖² of one output with its elementwise mean ȳ over the samples; batches are streamed.

    Elements that are not finite are left out: an element's mean is over the samples in which it is finite.

    Attributes:
        energy: Σ ‖y‖².
    """

    def __init__(self) -> None:
        self._first: NDArray[Any] | None = None  # subtracted from all samples: large means cancel no digits
        self._sum: Any = 0.0
        self._counts: Any = 0
        self._power = 0.0
        self.energy = 0.0
        self._has_one_shape = True

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, y: NDArray[Any], *, batched: bool) -> None:
        """Add one batch.

        Args:
            y: The output, float64 or complex128.
            batched: Whether its first axis counts samples; otherwise, the output is one sample.
        """
        y = y if batched else y[None]
        finite = np.isfinite(y)
        is_whole = bool(finite.all())
        self.energy += _energy(y if is_whole else np.where(finite, y, 0.0))
        if self._first is None and len(y):
            self._first = np.where(finite[0], y[0], 0.0)
        if self._first is None or self._first.shape != y.shape[1:]:
            self._has_one_shape = False
        if self._first is None or not self._has_one_shape:
            return
        about = y - self._first
        if not is_whole:
            about = np.where(finite, about, 0.0)
        self._sum = self._sum + about.sum(axis=0)
        self._counts = self._counts + (len(y) if is_whole else finite.sum(axis=0))
        self._power += _energy(about)

    @np.errstate(over="ignore", invalid="ignore")
    def power(self) -> float | None:
        """Σ ‖y − ȳ‖²; None for a single sample, for samples of several shapes, or for equal samples."""
        if not self._has_one_shape or not np.any(np.asarray(self._counts) > 1):
            return None
        power = self._power - _energy(self._sum / np.sqrt(np.maximum(self._counts, 1)))
        return power if power > _ROUNDING * self.energy else None


def is_batched(feed: Mapping[str, NDArray[Any]], y: NDArray[Any]) -> bool:
    """Whether the first axis of an output counts samples: it is as long as the first axis of an input."""
    return y.ndim > 0 and any(array.ndim > 0 and len(array) == len(y) for array in feed.values())


def _energy(y: NDArray[Any]) -> float:
    return float(np.vdot(y, y).real)
