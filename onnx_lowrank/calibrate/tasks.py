"""Measurements in progress: they add up the vectors of one batch after another.

Consecutive batches form a section. Each section is summed on its own, and the sums of sections are merged in
their order. So sections may be summed in other places, and the moments have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.jobs import Job
from onnx_lowrank.calibrate.lookups import Counts, Lookup
from onnx_lowrank.calibrate.moments import Accumulator
from onnx_lowrank.calibrate.parts import whole
from onnx_lowrank.calibrate.shares import Batch, together
from onnx_lowrank.core.factors import Moments
from onnx_lowrank.engines.padding import NO_PADDING, Padding

Section = dict[bool, Accumulator]
"""The sums over some batches, of the samples to fit to (False) and of the held-out ones (True)."""


class Task:
    """A job in progress.

    Attributes:
        job: The job.
        layers: The ids of its layers.
    """

    def __init__(self, job: Job, layers: Sequence[str]) -> None:
        """Start without vectors."""
        self.job = job
        self.layers = layers
        self._shares: Section = {}
        self._open: Section = {}

    def add(self, found: Mapping[str, Any], batch: Batch, padding: Padding = NO_PADDING) -> None:
        """Add the tapped tensors of one batch, without padding, to the open section.

        Raises:
            InputError: They hold NaN, Inf or numbers whose squares overflow.
        """
        held, number = batch.held, together(batch.feed)
        if held not in self._open:
            self._open[held] = Accumulator(f"layer {whole(self.layers[0])!r}", *self.job.shape)
        given = self._shown(batch, padding)
        for tap, form in self.job.sights:
            value, samples, shown = found[tap.name], None, None
            is_cut = not tap.depth and value.ndim and len(value) % number == 0
            if is_cut and (number > 1 or given is not None):
                # Samples follow each other, also where their tokens are rows of one axis.
                span = sum(len(rows) for rows in self.job.cut(form, value[: len(value) // number]))
                samples = np.repeat(np.arange(number), span)
                # Not if a feed of other shapes has other vectors than those of positions.
                shown = given if given is not None and given.size == samples.size else None
            start = 0
            for rows in self.job.cut(form, value, tap.depth):
                part = slice(start, start + len(rows))
                start += len(rows)
                own = None if samples is None else samples[part]
                if shown is not None:
                    kept = np.flatnonzero(shown.ravel()[part])
                    # Not the mask itself, with which NumPy copies element by element.
                    rows, own = rows.take(kept, axis=0), None if own is None else own[kept]
                self._open[held].add(rows, own)
        self._open[held].close_block()

    def section(self) -> Section:
        """End the open section, and give its sums."""
        section, self._open = self._open, {}
        return section

    def join(self, section: Section) -> None:
        """Add the sums of a section behind those so far.

        Raises:
            InputError: They hold numbers whose squares overflow.
        """
        for held, sums in section.items():
            if held in self._shares:
                self._shares[held].merge(sums)
            else:
                self._shares[held] = sums

    def _shown(self, batch: Batch, padding: Padding) -> NDArray[np.bool_] | None:
        """Whether each position counts for the layers, shape (samples, positions); None if all do."""
        return padding.shown(batch.feed) if padding.layers.issuperset(self.layers) else None

    def moments(self) -> tuple[Moments | None, Moments | None]:
        """The moments of the samples to fit to and of the held-out ones; frees the memory of the sums."""
        self.join(self.section())
        fit, held = (self._shares.pop(h).moments() if h in self._shares else None for h in (False, True))
        return fit, held


class Lookups(Task):
    """The measurement of the rows of one table, which the inputs look up, with the counts of all rows.

    Attributes:
        counts: The counts so far.
    """

    def __init__(self, job: Job, layer: str, table: Lookup) -> None:
        """Start without rows.

        Args:
            job: The job; it has a tap for each use of the table, and reads no tensors of the model.
            layer: The id of the table.
            table: The table.
        """
        super().__init__(job, [layer])
        self._table = table
        self.counts: Counts = {}

    def look_up(self, batch: Batch, padding: Padding) -> None:
        """Add the rows that one batch looks up, without those of padding.

        Raises:
            InputError: An index lies outside the table, or the rows hold NaN or Inf.
        """
        rows = zip(self.job.sights, self._table.rows(batch.feed), strict=True)
        self.add({tap.name: values for (tap, _), values in rows}, batch, padding)
        counts = self._table.counts(batch.feed, self._shown(batch, padding))
        self.counts[batch.held] = self.counts.get(batch.held, 0) + counts
