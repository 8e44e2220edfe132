"""Moments of activations on disk: calibration writes them once, and work items read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.core.factors import Moments

_PARTS = ("count", "mean", "second")
_FIT, _HELD = "fit", "held"


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """The moments of one layer's inputs or of its outputs; empty if it has none.

    Attributes:
        inputs: Moments of its patches over the samples to fit to: (g, p) and (g, p, p).
        held: The same over the held-out samples; None without held-out samples.
        outputs: Moments of its results, after a folded BatchNorm, over the samples to fit to: (g, f / g) and
            (g, f / g, f / g).
        held_outputs: The same over the held-out samples.
        reason: Why the layer has no moments, a sentence; "" if it has some.
    """

    inputs: Moments | None = None
    held: Moments | None = None
    outputs: Moments | None = None
    held_outputs: Moments | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MomentsRef:
    """Moments in a folder.

    Attributes:
        folder: The folder.
        number: Number of these moments in the folder.
        of_outputs: Whether they are moments of the layer's results rather than of its inputs.
    """

    folder: Path
    number: int
    of_outputs: bool

    @property
    def has_held(self) -> bool:
        """Whether the folder has moments of held-out samples."""
        return self._path(_HELD, "count").exists()

    @property
    def nbytes(self) -> int:
        """Bytes that the moments take in memory; 0 if the folder was deleted."""
        paths = (self._path(share, part) for share in (_FIT, _HELD) for part in _PARTS)
        return sum(path.stat().st_size for path in paths if path.exists())

    def read(self) -> LayerMoments:
        """Read the moments."""
        fit, held = self._read(_FIT), self._read(_HELD)
        return LayerMoments(outputs=fit, held_outputs=held) if self.of_outputs else LayerMoments(fit, held)

    def write(self, fit: Moments, held: Moments | None) -> None:
        """Write moments to the folder.

        Raises:
            OSError: The disk is full.
        """
        for share, moments in ((_FIT, fit), (_HELD, held)):
            if moments is not None:
                for part in _PARTS:
                    np.save(self._path(share, part), getattr(moments, part))

    def _read(self, share: str) -> Moments | None:
        if not self._path(share, "count").exists():
            return None
        count, mean, second = (np.load(self._path(share, part)) for part in _PARTS)
        return Moments(int(count), mean, second)

    def _path(self, share: str, part: str) -> Path:
        return self.folder / f"{self.number}.{share}.{part}.npy"
