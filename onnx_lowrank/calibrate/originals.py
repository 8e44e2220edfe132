"""The input model's outputs on the calibration inputs, computed once for all comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnx_lowrank.calibrate.allowance import Allowance

MEMORY = Allowance().outputs
"""The usual most bytes of outputs that are kept; later batches are computed again."""


class Originals:
    """Keeps the outputs of batches by their numbers, up to a number of bytes."""

    def __init__(self, memory: int = MEMORY) -> None:
        """Start without outputs.

        Args:
            memory: The most bytes to keep.
        """
        self._left: float = memory
        self._kept: dict[int, Mapping[str, Any]] = {}

    def outputs(self, batch: int, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The outputs of one batch.

        Args:
            batch: The number of the batch, among batches that are the same every time.
            compute: Runs the input model on the batch, if its outputs are not kept.
        """
        if batch in self._kept:
            return self._kept[batch]
        outputs = compute()
        # The size of sequences, maps and texts is unknown: they are not kept.
        arrays = [
            value for value in outputs.values() if isinstance(value, np.ndarray) and value.dtype != object
        ]
        size = sum(array.nbytes for array in arrays)
        if len(arrays) == len(outputs) and size <= self._left:
            self._left -= size
            self._kept[batch] = outputs
        return outputs
