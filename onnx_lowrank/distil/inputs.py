"""The inputs to fit to, in batches of a new order in every pass.

Rules:

1. Samples of one shape are cut into new batches in every pass; feeds of several shapes, or of a fixed
   number of samples, come whole in a new order.
2. Inputs that exceed the memory are read again in every pass, and only those in a buffer change their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.shares import Samples
from onnx_lowrank.engines.batches import samples as samples_of
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import Spec

SIZE = 32
"""The most samples in a batch: the gradient of more tells little more, and takes longer."""

_STEPS = 16
"""The fewest batches of a pass, if there are that many samples."""


class Inputs:
    """The share of the samples that is fitted to."""

    def __init__(self, samples: Samples, wanted: tuple[Spec, ...], most: int, memory: int) -> None:
        """Read the inputs once.

        Args:
            samples: The samples.
            wanted: The inputs of the model.
            most: The most samples that the model takes at once.
            memory: Bytes of inputs to hold.
        """
        fitted = samples.count - samples.count // 5
        self.size = max(1, min(SIZE, most, fitted // _STEPS))
        self._samples = samples
        self._memory = memory
        self._table: dict[str, NDArray[np.generic]] | None = None
        held = list(_within(self._read(), memory))
        self._feeds = held if sum(map(_bytes, held)) <= memory else None
        if self._feeds is not None and self._are_cut(self._feeds, wanted):
            self._table = {
                name: np.concatenate([feed[name] for feed in self._feeds]) for name in self._feeds[0]
            }

    def _are_cut(self, feeds: list[Feed], wanted: tuple[Spec, ...]) -> bool:
        """Whether feeds were cut from a table of samples of one shape, so that they can be cut anew."""
        counts = [samples_of(feed, wanted) for feed in feeds]
        shapes = {tuple(array.shape[1:] for array in feed.values()) for feed in feeds if None not in counts}
        return len(shapes) == 1 and self.size > 1 and all(count == self.size for count in counts[:-1])

    def _read(self) -> Iterator[Feed]:
        return (batch.feed for batch in self._samples.batches(self.size) if not batch.held)

    def batches(self, draws: np.random.Generator) -> Iterator[Feed]:
        """One pass over the inputs, in an order that the generator draws; never ends with a part of a batch.

        Args:
            draws: Draws the order.
        """
        if self._table is not None:
            count = len(next(iter(self._table.values())))
            order = draws.permutation(count)
            for start in range(0, count - self.size + 1, self.size):
                places = order[start : start + self.size]
                yield {name: array[places] for name, array in self._table.items()}
            return
        buffer: list[Feed] = []
        for feed in self._read() if self._feeds is None else self._feeds:
            buffer.append(feed)
            if sum(map(_bytes, buffer)) > self._memory:
                yield buffer.pop(int(draws.integers(len(buffer))))
        for place in draws.permutation(len(buffer)):
            yield buffer[place]


def _within(feeds: Iterable[Feed], memory: int) -> Iterator[Feed]:
    """The first feeds, up to the one that exceeds the memory."""
    taken = 0
    for feed in feeds:
        taken += _bytes(feed)
        yield feed
        if taken > memory:
            return


def _bytes(feed: Feed) -> int:
    return sum(array.nbytes for array in feed.values())
