"""Whether samples that follow each other are alike, such as crops of one photograph or frames of one film.

Every fifth sample is held out. Its neighbours belong to the fit, so if they show the same thing, the error on
held-out samples is smaller than that on new ones. Samples that are sorted by class are alike, too, without
harm; only the user knows the difference. The outputs y_1 … y_n of the input model tell: with their mean ȳ,

    r = 1 − n / (n − 1) · Σ ‖y_{i+1} − y_i‖² / (2 Σ ‖y_i − ȳ‖²)

is near 0 for samples in random order, and near 1 if each is like the one before (the ratio of J. von Neumann,
"Distribution of the ratio of the mean square successive difference to the variance", 1941). Its standard
error for n independent samples is about 1 / √n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.spread import Spread, is_batched

_FEWEST = 25
"""The least number of samples that tell: with them the standard error is at most 0.2."""

_ALIKE = 0.5
"""The least r of which a warning tells."""


@dataclass(slots=True)
class _Output:
    """The sums over one output."""

    spread: Spread = field(default_factory=Spread)
    steps: float = 0.0
    last: NDArray[np.float64] | None = None

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, y: NDArray[np.float64]) -> None:
        """Add samples; with samples of several shapes, the spread has no power."""
        self.spread.add(y, batched=True)
        if self.last is not None and self.last.shape != y.shape[1:]:
            return
        line = y if self.last is None else np.concatenate([self.last[None], y])
        self.steps += float(np.square(np.diff(line, axis=0)).sum())
        self.last = line[-1]


class Succession:
    """The likeness of samples to those before them; batches are streamed."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}
        self._seen: set[int] = set()
        self._count = 0

    def add(self, batch: int, outputs: Mapping[str, Any], feed: Feed) -> None:
        """Add the input model's outputs on a batch; those of a known batch change nothing.

        Args:
            batch: The number of the batch; batches come in the order of their samples.
            outputs: The outputs. Those that are not float, or have not one row for each sample, do not count.
            feed: The inputs.
        """
        if batch in self._seen:
            return
        self._seen.add(batch)
        count = 0
        for name, value in outputs.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or not is_batched(feed, value):
                continue
            count = len(value)
            self._outputs.setdefault(name, _Output()).add(value.astype(np.float64))
        self._count += count

    @property
    def correlation(self) -> float | None:
        """r, the mean over the outputs; None for few samples, or without outputs that vary."""
        if self._count < _FEWEST:
            return None
        powers = [(each.steps, each.spread.power()) for each in self._outputs.values()]
        share = (self._count / (self._count - 1)) / 2
        found = [1 - share * steps / power for steps, power in powers if power and np.isfinite(steps / power)]
        return float(np.mean(found)) if found else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence where the samples are alike."""
        correlation = self.correlation
        if correlation is None or correlation < _ALIKE:
            return ()
        return (
            f"Samples that follow each other are alike (correlation {correlation:.2f}). If they are crops of "
            "one photograph, or frames of one film, errors on held-out samples are smaller than on others: "
            "give samples of more origins, and --check with others. Samples sorted by class are no fault.",
        )
