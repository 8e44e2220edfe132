"""Which samples are used, which of them are held out, and what a batch of them is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.engine import Feed

HOLD_EVERY = 5
"""One sample of so many is held out, the last: interleaved, so that both shares see all of sorted data."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs to run a model on.

    Attributes:
        feed: An array for each of the model's inputs.
        held: Whether all its samples are held out; else all of them are to be fitted to.
    """

    feed: Feed
    held: bool


def spaced(total: int, most: int | None) -> NDArray[np.intp]:
    """At most `most` of the numbers below `total`, evenly spaced and ascending; None for all of them."""
    number = total if most is None else min(total, most)
    return np.arange(number, dtype=np.intp) * total // max(number, 1)


def held_out(number: int) -> NDArray[np.bool_]:
    """For each of so many samples or feeds, whether it is held out; with fewer than `HOLD_EVERY` none is."""
    return np.equal(np.arange(number) % HOLD_EVERY, HOLD_EVERY - 1)


def counted(number: int, thing: str) -> str:
    """A number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
