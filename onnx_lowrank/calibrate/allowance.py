"""The memory that calibration takes, in one share for each kind of data.

Moments that do not fit take further passes over the inputs, activations between layers go to files, and
outputs of the input model are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30
DEFAULT, LEAST, MOST = 2.0, 0.0625, 2.0**17
"""GiB. The least holds moments of 700 features."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """The memory that calibration may take.

    The weights of the running model, the tensors of one batch, probes and the sums of one layer in recovery
    come on top.

    Attributes:
        total: Bytes.
    """

    total: int = int(DEFAULT * _GIB)

    @classmethod
    def of(cls, gib: float) -> Allowance:
        """An allowance in GiB."""
        return cls(int(gib * _GIB))

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
