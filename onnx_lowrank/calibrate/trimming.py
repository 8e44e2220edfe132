"""Calibration inputs without the padding behind their texts, in batches of texts of like length.

A model that ignores hidden positions may still need them: constants for a number of positions, or a sum over
all of them. So the model also runs on one sample that ends with its last shown position. Padding is removed
only if all results at shown positions stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.differences import differs
from onnx_lowrank.calibrate.jobs import Job
from onnx_lowrank.calibrate.shares import Batch, Samples
from onnx_lowrank.engines.batches import samples as samples_of
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.engines.padding import Padding

_SORTED = 4
"""Batches among which texts are ordered by their lengths."""

_CUT = 4
"""Parts of a batch of ordered texts: a shorter part has less padding, and smaller tensors stay in caches."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Samples that end with the longest text of their batch.

    A model takes as long for padding as for text, so texts of like length share a batch.

    Attributes:
        samples: The samples.
        padding: Their padding; samples without removable padding stay as they are.
        shortest: Whether only the batch of the shortest texts is read of every four batches.
    """

    samples: Samples
    padding: Padding
    shortest: bool = False

    @property
    def count(self) -> int:
        """Number of samples that are read, approximately."""
        every = _SORTED if self.shortest and self.padding.removable else 1
        return -(-self.samples.count // every)

    def part(self, size: int) -> int:
        """The most samples in a batch, as `batches` cuts them, if the model allows that many.

        Args:
            size: As for `batches`.
        """
        # Not the batches of shortest texts, which are chosen by their number.
        return -(-size // _CUT) if self.padding.removable and not self.shortest else size

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the data once; its batches are the same every time.

        Args:
            size: The most samples in a batch, if the model allows that; their inputs are read for four
                batches at a time.
        """
        if not self.padding.removable:
            yield from self.samples.batches(size)
            return
        read = {False: 0, True: 0}
        part = self.part(size)
        for batch in self.samples.batches(_SORTED * size):
            parts = list(self._parts(batch, part))
            if self.shortest:
                yield parts[0]
                continue
            # Every n-th batch stands for all, so a batch of the shortest texts must not always come first.
            first = read[batch.held] % len(parts)
            read[batch.held] += 1
            yield from parts[first:] + parts[:first]

    def _parts(self, batch: Batch, size: int) -> Iterator[Batch]:
        ends = self.padding.ends(batch.feed)
        count = len(ends)
        if count <= size or any(array.ndim and len(array) != count for array in batch.feed.values()):
            yield Batch(self.padding.trim(batch.feed), batch.held)
            return
        order = np.argsort(ends, kind="stable")
        for start in range(0, count, size):
            rows = np.sort(order[start : start + size])
            feed = {name: array[rows] if array.ndim else array for name, array in batch.feed.items()}
            yield Batch(self.padding.trim(feed), batch.held)


def removable(
    run: Run, padding: Padding, feed: Feed, jobs: Iterable[Job], wanted: tuple[Spec, ...]
) -> frozenset[str]:
    """The inputs from which padding can be removed; none if a result depends on it.

    Args:
        run: Runs the model, which also returns the tensors of the jobs.
        padding: The padding that was found.
        feed: Inputs with padding.
        jobs: The measurements.
        wanted: The model's inputs.
    """
    shape = np.asarray(feed[padding.mask]).shape
    names = frozenset(spec.name for spec in wanted if _counts_positions(spec, feed[spec.name], shape))
    sample, end = _shortest(feed, padding, wanted)
    if padding.mask not in names or sample is None or end == shape[1]:
        return frozenset()
    trimmed = replace(padding, removable=names).trim(sample)
    try:
        before, after = run(sample), run(trimmed)
    except (UnsupportedError, RejectedError):
        return frozenset()
    shown = np.asarray(trimmed[padding.mask])[0] != 0
    taps = {tap.name for job in jobs for tap, _ in job.sights}
    outputs = (name for name in before if name not in taps)
    are_outputs_same = all(
        _is_same_output(before[name], after[name], padding.axes.get(name), shown) for name in outputs
    )
    are_inputs_same = all(_is_same_input(job, before, after, shown) for job in jobs)
    return names if are_outputs_same and are_inputs_same else frozenset()


def _counts_positions(spec: Spec, values: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether the second axis of an input counts positions, and the model takes any number of them."""
    is_free = spec.shape is None or (len(spec.shape) > 1 and not isinstance(spec.shape[1], int))
    return is_free and values.shape[:2] == shape


def _shortest(feed: Feed, padding: Padding, wanted: tuple[Spec, ...]) -> tuple[Feed | None, int]:
    """The sample of a feed that ends first, alone, with its end; None if samples cannot be separated."""
    ends = padding.ends(feed)
    first = int(ends.argmin())
    if len(ends) == 1:
        return feed, int(ends[0])
    if samples_of(feed, wanted) is None:
        return None, 0
    return {name: a[first : first + 1] if a.ndim else a for name, a in feed.items()}, int(ends[first])


def _is_same_output(whole: Any, trimmed: Any, axis: int | None, shown: NDArray[np.bool_]) -> bool:
    """Whether an output is the same without padding; at shown positions, if an axis counts positions."""
    if not isinstance(whole, np.ndarray) or not isinstance(trimmed, np.ndarray):
        return False
    if axis is None:
        return not differs(whole, trimmed).any()
    # Slices, as an output of one sample may have fewer axes.
    if whole.ndim <= axis or trimmed.ndim != whole.ndim:
        return False
    kept = np.flatnonzero(shown)
    return not differs(np.take(whole, kept, axis), np.take(trimmed, kept, axis)).any()


def _is_same_input(
    job: Job, before: Mapping[str, Any], after: Mapping[str, Any], shown: NDArray[np.bool_]
) -> bool:
    """Whether the vectors of a job are the same without padding: those of shown positions, or all of them."""
    for tap, form in job.sights:
        whole, trimmed = (list(job.cut(form, made[tap.name], tap.depth)) for made in (before, after))
        number = sum(map(len, trimmed))
        if not whole or not trimmed:
            continue
        rows, others = np.concatenate(whole), np.concatenate(trimmed)
        if number == len(shown) and len(rows) > number:
            rows, others = rows[:number][shown], others[shown]
        if differs(rows, others).any():
            return False
    return True
