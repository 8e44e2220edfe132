"""Moments of the inputs and targets of a recovered layer, over one share of the calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.linalg.quadratic import Quadratic, of_targets


@dataclass(frozen=True, slots=True)
class Share:
    """One share of the calibration inputs, as a layer of the compressed prefix sees it.

    Attributes:
        inputs: Moments of its inputs x̂.
        targets: Moments of its targets y, jointly with x̂.
    """

    inputs: Moments
    targets: Targets

    def problem(self, weight: NDArray[np.generic], ridge: float, *, centred: bool) -> Quadratic:
        """The error of the layer's weight on this share, as `linalg.quadratic.of_targets`."""
        return of_targets(weight, self.inputs, self.targets, centred=centred, ridge=ridge)


class Changes:
    """Changes of targets: sums over vectors x̂, their targets t, and the changes d of the targets.

    The vectors may come from a part of the batches: the moments of t come from all batches, and only the
    changes by d come from the part.

    Attributes:
        lost: Sum of the squared errors behind the Relu.
    """

    def __init__(self, share: Share) -> None:
        mean, cross = share.targets.mean, share.targets.cross
        self.lost = 0.0
        self._known = share
        self._center = share.inputs.mean.astype(np.float32)
        self._count = 0
        # Sums of d, of x̂ about its mean, of d (x̂ − mean)ᵀ, and of ‖t + d‖² − ‖t‖².
        self._sums = [np.zeros_like(mean), np.zeros_like(share.inputs.mean), np.zeros_like(cross)]
        self._power = np.zeros_like(share.targets.power)

    def add(self, x: NDArray[Any], target: NDArray[Any], change: NDArray[Any], lost: NDArray[Any]) -> None:
        """Add vectors, shapes (rows, g, p) and (rows, g, f / g), and their errors behind the Relu."""
        centred = x - self._center
        self._count += len(x)
        self._sums[0] += change.sum(axis=0, dtype=np.float64)
        self._sums[1] += centred.sum(axis=0, dtype=np.float64)
        self._sums[2] += np.moveaxis(change, 0, -1) @ np.swapaxes(centred, 0, 1)
        about = target - self._known.targets.mean.astype(np.float32)
        self._power += (change * (2 * about + change)).sum(axis=(0, 2), dtype=np.float64)
        self.lost += float(np.sum(np.square(lost), dtype=np.float64))

    @classmethod
    def merged(cls, parts: Sequence[Changes]) -> Changes:
        """The sums of all parts; the first part is changed and holds them."""
        whole = parts[0]
        for part in parts[1:]:
            whole.lost += part.lost
            whole._count += part._count
            whole._sums = [mine + other for mine, other in zip(whole._sums, part._sums, strict=True)]
            whole._power += part._power
        return whole

    def share(self) -> Share:
        """The moments of x̂ and of the changed targets."""
        change, offset, cross = (total / self._count for total in self._sums)
        known = self._known.targets
        targets = Targets(
            mean=known.mean + change,
            cross=known.cross + cross - change[:, :, None] * offset[:, None, :],
            power=known.power + self._power / self._count - np.sum(change**2, axis=1),
        )
        return Share(self._known.inputs, targets)
