"""The memory that calibration takes, in one share for each kind of data.

Moments that do not fit take further passes over the inputs, activations between layers go to files, and
outputs of the input model are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = 2**31
LEAST = 2**26
"""Less would hold the moments of no usual layer."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """The memory that calibration may take.

    The weights of the running model and the tensors of one batch come on top.

    Attributes:
        total: Bytes.
    """

    total: int = DEFAULT

    @property
    def moments(self) -> int:
        """Bytes for unfinished moments, over all layers."""
        return self.total * 5 // 8

    @property
    def activations(self) -> int:
        """Bytes for activations between layers."""
        return self.total // 4

    @property
    def outputs(self) -> int:
        """Bytes for the outputs of the input model."""
        return self.total // 8
