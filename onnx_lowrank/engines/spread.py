"""How much an output varies over samples: what an error of it is to be measured by.

A constant offset (boxes around fixed anchors, logits of rare classes) can be most of ‖y‖, and says nothing of
the inputs; so both the trials of whole models and the effects of single layers compare with ‖y − ȳ‖.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-12  # of the energy of an output: what varies by less is rounding


class Spread:
    """Σ ‖y − ȳ‖² of one output, ȳ its mean over the samples, element by element; batches are streamed.

    Elements that are not finite are left out: each has the mean of the samples in which it is finite.

    Attributes:
        energy: Σ ‖y‖².
    """

    def __init__(self) -> None:
        self._first: NDArray[Any] | None = None  # sums are taken about it: large means cancel nothing
        self._sum: Any = 0.0
        self._counts: Any = 0
        self._power = 0.0
        self.energy = 0.0
        self._is_told = True

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, y: NDArray[Any], *, batched: bool) -> None:
        """Add one batch.

        Args:
            y: The output, float64 or complex128.
            batched: Whether its first axis counts samples; else all of it is one sample.
        """
        y = y if batched else y[None]
        finite = np.isfinite(y)
        self.energy += _energy(np.where(finite, y, 0.0))
        if self._first is None and len(y):
            self._first = np.where(finite[0], y[0], 0.0)
        if self._first is None or self._first.shape != y.shape[1:]:
            self._is_told = False
        if self._first is None or not self._is_told:
            return
        about = np.where(finite, y - self._first, 0.0)
        self._sum = self._sum + about.sum(axis=0)
        self._counts = self._counts + finite.sum(axis=0)
        self._power += _energy(about)

    @np.errstate(over="ignore", invalid="ignore")
    def power(self) -> float | None:
        """Σ ‖y − ȳ‖², or None: one sample, samples of several shapes, or none that differ."""
        if not self._is_told or not np.any(np.asarray(self._counts) > 1):
            return None
        power = self._power - _energy(self._sum / np.sqrt(np.maximum(self._counts, 1)))
        return power if power > _ROUNDING * self.energy else None


def is_batched(feed: Mapping[str, NDArray[Any]], y: NDArray[Any]) -> bool:
    """Whether the first axis of an output counts samples: it is as long as that of an input."""
    return y.ndim > 0 and any(array.ndim > 0 and len(array) == len(y) for array in feed.values())


def _energy(y: NDArray[Any]) -> float:
    return float(np.vdot(y, y).real)
