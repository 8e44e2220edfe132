"""The outcomes of probes, kept for other runs on the same model and samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.sensitivity import Outcome
from onnx_lowrank.files.keeping import Keeper


@dataclass(frozen=True, slots=True)
class _Kept:
    """An outcome in a store: its parts, with names in alphabetical order."""

    errors: NDArray[np.float64] | None
    reason: str
    compared: tuple[str, ...]


class Outcomes:
    """The outcomes of the layers of one measurement; a `calibrate.sensitivity.Memory`."""

    def __init__(self, keeper: Keeper, keys: Mapping[str, str]) -> None:
        """Read all outcomes that are known.

        Args:
            keeper: Keeps values.
            keys: For each layer, the key of its outcome.
        """
        self._keeper = keeper
        self._keys = keys
        kept: dict[str, _Kept | None] = {layer: keeper.get(key, _Kept) for layer, key in keys.items()}
        self._known = {layer: _outcome(found) for layer, found in kept.items() if found is not None}

    def get(self, layer: str) -> Outcome | None:
        """The outcome of a layer, if an earlier run has kept it."""
        return self._known.get(layer)

    def put(self, layer: str, outcome: Outcome) -> None:
        """Keep the outcome of a layer."""
        found, compared = outcome.found, tuple(sorted(outcome.compared))
        errors, reason = (None, found) if isinstance(found, str) else (found, "")
        self._keeper.put(self._keys[layer], _Kept(errors, reason, compared))


def _outcome(kept: _Kept) -> Outcome:
    found = kept.reason if kept.errors is None else kept.errors
    return Outcome(found, frozenset(kept.compared))
