"""Finished passes over the data, kept for other runs on the same model and samples.

A pass depends on the passes before it: they choose the size of its batches, and leave the tensors with which
it starts. So its key holds the measurements of all passes, and its entry tells how it went.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.shares import Samples
from onnx_lowrank.files.keeping import Keeper, digest
from onnx_lowrank.work.moments import LayerMoments, MomentsRef

_log = logging.getLogger(__name__)

_READ = 32
"""Samples that are read at a time for their digest."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One finished pass.

    Attributes:
        layers: The layers that share moments, for all moments.
        reasons: For each layer without moments, the reason.
        sizes: The numbers of samples that were run at a time.
        is_relayed: Whether the next pass may start from tensors of this one.
    """

    layers: tuple[tuple[str, ...], ...]
    reasons: Mapping[str, str]
    sizes: tuple[int, ...] = ()
    is_relayed: bool = False


class Passes:
    """The passes of one measurement."""

    def __init__(
        self, keeper: Keeper | None, statistics: Statistics, name: str, described: Any, memory: int
    ) -> None:
        """Prepare.

        Args:
            keeper: Keeps values for one model and its samples; None keeps none.
            statistics: Takes the moments of known passes, and gives those of new ones.
            name: The name of the measurement.
            described: The measurements of all passes.
            memory: Bytes for the unfinished moments of all layers; those of one layer are no larger.
        """
        self._largest = memory
        self._keeper = None if keeper is None else keeper.of(name, statistics.padding, described)
        self._name = name
        self._statistics = statistics

    def known(self, number: int, layers: Sequence[str]) -> Pass | None:
        """Take the moments of a pass; None if some are absent.

        Args:
            number: The number of the pass.
            layers: Its layers.

        Raises:
            InputError: The disk is full.
        """
        if self._keeper is None:
            return None
        known: Pass | None = self._keeper.get(self._keeper.key(number), Pass)
        if known is None or {*known.reasons}.union(*known.layers) != {*layers}:
            _log.debug("%s, pass %d: the moments are not in the cache", self._name, number + 1)
            return None
        for place, names in enumerate(known.layers):
            moments = self._keeper.get(self._keeper.key(number, place), LayerMoments, self._largest)
            if moments is None or (moments.inputs is None and moments.outputs is None):
                return None
            self._statistics.restore(names, moments)
        self._statistics.reasons.update(known.reasons)
        _log.debug("%s, pass %d: %d layers are in the cache", self._name, number + 1, len(layers))
        return known

    def keep(
        self, number: int, layers: Sequence[str], sizes: tuple[int, ...] = (), *, is_relayed: bool = False
    ) -> None:
        """Keep the moments of a finished pass.

        Args:
            number: The number of the pass.
            layers: Its layers.
            sizes: The numbers of samples that were run at a time.
            is_relayed: Whether the next pass may start from tensors of this one.
        """
        if self._keeper is None:
            return
        shared: dict[MomentsRef, list[str]] = {}
        for layer in layers:
            if (reference := self._statistics.reference(layer)) is not None:
                shared.setdefault(reference, []).append(layer)
        for place, reference in enumerate(shared):
            self._keeper.put(self._keeper.key(number, place), reference.read())
        reasons = {name: found for name in layers if (found := self._statistics.reasons.get(name))}
        # The last entry: it says that all others are there.
        made = Pass(tuple(map(tuple, shared.values())), reasons, sizes, is_relayed)
        self._keeper.put(self._keeper.key(number), made)


def digest_of(samples: Samples) -> str:
    """A digest of samples as they are read, with the share of each."""
    made = ""
    for batch in samples.batches(_READ):
        made = digest(made, batch.held, batch.feed)
    return made
