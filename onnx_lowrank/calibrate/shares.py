"""The samples that are used, the share of them that is held out, and batches of one share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.engine import Feed

HOLD_EVERY = 5
"""The last of every 5 samples is held out: interleaved, so both shares cover data that is sorted."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs to run a model on.

    Attributes:
        feed: An array for each of the model's inputs.
        held: Whether all its samples are held out; otherwise, all of them are to be fitted to.
    """

    feed: Feed
    held: bool


class Samples(Protocol):
    """Calibration inputs that can be read repeatedly."""

    @property
    def count(self) -> int:
        """Number of samples."""

    def batches(self, size: int) -> Iterable[Batch]:
        """The samples, in batches of at most `size` if the model allows that."""


def together(feed: Feed) -> int:
    """Number of samples in a feed; 1 if its arrays do not agree on it."""
    sizes = {len(array) for array in feed.values() if array.ndim}
    return sizes.pop() if len(sizes) == 1 else 1


def spaced(total: int, most: int | None) -> NDArray[np.intp]:
    """At most `most` numbers below `total`, evenly spaced and ascending; all of them for None."""
    number = total if most is None else min(total, most)
    return np.arange(number, dtype=np.intp) * total // max(number, 1)


def held_out(number: int) -> NDArray[np.bool_]:
    """For each sample or feed, whether it is held out; with fewer than `HOLD_EVERY` none is."""
    return np.equal(np.arange(number) % HOLD_EVERY, HOLD_EVERY - 1)


def counted(number: int, thing: str) -> str:
    """A number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
